"""Attacks on what a client replies."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.adapter import State
from fedtune.attacks.attack import Key, Malicious, require, scaled
from fedtune.lowrank import Product, with_products
from fedtune.seeds import generator


@dataclass(frozen=True, kw_only=True)
class SignFlip(Malicious):
    """The change turned round and scaled: start - scale (trained - start)."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        super().__post_init__()
        require(0 < self.scale < math.inf, "scale must be above 0 and finite")

    def trained(self, start: State, trained: State, key: Key) -> State:
        return scaled(start, trained, -self.scale)


@dataclass(frozen=True, kw_only=True)
class ScaledUpdate(Malicious):
    """The change made `factor` times as large: model replacement.

    Bagdasaryan et al., "How To Backdoor Federated Learning", AISTATS 2020,
    https://arxiv.org/abs/1807.00459, equation 3.
    """

    factor: float = 10.0

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        super().__post_init__()
        require(0 < self.factor < math.inf, "factor must be above 0 and finite")

    def trained(self, start: State, trained: State, key: Key) -> State:
        return scaled(start, trained, self.factor)


@dataclass(frozen=True, kw_only=True)
class Gauge(Malicious):
    """(B, A) written as (B R, R^-1 A): the same model in other factors.

    R is drawn each round; its singular values are geometric, from sqrt(condition) to its inverse.
    Nothing that looks at products can see it, and an average of factors is spoiled all the same.
    """

    needs_factors: ClassVar[bool] = True
    condition: float = 100.0

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        super().__post_init__()
        require(1 <= self.condition <= 1e8, "condition must be between 1 and 1e8")

    def trained(self, start: State, trained: State, key: Key) -> State:
        def turned(module: str, product: Product) -> Product:
            rank = len(product.A)
            draws = generator(*key, "gauge", module)
            drawn = torch.randn(2, rank, rank, generator=draws, dtype=torch.float64)
            left, right = torch.linalg.qr(drawn)[0]
            edge = math.log10(self.condition) / 2
            values = torch.logspace(edge, -edge, rank, dtype=torch.float64)
            b, a = product.B.double(), product.A.double()
            return Product(b @ (left * values) @ right.T, (right / values) @ left.T @ a)

        return {**trained, "adapter": with_products(trained["adapter"], turned)}


@dataclass(frozen=True, kw_only=True)
class Alie(Malicious):
    """Each entry `z` standard deviations below the mean of the honest: within their spread.

    Baruch, Baruch and Goldberg, "A Little Is Enough: Circumventing Defenses For Distributed
    Learning", NeurIPS 2019, https://arxiv.org/abs/1902.06156. There the attackers estimate mean and
    deviation from their own rows; here they know them.
    """

    forges: ClassVar[bool] = True
    z: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        super().__post_init__()
        require(math.isfinite(self.z), "z must be finite")

    def forged(self, honest: Sequence[State]) -> State | None:
        def below(values: Tensor) -> Tensor:
            return values.mean(dim=0) - self.z * values.std(dim=0, correction=0)

        return _of_all(honest, below)


@dataclass(frozen=True, kw_only=True)
class InnerProduct(Malicious):
    """Minus `scale` times the mean of the honest, so that the joined change may point backwards.

    Xie, Koyejo and Gupta, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product
    Manipulation", UAI 2020, https://arxiv.org/abs/1903.03936. The attackers know the mean.
    """

    forges: ClassVar[bool] = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        super().__post_init__()
        require(0 < self.scale < math.inf, "scale must be above 0 and finite")

    def forged(self, honest: Sequence[State]) -> State | None:
        return _of_all(honest, lambda values: -self.scale * values.mean(dim=0))


def _of_all(states: Sequence[State], rule: Callable[[Tensor], Tensor]) -> State:
    return {
        group: {
            name: rule(torch.stack([state[group][name].double() for state in states])).to(
                tensor.dtype
            )
            for name, tensor in tensors.items()
        }
        for group, tensors in states[0].items()
    }
