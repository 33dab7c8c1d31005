"""The way from what clients trained to what leaves, in miniature: a run's own code on few numbers.

A bound and a noise do not depend on how many numbers there are, so a handful under the run's own
names is enough, and thousands of releases take seconds. A path is cut in two, so that a test can
put a fault into either: what depends on the secret key (`released`), and what does not
(`collected`).
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedtune.adapter import State, digest
from fedtune.config import Experiment
from fedtune.heads import HeadRule
from fedtune.parts import Parts
from fedtune.privacy import central, clipping, steps
from fedtune.privacy.clipping import BOUND, CLIP
from fedtune.privacy.mechanism import Mechanism
from fedtune.strategies.strategy import ClientInfo, Plan, Turn, Update
from server import joining

RUN, ROUND = "audit", 1
Vectors = dict[str, Tensor]  # name -> flat


@dataclass(frozen=True)
class Trained:
    """A client, or a row, after its part of the work.

    Attributes:
        name: of the client.
        examples: training rows, as it says.
        change: name -> what its training added to a tensor; for a row, its gradient.
    """

    name: str
    examples: int
    change: Mapping[str, Tensor]


@dataclass(frozen=True)
class Released:
    """What leaves in one draw.

    Attributes:
        mean: the noisy mean, whose noise is promised number by number.
        more: all else that is told: the model made of it, a clip, metrics.
    """

    mean: Vectors
    more: Vectors = field(default_factory=dict)


@dataclass(frozen=True)
class Path(ABC):
    """A release path.

    Attributes:
        mechanism: what it promises.
        shapes: of the tensors that training changes.
    """

    mechanism: Mechanism
    shapes: Mapping[str, torch.Size]

    @abstractmethod
    def collected(self, clients: Sequence[Trained]) -> Any:
        """What is released of these clients, before noise.

        Raises:
            FloatingPointError: the path refuses a client, and nothing leaves.
        """

    @abstractmethod
    def released(self, collected: Any, key: bytes) -> Released:
        """One release of it with the noise of a key."""


@dataclass(frozen=True)
class Central(Path):
    """Client mode: each change bounded at its client, the sum noised and joined at the coordinator.

    Attributes:
        experiment: the run's.
        parts: its parts.
        server: the coordinator's state before the round.
    """

    experiment: Experiment
    parts: Parts
    server: State

    def collected(self, clients: Sequence[Trained]) -> tuple[list[Update], str]:
        updates = [update for client in clients if (update := self.update(client))]
        return updates, central.inputs_hash(updates, repr(self.clip), repr(self.mechanism))

    def released(self, collected: tuple[list[Update], str], key: bytes) -> Released:
        done = self.mean(*collected, key)
        before = {**self.server, CLIP: {CLIP: torch.tensor(done.clip)}}
        after = joining.join(self.parts, before, [done.update], ROUND)
        more = {"model": _moved(before, after), "clip": torch.tensor([done.clip])}
        return Released(vectors(done.update.state), more)

    @property
    def clip(self) -> float:
        """C of the round."""
        return clipping.clip_of(self.server, self.experiment.privacy)

    def update(self, client: Trained) -> Update | None:
        """A client's reply, None where its change is refused."""
        turn, plan = self.turn(client)
        trained = {
            group: {n: t + client.change[n] if n in client.change else t for n, t in own.items()}
            for group, own in plan.start.items()
        }
        sent, _ = self.parts.strategy.reply(turn, plan, trained)
        rule = HeadRule.of(self.parts.task, self.parts.strategy)
        head, _ = rule.reply(plan.start.get("head", {}), trained.get("head", {}))
        try:
            bounded = clipping.bounded({**sent, **head}, turn.received, self.experiment.privacy)
        except FloatingPointError:
            return None
        return Update(client.name, self.weight(client), bounded)

    def weight(self, client: Trained) -> float:
        """Of the client in the mean."""
        return float(client.examples) if self.experiment.weighting == "examples" else 1.0

    def mean(self, updates: Sequence[Update], inputs: str, key: bytes) -> central.Release:
        """The noisy mean of replies."""
        schema = {g: t for g, t in self.schema().items() if g != BOUND}
        settings = self.experiment.privacy
        return central.release(
            updates, schema, self.mechanism, settings, self.clip, key, RUN, ROUND, inputs
        )

    def turn(self, client: Trained) -> tuple[Turn, Plan]:
        """What a client begins with."""
        info = ClientInfo(client.name, client.examples)
        received = self.parts.strategy.broadcast(self.server, info, ROUND)
        turn = Turn(ROUND, {**received, **_kept(self.server, "head", CLIP)}, {})
        plan = self.parts.strategy.plan(turn)
        head = HeadRule.of(self.parts.task, self.parts.strategy).start(turn.received, {})
        return turn, replace(plan, start={**plan.start, "head": head}) if head else plan

    def schema(self) -> State:
        """Tensors of the names and shapes that a client sends."""
        payload = self.parts.strategy.payload(self.server["adapter"], ClientInfo("any", 1), ROUND)
        shared = HeadRule.of(self.parts.task, self.parts.strategy).shared
        return {**payload, **(_kept(self.server, "head") if shared else {})}


@dataclass(frozen=True)
class Local(Path):
    """Local mode: a client's change with its own noise is what leaves."""

    def collected(self, clients: Sequence[Trained]) -> State:
        (only,) = clients
        clipping.clipped({"delta": dict(only.change)}, self.mechanism.clip)  # refuses what has none
        return {"delta": dict(only.change)}

    def released(self, collected: State, key: bytes) -> Released:
        sent = clipping.noised(collected, self.mechanism, key, RUN, "", ROUND, "canary")
        return Released(vectors(sent))


@dataclass(frozen=True)
class Step(Path):
    """Record mode: one noisy step over the gradients of rows."""

    def collected(self, clients: Sequence[Trained]) -> tuple[dict[str, Tensor], str]:
        total = steps.ClippedSum(self.shapes, self.mechanism.clip)
        rows = {n: torch.stack([c.change[n].flatten() for c in clients]) for n in self.shapes}
        count = len(clients)
        total.add(rows, steps.Chunk(0, count, tuple(range(count)), count, closes=True))
        return total.total, digest({"rows": rows})

    def released(self, collected: tuple[dict[str, Tensor], str], key: bytes) -> Released:
        total, inputs = collected
        own = self.mechanism
        private = steps.Steps(own.clip, own.denominator, own.sigma, key, (RUN, ROUND, inputs))
        return Released(vectors({"step": private.noised(total, 0)}))


def vectors(state: State) -> Vectors:
    """The tensors of a state, flat, by name; in the groups' order."""
    return {name: t.flatten() for own in state.values() for name, t in own.items()}


def directions(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """A unit vector with equal parts of every tensor: of norm 1 over all of them together."""
    found = {}
    for name, shape in shapes.items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
        draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        found[name] = draw / draw.norm() / math.sqrt(len(shapes))
    return found


def _kept(state: State, *groups: str) -> State:
    return {group: state[group] for group in groups if group in state}


def _moved(before: State, after: State) -> Tensor:
    """How far the model's tensors moved, those of a changed shape left out."""
    parts = [
        (after[group][name] - tensor).flatten()
        for group in ("adapter", "head")
        for name, tensor in before.get(group, {}).items()
        if after[group][name].shape == tensor.shape
    ]
    return torch.cat(parts)
