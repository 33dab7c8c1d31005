"""Rules of coordinates: each entry by itself, where an entry means the same at every client.

With one factor frozen and shared that is so; with both trained it is not: (B R)(R^-1 A) is the same
model. None of them uses the weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.adapter import Adapter
from fedtune.combine import robust
from fedtune.combine.combine import Combine, Family, at_least


@dataclass(frozen=True)
class Median(Combine):
    """The median of each coordinate; of an even number, the mean of the two in the middle.

    Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018, https://arxiv.org/abs/1803.01498.
    Ignores weights.
    """

    family: ClassVar[Family] = "coordinates"

    def __call__(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        return _each(adapters, lambda values: _middle(values.sort(dim=0).values))


@dataclass(frozen=True)
class TrimmedMean(Combine):
    """The unweighted mean of each coordinate without its largest and smallest values.

    Yin et al. 2018. At each end floor(`fraction` K) are dropped, and so many malicious clients are
    borne. Ignores weights.
    """

    family: ClassVar[Family] = "coordinates"
    fraction: float = 0.2

    def __post_init__(self) -> None:
        """Refuse to drop everything."""
        if not 0 <= self.fraction < 0.5:
            raise ValueError("fraction must be at least 0 and below 0.5")

    def __call__(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        dropped = int(self.fraction * len(adapters) + 1e-9)

        def trimmed(values: Tensor) -> Tensor:
            return values.sort(dim=0).values[dropped : len(values) - dropped].mean(dim=0)

        return _each(adapters, trimmed)


@dataclass(frozen=True)
class Nearest(Combine):
    """Per coordinate, the mean of the `kept` values nearest to the median of chosen clients'."""

    family: ClassVar[Family] = "coordinates"
    chosen: tuple[int, ...]
    kept: int

    def __call__(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        def nearest(values: Tensor) -> Tensor:
            ordered = values.sort(dim=0).values
            away = (ordered - _middle(ordered)).abs()
            near = away.argsort(dim=0, stable=True)[: self.kept]
            return ordered.gather(0, near).mean(dim=0)

        return _each([adapters[i] for i in self.chosen], nearest)


@dataclass(frozen=True)
class Bulyan(Combine):
    """Krum over and over until K - 2 f are chosen, then their values nearest to the median.

    El Mhamdi, Guerraoui and Rouault, "The Hidden Vulnerability of Distributed Learning in
    Byzantium", ICML 2018, https://arxiv.org/abs/1802.07927. Of the theta = K - 2 f values of a
    coordinate, theta - 2 f are averaged. Ignores weights.
    """

    family: ClassVar[Family] = "coordinates"
    malicious: int = 1

    def __post_init__(self) -> None:
        """Refuse a negative count."""
        at_least("malicious", self.malicious, 0)

    @property
    def fewest(self) -> int:
        return 4 * self.malicious + 3

    def decided(self, gram: Callable[[], Tensor], clients: Sequence[str]) -> Combine:
        super().decided(gram, clients)
        chosen = robust.bulyan_choice(robust.squared_distances(gram()), self.malicious)
        return Nearest(tuple(chosen), len(chosen) - 2 * self.malicious)

    def __call__(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        raise ValueError("bulyan must be decided for its round before it joins")


def _each(adapters: Sequence[Adapter], rule: Callable[[Tensor], Tensor]) -> Adapter:
    """`rule` from (clients, ...) to (...) in float64, for each tensor."""
    return {
        name: rule(torch.stack([a[name].double() for a in adapters])).to(tensor.dtype)
        for name, tensor in adapters[0].items()
    }


def _middle(ordered: Tensor) -> Tensor:
    count = len(ordered)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
