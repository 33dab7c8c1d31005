"""FlexLoRA of which only sums are seen: the mean of the products comes from sketches.

Bai et al. 2024, https://arxiv.org/abs/2402.11505, see flexlora.py; sketches: sketched.py. All
clients have the adapter's own rank: behind masks only equal tensors add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.adapter import State
from fedtune.combine import Combine
from fedtune.lowrank import Product, truncate, with_products
from fedtune.strategies.sketched import Sketched
from fedtune.strategies.strategy import Update


@dataclass(frozen=True)
class FlexLoRASum(Sketched):
    """The best approximation of the mean of the products, which clients send as sketches.

    Attributes:
        balanced: split the singular values evenly between B and A instead of giving them to B.
    """

    balanced: bool = True

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        means = self.mean(server, updates, combine, round)

        def joined(module: str, before: Product) -> Product:
            mean = means[module]
            if not mean.A.any():  # nothing was learnt; an SVD of zero would lose A
                return before
            return truncate(mean, len(before.A), balanced=self.balanced)

        return {**server, "adapter": with_products(server["adapter"], joined)}
