"""Who is there: client names and the nodes that host them, learnt with one query.

Node ids are random and new at every start; everything else in FedTune knows clients by name.
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedtune import wire
from fedtune.cohorts import Cohort
from fedtune.config import NAME, CoordinatorSettings
from fedtune.errors import FedTuneError, RecipeError, RunError

QUERY_SECONDS = 600.0  # a node imports torch and reads its rows before it answers


@dataclass(frozen=True)
class Member:
    """A client as it describes itself.

    Attributes:
        name: its name.
        node: the node that hosts it.
        examples: its training rows, 0 where it withholds them.
        test_examples: its test rows.
        mix: its training rows a label, None where it withholds them or there are no labels.
        labels: the classes that its rows are encoded with.
        units: what record-level privacy protects: its training rows, or its patients.
        identity: its public key where updates are masked, in hexadecimal digits.
        manifest: the digest of its roster, likewise.
    """

    name: str
    node: int
    examples: int
    test_examples: int
    mix: dict[str, int] | None
    labels: tuple[str, ...]
    units: int = 0
    identity: str = ""
    manifest: str = ""


@dataclass(frozen=True)
class Roster:
    """The population.

    Attributes:
        members: the clients by name.
        refusals: reasons of the nodes that could not take part.
        nodes: those of a simulation, each of which can play any client; () for institutions.
        together: clients that such a node wants in one message.
    """

    members: dict[str, Member]
    refusals: tuple[str, ...] = ()
    nodes: tuple[int, ...] = ()
    together: int = 1

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, the same for all."""
        return next(iter(self.members.values())).labels

    def rows(self, name: str, kind: str) -> float:
        """A client's rows for "train" or "evaluate"."""
        member = self.members[name]
        return float(member.examples if kind == "train" else member.test_examples)

    def rank(self, name: str, dealt: Sequence[int]) -> int:
        """The rank of a client's adapter: its turn of those dealt in the order of names, or 0."""
        return dealt[list(self.members).index(name) % len(dealt)] if dealt else 0

    def to_json(self) -> dict[str, Any]:
        """For `roster.json`."""
        clients = [
            {
                "name": member.name,
                "examples": member.examples or None,
                "test_examples": member.test_examples,
                "mix": member.mix,
                "units": member.units or None,
            }
            for member in self.members.values()
        ]
        return {"labels": list(self.labels), "clients": clients}


def ask(grid: Grid, arm: str, settings: CoordinatorSettings) -> Roster:
    """The roster, once enough nodes have answered.

    Waits for every node of a simulation, or for `coordinator.minimum_clients` institutions.

    Raises:
        RecipeError: a node of a simulation, or every institution, refused the recipe or its data.
        RunError: too few nodes in `coordinator.wait_seconds`, a name twice, or different labels.
    """
    deadline = time.monotonic() + settings.wait_seconds
    members: dict[str, Member] = {}
    asked: set[int] = set()
    refusals: dict[int, str] = {}
    simulated = 0  # nodes of a simulation
    wanted: dict[int, int] = {}  # such a node -> clients that it wants in one message
    while True:
        new = sorted(set(grid.get_node_ids()) - asked)
        asked |= set(new)
        for node, reply in _replies(grid, new, arm):
            if reply.has_error():
                refusals[node] = reply.error.reason or "no reason given"
                continue
            try:
                simulated = max(simulated, _enter(members, wanted, node, reply))
            except (KeyError, TypeError, ValueError) as error:
                refusals[node] = f"its description is malformed ({type(error).__name__})"
        # Institutions may yet come; a simulation is whole once its nodes are there.
        complete = bool(simulated) or len(members) >= settings.minimum_clients
        if len(asked) >= max(1, simulated) and (complete if members else refusals):
            break
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    if refusals and (simulated or not members):
        # A simulation without some of its nodes would be one of another population.
        raise _error_of(next(iter(refusals.values())))
    _check(members, refusals, len(asked), max(1, simulated), settings)
    nodes, together = tuple(sorted(wanted)), min(wanted.values(), default=1)
    return Roster(dict(sorted(members.items())), tuple(refusals.values()), nodes, together)


def _replies(grid: Grid, nodes: Iterable[int], arm: str) -> Iterable[tuple[int, Message]]:
    config = ConfigRecord({"arm": arm})
    messages = [Message(RecordDict({wire.CONFIG: config}), n, "query.describe") for n in nodes]
    if not messages:
        return
    node_of: dict[str, int] = {}
    replies = []
    for reply in grid.send_and_receive(messages, timeout=QUERY_SECONDS):
        node_of.update({m.metadata.message_id: m.metadata.dst_node_id for m in messages})
        replies.append((node_of[reply.metadata.reply_to_message_id], reply))
    yield from sorted(replies, key=lambda pair: pair[0])


def _enter(members: dict[str, Member], wanted: dict[int, int], node: int, reply: Message) -> int:
    """Enter a node's clients; returns how many nodes its simulation has, 0 for an institution."""
    record = reply.content[wire.CONFIG]
    for about in json.loads(str(record["clients"])):
        name = str(about["name"])
        if not NAME.fullmatch(name):
            raise RunError(f"A client calls itself {name!r}; names must match {NAME.pattern}.")
        if name in members and members[name].node != node:
            raise RunError(f"Two nodes call themselves '{name}'. Give each its own client name.")
        members[name] = Member(
            name,
            node,
            int(about["examples"]),
            int(about["test_examples"]),
            about["mix"],
            tuple(about["labels"]),
            int(about.get("units", about["examples"])),
            bytes.fromhex(str(about.get("identity", ""))).hex(),
            bytes.fromhex(str(about.get("manifest", ""))).hex(),
        )
    nodes = int(str(record["nodes"]))
    if nodes:
        wanted[node] = max(1, int(str(record["together"])))
    return nodes


def _check(
    members: dict[str, Member],
    refusals: dict[int, str],
    nodes: int,
    expected: int,
    settings: CoordinatorSettings,
) -> None:
    reasons = "".join(f" A node refused: {reason}" for reason in refusals.values())
    if nodes < expected or len(members) < settings.minimum_clients:
        raise RunError(
            f"{len(members)} clients on {nodes} nodes; "
            f"{settings.minimum_clients} clients on {expected} nodes are needed.{reasons} Start "
            "the missing nodes, raise coordinator.wait_seconds or lower "
            "coordinator.minimum_clients."
        )
    first = members[min(members)]
    for _, member in sorted(members.items()):
        if member.labels != first.labels:
            raise RunError(f"'{first.name}' and '{member.name}' have different labels.")


def require_quorum(roster: Roster, cohort: Cohort, settings: CoordinatorSettings) -> None:
    """Refuse what could only fail after the first round was trained.

    Raises:
        RecipeError: a round asks fewer clients than must reply, or nobody has test rows.
    """
    drawn = cohort.most(len(roster.members))
    if settings.minimum_replies > drawn:
        raise RecipeError(
            f"coordinator.minimum_replies = {settings.minimum_replies}, but a round asks {drawn} "
            "clients at most. Lower it, or ask more."
        )
    if not any(member.test_examples for member in roster.members.values()):
        raise RecipeError(
            "No client has test rows, so nothing could be reported. Give the source a test file, "
            "or set data.test_fraction above 0."
        )


def _error_of(reason: str) -> FedTuneError:
    """A client's error under its own kind: a wrong recipe stays a wrong recipe."""
    kind, _, text = reason.partition(": ")
    return RecipeError(text) if kind == "RecipeError" else RunError(f"A node refused: {reason}")
