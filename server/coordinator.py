"""The round loop.

One coordinator runs one arm: the recipe's own strategy, or a reference beside it. A round draws a
    cohort, sends each client its broadcast, passes every reply through the gate, joins what was
    accepted in the order of client names, and commits. A bad reply is set aside with its reason and
    the round goes on without it.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedtune import adapter, models, parts, wire
from fedtune.adapter import Adapter, State
from fedtune.config import Experiment
from fedtune.errors import RecipeError, RunError
from fedtune.heads import HeadRule
from fedtune.records import Rejection, RoundRecord, Sums
from fedtune.strategies.strategy import ClientInfo, Update
from fedtune.wire import Address, RejectedError
from server import checkpoint, roster
from server.checkpoint import Checkpoint
from server.roster import Roster

log = logging.getLogger("fedtune")


@dataclass
class Tally:
    """What one round moved and set aside."""

    bytes_down: int = 0
    bytes_up: int = 0
    bytes_evaluation: int = 0
    train: dict[str, Sums] = field(default_factory=dict)
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
        self.roster = Roster({})
        self.initial: State = {}
        self.metrics: dict[str, int] = {}
        self.last_rounds: dict[str, int] = {}

    def run(self) -> None:
        """Run every round that is not yet committed, then write the result.

        Raises:
            RecipeError: the recipe, its data or its folder do not fit.
            RunError: a round had too few replies, or the folder cannot be written.
        """
        e = self.experiment
        self.roster = roster.ask(self.grid, self.arm, e.coordinator)
        for reason in self.roster.refusals:
            log.warning("a node does not take part: %s", reason)
        self._require_quorum()
        self._say("roster", f"{len(self.roster.members)} clients", rounds=e.rounds)
        self.metrics = self.parts.task.metrics(self.roster.labels)
        model = models.load(self.parts.task, e.model, e.adapter, self.roster.labels, e.seed)
        self.initial = models.initial(model, e.seed)
        start = checkpoint.latest(self.folder / "checkpoint", e) or self._begin()
        self.last_rounds = start.last_rounds
        self._keep_records(start.round)
        server = start.state
        for round in range(start.round + 1, e.rounds + 1):
            server = self._round(server, round)
        self._finish(server)

    def _require_quorum(self) -> None:
        """Refuse what could only fail after the first round was trained."""
        members, needed = self.roster.members, self.experiment.coordinator.minimum_replies
        drawn = self.parts.cohort.most(len(members))
        if needed > drawn:
            raise RecipeError(
                f"coordinator.minimum_replies = {needed}, but a round asks {drawn} clients at "
                "most. Lower it, or ask more."
            )
        if not any(member.test_examples for member in members.values()):
            raise RecipeError(
                "No client has test rows, so nothing could be reported. Give the source a test "
                "file, or set data.test_fraction above 0."
            )

    def _begin(self) -> Checkpoint:
        """Commit round 0: the state before training, and how good the untuned model is."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.replace_text(self.folder / "experiment.toml", self.experiment.text())
            checkpoint.write_json(self.folder / "roster.json", self.roster.to_json())
        except OSError as error:
            raise checkpoint.unwritable(self.folder, error, -1) from error
        server = self.parts.strategy.start(self.initial["adapter"])
        if "head" in self.initial:
            server = {**server, "head": self.initial["head"]}
        began, tally = time.monotonic(), Tally()
        evaluation = self._evaluate(server, 0, tally)
        self._commit(server, 0, [], began, tally, evaluation, 0.0)
        return Checkpoint(0, server, {})

    def _keep_records(self, last: int) -> None:
        """Drop records of rounds that were not committed: they will be run again."""
        path = self.folder / "rounds.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = []
        for line in lines:
            try:
                committed = json.loads(line)["round"] <= last
            except (ValueError, KeyError):
                continue  # cut short by a crash
            if committed:
                kept.append(line + "\n")
        checkpoint.replace_text(path, "".join(kept))

    def _round(self, server: State, round: int) -> State:
        began, tally = time.monotonic(), Tally()
        names = self.parts.cohort.draw(list(self.roster.members), round, self.experiment.seed)
        self._say("round", f"round {round}", round=round, cohort=names)
        updates = self._collect(server, names, round, tally)
        needed = self.experiment.coordinator.minimum_replies
        if names and len(updates) < needed:
            reasons = "; ".join(f"{r.client}: {r.reason.rstrip('.')}" for r in tally.rejected)
            raise RunError(
                f"Round {round}: {len(updates)} of {len(names)} replies were accepted, {needed} "
                f"are needed (coordinator.minimum_replies). {reasons}. Nothing of this round was "
                "kept; run the same command again to repeat it."
            )
        after = self._aggregate(server, updates, round) if updates else server
        moved = adapter.norm(adapter.subtract(after["adapter"], server["adapter"]))
        for update in updates:
            self.last_rounds[update.client] = round
        last, every = round == self.experiment.rounds, self.experiment.evaluation.every
        evaluation = self._evaluate(after, round, tally) if last or round % every == 0 else {}
        self._commit(after, round, names, began, tally, evaluation, moved)
        return after

    def _aggregate(self, server: State, updates: Sequence[Update], round: int) -> State:
        after = self.parts.strategy.aggregate(server, updates, self.parts.combine, round)
        if self.head.shared and "head" in server:
            heads = [update.state["head"] for update in updates]
            mean = self.parts.combine(heads, [update.weight for update in updates])
            after = {**after, "head": adapter.add(server["head"], mean)}
        return after

    def _broadcast(self, server: State, name: str, round: int) -> State:
        info = ClientInfo(name, self.roster.members[name].examples, self.last_rounds.get(name, 0))
        sent = self.parts.strategy.broadcast(server, info, round)
        own_head = self.head.trained and not self.head.shared and info.last_round
        if "head" in server and not own_head:
            sent = {**sent, "head": server["head"]}
        return sent

    def _messages(
        self, kind: str, server: State, names: Sequence[str], round: int, scope: str = "own"
    ) -> dict[str, tuple[Address, Message]]:
        # What all receive is serialised once. The tensors are kept beside it: while they live, no
        # other client's tensors can have their id.
        packed: dict[int, tuple[Adapter, ArrayRecord]] = {}
        messages = {}
        for name in names:
            last = self.last_rounds.get(name, 0)
            address = Address(self.run_id, self.arm, round, name, last, scope)
            state = self._broadcast(server, name, round)
            for group, tensors in state.items():
                if id(tensors) not in packed:
                    packed[id(tensors)] = (tensors, wire.pack({group: tensors})[group])
            arrays = {group: packed[id(tensors)][1] for group, tensors in state.items()}
            content = RecordDict({wire.CONFIG: address.record(), **arrays})
            node = self.roster.members[name].node
            messages[name] = (address, Message(content, node, kind, group_id=str(round)))
        return messages

    def _replies(
        self, kind: str, messages: dict[str, tuple[Address, Message]], tally: Tally
    ) -> dict[str, RecordDict]:
        """Contents by client name, errors and silence set aside; an unasked or second reply too."""
        down = sum(wire.size(message.content) for _, message in messages.values())
        if kind == "train":
            tally.bytes_down += down
        else:
            tally.bytes_evaluation += down
        contents: dict[str, RecordDict] = {}
        timeout = self.experiment.coordinator.timeout_seconds
        sent = [message for _, message in messages.values()]
        for reply in self.grid.send_and_receive(sent, timeout=timeout):
            asked = {m.metadata.message_id: name for name, (_, m) in messages.items()}
            name = asked.get(reply.metadata.reply_to_message_id, "")
            if not name or name in contents:
                reason = "a second reply" if name else "a reply that nobody asked for"
                self._reject(tally, name or "unknown", "E_REPLAY", reason)
            elif reply.has_error():
                self._reject(tally, name, "E_CLIENT", reply.error.reason or "no reason given")
            else:
                contents[name] = reply.content
                tally.bytes_up += wire.size(reply.content)
                self._say("reply", f"{name} answered", client=name, kind=kind)
        answered = contents.keys() | {rejection.client for rejection in tally.rejected}
        for name in messages.keys() - answered:
            self._reject(tally, name, "E_TIMEOUT", f"no reply in {timeout:.0f} s")
        return contents

    def _reject(self, tally: Tally, client: str, code: str, reason: str) -> None:
        tally.rejected.append(Rejection(client, code, reason))
        self._say("rejected", f"{client}: {code}: {reason}", client=client, level=logging.WARNING)

    def _collect(
        self, server: State, names: Sequence[str], round: int, tally: Tally
    ) -> list[Update]:
        """Accepted updates, sorted by client name."""
        messages = self._messages("train", server, names, round)
        contents = self._replies("train", messages, tally)
        schema = self.parts.strategy.payload(self.initial["adapter"], round)
        if self.head.shared and "head" in self.initial:
            schema = {**schema, "head": self.initial["head"]}
        updates = []
        for name in sorted(contents):
            address = messages[name][0]
            try:
                examples = self.roster.members[name].examples
                state, count = wire.gate(contents[name], address, schema, examples)
                sums = wire.gate_metrics(contents[name], address, self.metrics)
            except RejectedError as error:
                self._reject(tally, name, error.code, error.reason)
                continue
            weight = float(count) if self.experiment.weighting == "examples" else 1.0
            updates.append(Update(name, weight, state))
            tally.train[name] = {k: v for k, v in sums.items() if len(v) == 2}
        return updates

    def _evaluate(self, server: State, round: int, tally: Tally) -> dict[str, dict[str, Sums]]:
        """Metrics on own test rows, and for personal models in the last round on pooled ones."""
        last = round == self.experiment.rounds
        scopes = ["own"]
        tested = [name for name, member in self.roster.members.items() if member.test_examples]
        if last and tested and self.parts.strategy.personal and len(self.roster.members) > 1:
            scopes.append("pooled")
        evaluation: dict[str, dict[str, Sums]] = {}
        for scope in scopes:
            names = tested if scope == "own" else list(self.roster.members)
            messages = self._messages("evaluate", server, names, round, scope)
            contents = self._replies("evaluate", messages, tally)
            evaluation[scope] = {}
            for name in sorted(contents):
                try:
                    sums = wire.gate_metrics(contents[name], messages[name][0], self.metrics)
                except RejectedError as error:
                    self._reject(tally, name, error.code, error.reason)
                    continue
                evaluation[scope][name] = sums
            if last and scope == "own":
                self._keep_samples(contents)
        return evaluation

    def _keep_samples(self, contents: dict[str, RecordDict]) -> None:
        samples = [
            {"client": name, "prompt": prompt, "answer": answer, "reference": reference}
            for name, content in sorted(contents.items())
            for prompt, answer, reference in wire.samples_of(content)
        ]
        if samples:
            checkpoint.write_json(self.folder / "samples.json", list(samples))

    def _commit(
        self,
        server: State,
        round: int,
        cohort: Sequence[str],
        began: float,
        tally: Tally,
        evaluation: dict[str, dict[str, Sums]],
        moved: float,
    ) -> None:
        record = RoundRecord(
            round=round,
            cohort=list(cohort),
            seconds=time.monotonic() - began,
            bytes_down=tally.bytes_down,
            bytes_up=tally.bytes_up,
            bytes_evaluation=tally.bytes_evaluation,
            train=tally.train,
            rejected=tally.rejected,
            evaluation=evaluation,
            update_norm=moved,
        )
        path = self.folder / "rounds.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(record.to_json() + "\n")
        except OSError as error:
            raise checkpoint.unwritable(self.folder, error, round - 1) from error
        checkpoint.commit(
            self.folder / "checkpoint",
            Checkpoint(round, server, dict(self.last_rounds)),
            self.experiment,
        )
        self._say("committed", f"round {round} committed", record=record)

    def _finish(self, server: State) -> None:
        """Write the adapter, unless every client has its own."""
        if not self.parts.strategy.personal:
            e = self.experiment
            model = models.load(self.parts.task, e.model, e.adapter, self.roster.labels, e.seed)
            tensors: dict[str, Adapter] = {"adapter": server["adapter"]}
            if "head" in server:
                tensors["head"] = server["head"]
            try:
                models.save(model, tensors, self.folder / "adapter")
            except OSError as error:
                raise checkpoint.unwritable(self.folder, error, e.rounds) from error
        self._say("finished", "finished")

    def _say(self, event: str, text: str, level: int = logging.INFO, **facts: object) -> None:
        """Log a line; `record.event` has the same as data, for a progress view."""
        arm = f"[{self.arm}] " if self.arm else ""
        told = {"event": event, "arm": self.arm, **facts}
        log.log(level, "%s%s", arm, text, extra={"event": told})
