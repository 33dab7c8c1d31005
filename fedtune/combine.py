"""How the deltas of a cohort are joined into one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.adapter import Adapter, weighted_mean


@dataclass(frozen=True)
class Combine(ABC):
    """A rule from several adapters to one."""

    @abstractmethod
    def __call__(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        """One adapter of the same names and shapes, from at least one, sorted by client name."""


@dataclass(frozen=True)
class Mean(Combine):
    """The weighted mean: FedAvg. McMahan et al. 2017, https://arxiv.org/abs/1602.05629."""

    def __call__(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        return weighted_mean(adapters, weights)


COMBINES: dict[str, type[Combine]] = {"mean": Mean}
