"""How the deltas of a cohort are joined into one.

There are three families, and a strategy says which have a meaning for it (`Strategy.combines`).
The mean is a weighted sum. A rule of distances chooses a coefficient for each client from the
cohort's Gram matrix alone, so it works on products of factors as on coordinates. A rule of
coordinates looks at each entry by itself, which needs entries that mean the same at every client. A
robust rule gives every client one vote: it ignores the weights, since the number of examples is
what a client says of itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedtune.adapter import Adapter, weighted_mean

Family = Literal["mean", "distances", "coordinates"]
MEAN: frozenset[Family] = frozenset({"mean"})
DISTANCES: frozenset[Family] = frozenset({"mean", "distances"})
EVERY: frozenset[Family] = frozenset({"mean", "distances", "coordinates"})


@dataclass(frozen=True)
class Combine(ABC):
    """A rule from several adapters to one.

    Class attributes:
        family: what it looks at.
    """

    family: ClassVar[Family]

    @property
    def fewest(self) -> int:
        """The fewest clients that it can join."""
        return 1

    @property
    def trusted(self) -> str:
        """The client that must take part in every round, "" for none."""
        return ""

    def shortage(self, clients: Sequence[str]) -> str:
        """Why these clients cannot be joined, "" where they can."""
        if len(clients) < self.fewest:
            return f"it needs {self.fewest} clients in every round, and here are {len(clients)}"
        if self.trusted and self.trusted not in clients:
            return f"it trusts client '{self.trusted}', who is not among {', '.join(clients)}"
        return ""

    def decided(self, gram: Callable[[], Tensor], clients: Sequence[str]) -> "Combine":
        """The rule with its choice among a round's clients made, for whatever they sent.

        Args:
            gram: gives the Gram matrix of all that they sent, (clients, clients) float64.
            clients: their names, in the order of the matrix.

        Raises:
            ValueError: these clients cannot be joined (see `shortage`).
        """
        if reason := self.shortage(clients):
            raise ValueError(reason)
        return self

    @abstractmethod
    def __call__(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        """One adapter of the same names and shapes, from at least one, sorted by client name."""


@dataclass(frozen=True)
class Mean(Combine):
    """The weighted mean: FedAvg. McMahan et al. 2017, https://arxiv.org/abs/1602.05629."""

    family: ClassVar[Family] = "mean"

    def __call__(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        return weighted_mean(adapters, weights)


@dataclass(frozen=True)
class Chosen(Combine):
    """sum_i c_i x_i with coefficients that were chosen before; a single 1 gives x_i bit for bit."""

    family: ClassVar[Family] = "distances"
    coefficients: tuple[float, ...]

    def __call__(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        terms = [(a, c) for a, c in zip(adapters, self.coefficients, strict=True) if c]
        joined = {}
        for name, tensor in adapters[0].items():
            parts = [adapter[name].double() * c for adapter, c in terms]
            total = sum(parts[1:], start=parts[0]) if parts else torch.zeros_like(tensor)
            joined[name] = total.to(tensor.dtype)
        return joined


@dataclass(frozen=True)
class Distances(Combine):
    """A rule that gives each client a coefficient, from inner products alone."""

    family: ClassVar[Family] = "distances"

    @abstractmethod
    def coefficients(self, gram: Tensor, clients: Sequence[str]) -> Tensor:
        """The coefficient of each client, (clients,) float64, from their Gram matrix."""

    def decided(self, gram: Callable[[], Tensor], clients: Sequence[str]) -> Combine:
        super().decided(gram, clients)
        return Chosen(tuple(self.coefficients(gram(), clients).tolist()))

    def __call__(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        raise ValueError("a rule of distances must be decided for its round before it joins")


def at_least(field: str, value: int, least: int) -> None:
    """Refuse, with a ValueError, a field below its least value."""
    if value < least:
        raise ValueError(f"{field} must be at least {least}")


def above(field: str, value: float, bound: float) -> None:
    """Refuse, with a ValueError, a field at its bound, below it or not finite."""
    if not bound < value < float("inf"):
        raise ValueError(f"{field} must be above {bound:g} and finite")
