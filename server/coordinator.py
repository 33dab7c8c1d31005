"""The round loop.

One coordinator runs one arm: the recipe's own strategy, or a reference beside it. A round draws a
cohort, sends each client its broadcast, passes every reply through the gate, joins what was
accepted in the order of client names, and commits. A bad reply is set aside with its reason and
the round goes on without it.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedtune import adapted, adapter, aggregation, exporting, models, parts, wire
from fedtune.adapter import Adapter, State
from fedtune.attacks import colluded
from fedtune.config import Experiment
from fedtune.errors import BudgetError, RecipeError, RunError
from fedtune.heads import HeadRule
from fedtune.models import Model
from fedtune.privacy.secure import Masked, config_digest
from fedtune.records import Rejection, RoundRecord, Sums
from fedtune.strategies.strategy import ClientInfo, Update
from fedtune.wire import Address, RejectedError
from server import checkpoint, exchange, joining, journal, private, roster, secure_aggregation
from server.checkpoint import Checkpoint
from server.roster import Roster

log = logging.getLogger("fedtune")
RESIDENT = threading.Lock()  # arms that run at the same time share this process's one model


@dataclass
class Tally:
    """What one round moved and set aside."""

    bytes_down: int = 0
    bytes_up: int = 0
    bytes_evaluation: int = 0
    train: dict[str, Sums] = field(default_factory=dict)
    tokens: list[float] = field(default_factory=lambda: [0.0, 0.0])
    rejected: list[Rejection] = field(default_factory=list)


class Coordinator:
    """Runs one arm of an experiment on a grid.

    Args:
        experiment: the recipe as the clients have it too.
        arm: "" for its own strategy, or the name of a reference.
        grid: Flower's way to the nodes.
    """

    def __init__(self, experiment: Experiment, arm: str, grid: Grid) -> None:
        self.experiment = parts.reference(experiment, arm) if arm else experiment
        self.arm = arm
        self.grid = grid
        self.parts = parts.resolve(self.experiment)
        self.folder = parts.folder_of(self.experiment)
        self.head = HeadRule.of(self.parts.task, self.parts.strategy)
        self.run_id = experiment.run_id
        self.dealt = [] if self.parts.strategy.pools else experiment.adapter.dealt()
        self.roster = Roster({})
        self.guard = private.Guard(self.experiment, self.parts)
        self.initial: State = {}
        self.metrics: dict[str, int] = {}
        self.last_rounds: dict[str, int] = {}

    def run(self) -> None:
        """Run every round that is not yet committed, then write the result.

        Raises:
            RecipeError: the recipe, its data or its folder do not fit.
            RunError: a round had too few replies, or the folder cannot be written.
            BudgetError: the next round would cost more privacy than the recipe allows.
        """
        e = self.experiment
        self.roster = roster.ask(self.grid, self.arm, e.coordinator)
        for reason in self.roster.refusals:
            log.warning("a node does not take part: %s", reason)
        roster.require_quorum(self.roster, self.parts.cohort, e.coordinator)
        joining.require(self.parts, sorted(self.roster.members))
        self._say("roster", f"{len(self.roster.members)} clients", rounds=e.rounds)
        self.metrics = self.parts.task.metrics(self.roster.labels)
        with RESIDENT:
            if self.parts.strategy.changes_base:
                adapted.require_untied(self._model().module, e.strategy)
            principal = self.parts.strategy.begins == "principal"
            self.initial = models.initial(self._model(), e.seed, principal=principal)
        joining.require_room(self.parts, self.initial["adapter"], len(self.roster.members))
        if start := checkpoint.latest(self.folder / "checkpoint", e):
            self._protect()
        else:
            start = self._begin()
        self.last_rounds = start.last_rounds
        journal.keep(self.folder, start.round)
        server = start.state
        for round in range(start.round + 1, e.rounds + 1):
            try:
                server = self._round(server, round)
            except BudgetError:
                self._finish(server)
                raise
        self._finish(server)

    def _protect(self) -> None:
        """Open the ledger, or begin it, for those who are here now."""
        try:
            checkpoint.write_json(self.folder / "roster.json", self.roster.to_json())
            self.guard = private.guard(
                self.experiment, self.parts, self.run_id, self.roster, self.folder
            )
        except OSError as error:
            raise checkpoint.unwritable(self.folder, error, -1) from error
        self._require_masks()

    def _require_masks(self) -> None:
        """Refuse cohorts that could not be masked, before the first round is trained."""
        settings, e = self.guard.settings, self.experiment
        if settings is None:
            return
        names = list(self.roster.members)
        draws = [self.parts.cohort.draw(names, n, self.guard.seed) for n in range(1, e.rounds + 1)]
        reason = secure_aggregation.obstacle(draws, settings, e.weighting)
        if reason:
            raise RecipeError(
                f"secure_aggregation = '{e.secure_aggregation}' with cohort = '{e.cohort}': "
                f"{reason}. Ask more clients, or set secure_aggregation = 'none'."
            )

    def _model(self) -> Model:
        e = self.experiment
        return models.load(self.parts.task, e.model, e.adapter, self.roster.labels, e.seed)

    def _begin(self) -> Checkpoint:
        """Commit round 0: the state before training, and how good the untuned model is."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.replace_text(self.folder / "experiment.toml", self.experiment.text())
        except OSError as error:
            raise checkpoint.unwritable(self.folder, error, -1) from error
        self._protect()
        server = self.parts.strategy.start(self.initial["adapter"])
        if "head" in self.initial:
            server = {**server, "head": self.initial["head"]}
        server = self.guard.began(server)
        began, tally = time.monotonic(), Tally()
        evaluation = self._evaluate(server, 0, tally)
        self._commit(server, 0, [], began, tally, evaluation, 0.0, {})
        return Checkpoint(0, server, {})

    def _round(self, server: State, round: int) -> State:
        began, tally = time.monotonic(), Tally()
        names = self.parts.cohort.draw(list(self.roster.members), round, self.guard.seed)
        self._say("round", f"round {round}", round=round, cohort=names)
        self._charge(server, names, round)
        updates = self._collect(server, names, round, tally)
        needed = self.experiment.coordinator.minimum_replies
        accepted = [name for update in updates for name in update.clients]
        if names and len(accepted) < needed:
            reasons = "; ".join(f"{r.client}: {r.reason.rstrip('.')}" for r in tally.rejected)
            raise RunError(
                f"Round {round}: {len(accepted)} of {len(names)} replies were accepted, {needed} "
                f"are needed (coordinator.minimum_replies). {reasons}. Nothing of this round was "
                "kept; run the same command again to repeat it."
            )
        before, joined = self._release(server, updates, round)
        after = joining.join(self.parts, before, joined, round) if joined else before
        moved = adapter.norm(adapter.subtract(after["adapter"], server["adapter"]))
        compared = {}
        if self.guard.compares and not self.parts.secure.masks:
            compared = aggregation.of_round(self.parts.strategy, server, updates, after, round)
        for name in accepted:
            self.last_rounds[name] = round
        last, every = round == self.experiment.rounds, self.experiment.evaluation.every
        evaluation = self._evaluate(after, round, tally) if last or round % every == 0 else {}
        self._commit(after, round, names, began, tally, evaluation, moved, compared)
        return after

    def _charge(self, server: State, names: Sequence[str], round: int) -> None:
        try:
            self.guard.charge(server, names, round)
        except OSError as error:
            raise checkpoint.unwritable(self.folder, error, round - 1) from error

    def _release(
        self, server: State, updates: Sequence[Update], round: int
    ) -> tuple[State, Sequence[Update]]:
        """What may be joined of the accepted replies."""
        schema = self._schema(ClientInfo("any", 1), round)
        try:
            return self.guard.release(server, updates, schema, round)
        except OSError as error:
            raise checkpoint.unwritable(self.folder, error, round - 1) from error

    def _schema(self, info: ClientInfo, round: int) -> State:
        """Names, shapes and dtypes of what a client sends, but for what its protection adds."""
        schema = self.parts.strategy.payload(self.initial["adapter"], info, round)
        if self.head.shared and "head" in self.initial:
            schema = {**schema, "head": self.initial["head"]}
        return schema

    def _broadcast(self, server: State, name: str, round: int) -> State:
        info = self._info(server, name)
        sent = self.parts.strategy.broadcast(server, info, round)
        own_head = self.head.trained and not self.head.shared and info.last_round
        if "head" in server and not own_head:
            sent = {**sent, "head": server["head"]}
        return self.guard.broadcast(server, sent)

    def _info(self, server: State, name: str) -> ClientInfo:
        member = self.roster.members[name]
        last = self.last_rounds.get(name, 0)
        dealt = ClientInfo(name, member.examples, last, self.roster.rank(name, self.dealt))
        return replace(dealt, rank=self.parts.strategy.client_rank(server, dealt))

    def _ask(
        self,
        kind: str,
        server: State,
        names: Sequence[str],
        round: int,
        tally: Tally,
        scope: str = "own",
    ) -> Iterator[tuple[str, Address, RecordDict]]:
        """The replies as they come: the client's name, how it must be addressed, its content.

        Bytes are counted for each client as if it had messages of its own: what travels together on
        one machine would not between institutions.
        """
        infos = [self._info(server, name) for name in names]
        addresses = {
            who.name: Address(
                self.run_id, self.arm, round, who.name, who.last_round, scope, who.rank
            )
            for who in infos
        }
        contents = exchange.contents(
            {
                name: (address, self._broadcast(server, name, round))
                for name, address in addresses.items()
            }
        )
        down = sum(wire.size(content) for content in contents.values())
        if kind == "train":
            tally.bytes_down += down
        else:
            tally.bytes_evaluation += down
        same = scope == "pooled" or bool(kind == "train" and self.experiment.train.steps)
        work = {name: 1.0 if same else self.roster.rows(name, kind) for name in names}
        timeout = self.experiment.coordinator.timeout_seconds
        for name, answer in exchange.ask(
            self.grid, self.roster, kind, contents, work, round, timeout
        ):
            if isinstance(answer, Rejection):
                self._reject(tally, answer)
                continue
            tally.bytes_up += wire.size(answer)
            self._say("reply", f"{name} answered", client=name, kind=kind)
            yield name, addresses[name], answer

    def _reject(self, tally: Tally, rejection: Rejection) -> None:
        tally.rejected.append(rejection)
        client, text = rejection.client, f"{rejection.code}: {rejection.reason}"
        self._say("rejected", f"{client}: {text}", client=client, level=logging.WARNING)

    def _collect(
        self, server: State, names: Sequence[str], round: int, tally: Tally
    ) -> list[Update]:
        """Accepted updates, sorted by client name; one for all where they are masked."""
        if self.guard.settings:
            return self._collect_masked(self.guard.settings, server, names, round, tally)
        updates = []
        expected = self.metrics if self.guard.tells_metrics else {}
        # Each reply is decoded as it comes, so that its bytes need not stay beside its tensors.
        for name, address, content in self._ask("train", server, names, round, tally):
            try:
                schema = self.guard.schema(self._schema(self._info(server, name), round))
                # Who does not tell its rows has one vote.
                examples = self.roster.members[name].examples or 1
                state, count = wire.gate(content, address, schema, examples)
                self.guard.admit(server, state)
                sums = wire.gate_metrics(content, address, expected)
                tokens = wire.gate_tokens(content)
            except RejectedError as error:
                self._reject(tally, Rejection(name, error.code, error.reason))
                continue
            weight = float(count) if self.experiment.weighting == "examples" else 1.0
            updates.append(Update(name, weight, state))
            tally.train[name] = {k: v for k, v in sums.items() if len(v) == 2}
            tally.tokens = [a + b for a, b in zip(tally.tokens, tokens, strict=True)]
        tally.train = dict(sorted(tally.train.items()))
        tally.rejected.sort(key=lambda rejection: rejection.client)
        updates.sort(key=lambda update: update.client)
        return colluded(updates, self.parts.attack, sorted(self.roster.members))

    def _collect_masked(
        self, settings: Masked, server: State, names: Sequence[str], round: int, tally: Tally
    ) -> list[Update]:
        """The mean of the clients that stayed, as one update."""
        if not names:
            return []

        def moved(down: int, up: int) -> None:
            tally.bytes_down += down
            tally.bytes_up += up

        # Masks cancel between clients that were sent the same: each is sent what a new one needs.
        new, last = ClientInfo("", 0), self.last_rounds
        sent = self.parts.strategy.broadcast(server, new, round)
        if "head" in server:
            sent = {**sent, "head": server["head"]}
        told = self.metrics if self.guard.tells_metrics else {}
        e = self.experiment
        asked = secure_aggregation.Asked(
            run=f"{self.run_id}/{self.arm}",
            round=round,
            addresses={
                name: Address(self.run_id, self.arm, round, name, last.get(name, 0))
                for name in sorted(names)
            },
            broadcast=self.guard.broadcast(server, sent),
            schema=self.guard.schema(self._schema(new, round)),
            metrics={name: length for name, length in told.items() if length == 2},
            work={
                name: 1.0 if e.train.steps else self.roster.rows(name, "train") for name in names
            },
            config=config_digest(e),
            settings=settings,
            weighting=e.weighting,
        )
        legs = secure_aggregation.Legs(
            self.grid,
            self.roster,
            e.coordinator.timeout_seconds,
            moved,
            lambda rejection: self._reject(tally, rejection),
        )
        active, totals = secure_aggregation.collect(asked, legs, self.folder / "secure")
        tally.train = {f"sum of {len(active)}": totals.metrics} if told else {}
        tally.tokens = totals.tokens
        tally.rejected.sort(key=lambda rejection: rejection.client)
        return [Update("", float(totals.weight), totals.mean, active)]

    def _evaluate(self, server: State, round: int, tally: Tally) -> dict[str, dict[str, Sums]]:
        """Metrics on own test rows, and for personal models in the last round on pooled ones."""
        last = round == self.experiment.rounds
        scopes = ["own"]
        tested = [name for name, member in self.roster.members.items() if member.test_examples]
        several = len(self.roster.members) > 1 and self.experiment.evaluation.pooled
        if last and tested and self.parts.strategy.personal and several:
            scopes.append("pooled")
        evaluation: dict[str, dict[str, Sums]] = {}
        expected = self.metrics | self.parts.attack.metrics
        for scope in scopes:
            names = tested if scope == "own" else list(self.roster.members)
            contents, sums = {}, {}
            for name, address, content in self._ask("evaluate", server, names, round, tally, scope):
                contents[name] = content
                try:
                    sums[name] = wire.gate_metrics(content, address, expected)
                except RejectedError as error:
                    self._reject(tally, Rejection(name, error.code, error.reason))
            evaluation[scope] = dict(sorted(sums.items()))
            if last and scope == "own":
                journal.write_samples(self.folder, dict(sorted(contents.items())))
        return evaluation

    def _commit(
        self,
        server: State,
        round: int,
        cohort: Sequence[str],
        began: float,
        tally: Tally,
        evaluation: dict[str, dict[str, Sums]],
        moved: float,
        compared: dict[str, float],
    ) -> None:
        record = RoundRecord(
            round=round,
            cohort=list(cohort),
            seconds=time.monotonic() - began,
            bytes_down=tally.bytes_down,
            bytes_up=tally.bytes_up,
            bytes_evaluation=tally.bytes_evaluation,
            train=tally.train,
            rejected=sorted(tally.rejected, key=lambda r: (r.client, r.code)),
            evaluation=evaluation,
            update_norm=moved,
            tokens=tally.tokens,
            aggregation=compared,
        )
        journal.append(self.folder, record)
        checkpoint.commit(
            self.folder / "checkpoint",
            Checkpoint(round, server, dict(self.last_rounds)),
            self.experiment,
        )
        self._say("committed", f"round {round} committed", record=record)

    def _finish(self, server: State) -> None:
        """Write the adapter, unless every client has its own."""
        if not self.parts.strategy.personal:
            tensors: dict[str, Adapter] = {"adapter": server["adapter"]}
            if "head" in server:
                tensors["head"] = server["head"]
            if "base" in server:
                tensors["base"] = server["base"]
            try:
                with RESIDENT:
                    exporting.save(self._model(), tensors, self.folder / "adapter")
            except OSError as error:
                rounds = self.experiment.rounds
                raise checkpoint.unwritable(self.folder, error, rounds) from error
        self._say("finished", "finished")

    def _say(self, event: str, text: str, level: int = logging.INFO, **facts: object) -> None:
        """Log a line; `record.event` has the same as data, for a progress view."""
        arm = f"[{self.arm}] " if self.arm else ""
        told = {"event": event, "arm": self.arm, **facts}
        log.log(level, "%s%s", arm, text, extra={"event": told})
