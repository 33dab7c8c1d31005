"""FedRot-LoRA: turn each client's factors towards the common ones before they are averaged.

Zhang et al., "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA", 2026,
https://arxiv.org/abs/2602.23638. (B R)(R^T A) = B A for every orthogonal R, so clients may write
one change in different coordinates, and means of factors then cancel. In odd rounds the rotation R*
brings A nearest to the broadcast one, in even rounds B (orthogonal Procrustes, without
reflections); R is the orthogonal part of (1 - lambda) I + lambda R*, with lambda the `strength`,
and R^T A and B R are sent. The reference is the adapter that the round began with, which every
client has.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.adapter import State
from fedtune.combine import DISTANCES, Family
from fedtune.errors import RecipeError
from fedtune.lowrank import Product, products, with_products
from fedtune.strategies.strategy import Plan, Strategy, Turn


@dataclass(frozen=True)
class FedRot(Strategy):
    """FedIT on factors that were rotated by their clients; no product changes.

    Attributes:
        strength: lambda; 0 is FedIT, 1 the whole rotation.
    """

    combines: ClassVar[frozenset[Family]] = DISTANCES
    strength: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 <= self.strength <= 1:
            raise RecipeError(f"strategy fedrot: strength = {self.strength} must be in [0, 1].")

    def reply(self, turn: Turn, plan: Plan, trained: State) -> tuple[State, State]:
        if self.strength == 0:
            return super().reply(turn, plan, trained)
        first = dict(products(plan.start["adapter"]))

        def turned(module: str, own: Product) -> Product:
            A, B = own.A.double(), own.B.double()
            common = first[module]
            M = common.A.double() @ A.T if turn.round % 2 else common.B.double().T @ B
            R = self._rotation(M)
            return Product(B @ R, R.T @ A)

        rotated = with_products(trained["adapter"], turned)
        return super().reply(turn, plan, {**trained, "adapter": rotated})

    def _rotation(self, M: Tensor) -> Tensor:
        """R (r, r) from M = A_ref A^T or B_ref^T B; no rotation where M tells none."""
        unit = torch.eye(len(M), dtype=M.dtype)
        if not M.any():
            return unit
        U, _, Vt = torch.linalg.svd(M)
        signs = torch.ones(len(M), dtype=M.dtype)
        signs[-1] = torch.linalg.det(Vt.T @ U.T).sign()
        whole = Vt.T @ (signs.unsqueeze(1) * U.T)
        left, _, right = torch.linalg.svd((1 - self.strength) * unit + self.strength * whole)
        soft: Tensor = left @ right
        return soft
