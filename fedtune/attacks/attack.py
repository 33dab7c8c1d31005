"""What malicious clients of a simulation do, to measure what a combine rule withstands.

An attack may change a client's rows before they are encoded, what it trained before it replies, or
forge replies from all honest ones: the coordinator of a simulation then plays an adversary who sees
everything, which real ones can only estimate. The malicious clients are the last by name, so that a
study has the same ones under every strategy and seed, and who is trusted can be named. An
institution refuses a recipe with an attack.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from datasets import Dataset

from fedtune.adapter import State
from fedtune.records import Sums
from fedtune.strategies.strategy import Update

Key = tuple[int | str, ...]


@dataclass(frozen=True)
class Labelled:
    """Where a task's rows have their text and label, and which labels there are."""

    text: str
    label: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Attack:
    """The interface, whose defaults do nothing.

    Class attributes:
        needs_labels: whether rows must have classes.
        needs_factors: whether clients must send both factors in one round.
        forges: whether it makes replies out of the honest ones.
        metrics: what it measures on test rows, and of how many numbers that consists.
    """

    needs_labels: ClassVar[bool] = False
    needs_factors: ClassVar[bool] = False
    forges: ClassVar[bool] = False
    metrics: ClassVar[dict[str, int]] = {}

    @property
    def count(self) -> int:
        """How many clients are malicious."""
        return 0

    def malicious(self, clients: Sequence[str]) -> frozenset[str]:
        """The last of a whole population by name."""
        return frozenset(sorted(clients)[len(clients) - self.count :])

    def shortage(self, clients: Sequence[str]) -> str:
        """Why this population cannot be attacked, "" where it can."""
        if self.count and self.count >= len(clients):
            return f"{self.count} of {len(clients)} clients would be malicious, and none honest"
        return ""

    def rows(self, rows: Dataset, where: Labelled, key: Key) -> Dataset:
        """A malicious client's training rows; `key` seeds its draws."""
        return rows

    def triggered(self, rows: Dataset, where: Labelled) -> Dataset:
        """Test rows whose accuracy is the attack's success."""
        return rows.select([])

    def measured(self, sums: Sums) -> Sums:
        """The attack's metrics from the task's sums over triggered rows, {} for none."""
        return {}

    def trained(self, start: State, trained: State, key: Key) -> State:
        """What a malicious client replies about, in the place of what it trained from `start`."""
        return trained

    def forged(self, honest: Sequence[State]) -> State | None:
        """What every malicious client sends instead of its own, made of the honest replies."""
        return None


@dataclass(frozen=True)
class NoAttack(Attack):
    """Everybody is honest."""


@dataclass(frozen=True, kw_only=True)
class Malicious(Attack):
    """An attack by some clients.

    Attributes:
        clients: how many, the last by name.
    """

    clients: int = 1

    def __post_init__(self) -> None:
        """Refuse an attack by nobody."""
        require(self.clients >= 1, "clients must be at least 1")

    @property
    def count(self) -> int:
        return self.clients


def require(holds: bool, message: str) -> None:
    """Refuse a field, with a ValueError."""
    if not holds:
        raise ValueError(message)


def scaled(start: State, trained: State, factor: float) -> State:
    """Start + factor (trained - start), tensor by tensor."""
    return {
        group: {
            name: start[group][name] + factor * (tensor - start[group][name])
            for name, tensor in tensors.items()
        }
        for group, tensors in trained.items()
    }


def colluded(updates: Sequence[Update], attack: Attack, population: Sequence[str]) -> list[Update]:
    """A round's updates, those of malicious clients forged where the attack does so."""
    malicious = attack.malicious(population)
    honest = [update.state for update in updates if update.client not in malicious]
    forged = attack.forged(honest) if honest else None
    if forged is None:
        return list(updates)
    return [replace(u, state=forged) if u.client in malicious else u for u in updates]
