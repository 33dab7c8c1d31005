"""FlexLoRA: average the products, then send each its best approximation.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024, https://arxiv.org/abs/2402.11505. The mean of the products is exact as a
stack of factors; its truncation to the adapter's rank is the best there is (Eckart and Young). The
paper divides by a scaling of each rank; with one scaling for all ranks there is nothing to divide.
Departure: the singular values are split evenly between the factors, which AdamW learns from sooner;
balanced = false is the paper's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.adapter import State
from fedtune.combine import Combine
from fedtune.lowrank import Product, mean_products, truncate, with_products
from fedtune.strategies.factored import Factored
from fedtune.strategies.strategy import Update


@dataclass(frozen=True)
class FlexLoRA(Factored):
    """The mean of the products, at the best approximation of each client's rank.

    Attributes:
        balanced: split the singular values evenly between B and A instead of giving them to B.
    """

    fixed_frame: ClassVar[bool] = False
    balanced: bool = True

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        means = mean_products([u.state["adapter"] for u in updates], [u.weight for u in updates])

        def joined(module: str, before: Product) -> Product:
            mean = means[module]
            if not mean.B.any():  # nothing was learnt; an SVD of zero would lose A
                return before
            return truncate(mean, len(before.A), balanced=self.balanced)

        return {**server, "adapter": with_products(server["adapter"], joined)}
