"""FedSVD: train B, and make A's rows orthonormal again each round.

Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", 2025,
https://arxiv.org/abs/2505.12805. With A frozen the mean of B is exact, as in FFA-LoRA; then
U S V^T = svd(B A) gives B <- U S and A <- V^T, the same product in better coordinates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.adapter import State
from fedtune.combine import EVERY, Combine, Family
from fedtune.lowrank import Product, truncate, with_products
from fedtune.strategies.strategy import Strategy, Update


@dataclass(frozen=True)
class FedSVD(Strategy):
    """Only B is trained and shared; the coordinator turns both factors."""

    combines: ClassVar[frozenset[Family]] = EVERY
    admits_dora: ClassVar[bool] = False
    fixed_frame: ClassVar[bool] = False

    def trains(self, name: str, round: int) -> bool:
        return "lora_A" not in name

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        after = super().aggregate(server, updates, combine, round)
        return {**after, "adapter": with_products(after["adapter"], _turned)}


def _turned(module: str, product: Product) -> Product:
    """The same product; A is left alone where the SVD would fill it with arbitrary directions."""
    rank = len(product.A)
    turned = truncate(product, rank, balanced=False)
    full = float(turned.B.norm(dim=0).min()) > 1e-9 * float(turned.B.norm())
    return turned if full else product
