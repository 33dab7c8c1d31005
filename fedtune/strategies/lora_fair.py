"""LoRA-FAIR: average both factors, and correct B towards the mean of the products.

Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement",
ICCV 2025, https://arxiv.org/abs/2411.14961. With D the mean of the products, A and B the means of
the factors and lambda the `regularizer`, B <- B + dB where dB minimises |D - (B + dB) A|^2 + lambda
|dB|^2: dB = (D - B A) A^T (A A^T + lambda I)^-1. Departure: the paper maximises a cosine by
gradient steps, which finds a direction and no length; the norm has this closed form.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedtune.adapter import State
from fedtune.combine import Combine
from fedtune.errors import RecipeError
from fedtune.lowrank import Product, residual, with_products
from fedtune.strategies.strategy import Strategy, Update, ended


@dataclass(frozen=True)
class LoRAFAIR(Strategy):
    """Between FedIT (a large regularizer) and the best B for the mean of A (none).

    Attributes:
        regularizer: lambda, beside the squares of A's entries.
    """

    admits_dora: ClassVar[bool] = False
    sums_only: ClassVar[bool] = False
    regularizer: float = 0.01

    def __post_init__(self) -> None:
        """Refuse what would reward a large correction."""
        if not self.regularizer >= 0:
            raise RecipeError(
                f"strategy lora_fair: regularizer = {self.regularizer} must be at least 0."
            )

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        after = super().aggregate(server, updates, combine, round)
        left = residual([ended(server, u) for u in updates], [u.weight for u in updates])

        def corrected(module: str, mean: Product) -> Product:
            if module not in left:
                return mean
            A = mean.A.double()
            gram = A @ A.T + self.regularizer * torch.eye(len(A), dtype=A.dtype)
            # A pseudo-inverse: without a regularizer the rows of A may be dependent.
            inverse = torch.linalg.pinv(gram, hermitian=True)
            change = left[module].B @ (left[module].A @ A.T) @ inverse
            return Product(mean.B.double() + change, A)

        return {**after, "adapter": with_products(after["adapter"], corrected)}
