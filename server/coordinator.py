"""The round loop.

One coordinator runs one arm: the recipe's own strategy, or a reference beside it. A round draws a
cohort, sends each client its broadcast, passes every reply through the gate, joins what was
accepted in the order of client names, and commits. A bad reply is set aside with its reason and
the round goes on without it.
"""

import logging
import threading
import time
from collections.abc import Sequence

from flwr.serverapp import Grid

from fedtune import adapted, adapter, aggregation, exporting, models, parts
from fedtune.adapter import Adapter, State
from fedtune.config import Experiment
from fedtune.errors import BudgetError, RecipeError, RunError
from fedtune.models import Model
from fedtune.records import RoundRecord, Sums
from fedtune.strategies.strategy import ClientInfo, Update
from server import checkpoint, joining, journal, private, roster, secure_aggregation
from server.checkpoint import Checkpoint
from server.roster import Roster
from server.turns import Tally, Turns, say

log = logging.getLogger("fedtune")
RESIDENT = threading.Lock()  # arms that run at the same time share this process's one model


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
        self.run_id = experiment.run_id
        self.roster = Roster({})
        self.initial: State = {}
        self.turns: Turns  # as soon as the roster is known

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
        say(self.arm, "roster", f"{len(self.roster.members)} clients", rounds=e.rounds)
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
        self.turns.last_rounds = start.last_rounds
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
            guard = private.guard(
                self.experiment, self.parts, self.run_id, self.roster, self.folder
            )
        except OSError as error:
            raise checkpoint.unwritable(self.folder, error, -1) from error
        self.turns = Turns(
            self.experiment,
            self.arm,
            self.run_id,
            self.grid,
            self.parts,
            self.roster,
            guard,
            self.initial,
            self.folder,
        )
        self._require_masks()

    def _require_masks(self) -> None:
        """Refuse cohorts that could not be masked, before the first round is trained."""
        settings, e = self.turns.guard.settings, self.experiment
        if settings is None:
            return
        names = list(self.roster.members)
        seed, rounds = self.turns.guard.seed, range(1, e.rounds + 1)
        draws = [self.parts.cohort.draw(names, n, seed) for n in rounds]
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
        server = self.turns.guard.began(server)
        began, tally = time.monotonic(), Tally()
        evaluation = self.turns.evaluate(server, 0, tally)
        self._commit(server, 0, [], began, tally, evaluation, 0.0, {})
        return Checkpoint(0, server, {})

    def _round(self, server: State, round: int) -> State:
        began, tally = time.monotonic(), Tally()
        names = self.parts.cohort.draw(list(self.roster.members), round, self.turns.guard.seed)
        say(self.arm, "round", f"round {round}", round=round, cohort=names)
        self._charge(server, names, round)
        updates = self.turns.collect(server, names, round, tally)
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
        if self.turns.guard.compares and not self.parts.secure.masks:
            compared = aggregation.of_round(self.parts.strategy, server, updates, after, round)
        for name in accepted:
            self.turns.last_rounds[name] = round
        last, every = round == self.experiment.rounds, self.experiment.evaluation.every
        measured = last or round % every == 0
        evaluation = self.turns.evaluate(after, round, tally) if measured else {}
        self._commit(after, round, names, began, tally, evaluation, moved, compared)
        return after

    def _charge(self, server: State, names: Sequence[str], round: int) -> None:
        try:
            self.turns.guard.charge(server, names, round)
        except OSError as error:
            raise checkpoint.unwritable(self.folder, error, round - 1) from error

    def _release(
        self, server: State, updates: Sequence[Update], round: int
    ) -> tuple[State, Sequence[Update]]:
        """What may be joined of the accepted replies."""
        schema = self.turns.schema(ClientInfo("any", 1), round)
        try:
            return self.turns.guard.release(server, updates, schema, round)
        except OSError as error:
            raise checkpoint.unwritable(self.folder, error, round - 1) from error

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
            Checkpoint(round, server, dict(self.turns.last_rounds)),
            self.experiment,
        )
        say(self.arm, "committed", f"round {round} committed", record=record)

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
        say(self.arm, "finished", "finished")
