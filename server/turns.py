"""What a round sends to its clients, and what of their answers it accepts.

Every reply passes the gate by itself. A bad one is set aside with its reason, and the others go on.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedtune import wire
from fedtune.adapter import State
from fedtune.attacks import colluded
from fedtune.config import Experiment
from fedtune.heads import HeadRule
from fedtune.parts import Parts
from fedtune.privacy.secure import Masked, config_digest
from fedtune.records import Rejection, Sums
from fedtune.strategies.strategy import ClientInfo, Update
from fedtune.wire import Address, RejectedError
from server import exchange, journal, private, secure_aggregation
from server.roster import Roster

log = logging.getLogger("fedtune")


def say(arm: str, event: str, text: str, level: int = logging.INFO, **facts: object) -> None:
    """Log a line of an arm; `record.event` has the same as data, for a progress view."""
    told = {"event": event, "arm": arm, **facts}
    log.log(level, "%s%s", f"[{arm}] " if arm else "", text, extra={"event": told})


@dataclass
class Tally:
    """What one round moved and set aside."""

    bytes_down: int = 0
    bytes_up: int = 0
    bytes_evaluation: int = 0
    train: dict[str, Sums] = field(default_factory=dict)
    tokens: list[float] = field(default_factory=lambda: [0.0, 0.0])
    rejected: list[Rejection] = field(default_factory=list)


@dataclass
class Turns:
    """The turns of all clients in one arm.

    Attributes:
        experiment: of the arm.
        arm: "" for the recipe's own strategy, or the name of a reference.
        run_id: of the recipe.
        grid: Flower's way to the nodes.
        parts: of the experiment.
        roster: who takes part.
        guard: of the run's promise of privacy.
        initial: the state that the run begins with.
        folder: of the arm.
        last_rounds: client -> the last round of which its reply was accepted.
    """

    experiment: Experiment
    arm: str
    run_id: str
    grid: Grid
    parts: Parts
    roster: Roster
    guard: private.Guard
    initial: State
    folder: Path
    last_rounds: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Look up what every turn asks for."""
        strategy = self.parts.strategy
        self.head = HeadRule.of(self.parts.task, strategy)
        self.metrics = self.parts.task.metrics(self.roster.labels)
        self.dealt = [] if strategy.pools else self.experiment.adapter.dealt()

    def schema(self, info: ClientInfo, round: int) -> State:
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
            say(self.arm, "reply", f"{name} answered", client=name, kind=kind)
            yield name, addresses[name], answer

    def _reject(self, tally: Tally, rejection: Rejection) -> None:
        tally.rejected.append(rejection)
        client, text = rejection.client, f"{rejection.code}: {rejection.reason}"
        say(self.arm, "rejected", f"{client}: {text}", client=client, level=logging.WARNING)

    def collect(
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
                schema = self.guard.schema(self.schema(self._info(server, name), round))
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
            schema=self.guard.schema(self.schema(new, round)),
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

    def evaluate(self, server: State, round: int, tally: Tally) -> dict[str, dict[str, Sums]]:
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
