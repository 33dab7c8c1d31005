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
from typing import ClassVar, Literal

from fedtune.adapter import Adapter, State, at_rank
from fedtune.combine import Combine
from fedtune.lowrank import Product, mean_products, truncate, with_products
from fedtune.strategies.strategy import ClientInfo, Plan, Strategy, Turn, Update


@dataclass(frozen=True)
class FlexLoRA(Strategy):
    """Factors are sent, not their changes: a product needs both.

    Attributes:
        balanced: split the singular values evenly between B and A instead of giving them to B.
    """

    sends: ClassVar[Literal["delta", "adapter"]] = "adapter"
    admits_dora: ClassVar[bool] = False
    fixed_frame: ClassVar[bool] = False
    sums_only: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = True
    balanced: bool = True

    def broadcast(self, server: State, client: ClientInfo, round: int) -> State:
        # Singular values come in descending order: the first ranks are the best approximation.
        return {"adapter": at_rank(server["adapter"], client.rank)}

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

    def reply(self, turn: Turn, plan: Plan, trained: State) -> tuple[State, State]:
        return {"adapter": trained["adapter"]}, {}

    def payload(self, initial: Adapter, client: ClientInfo, round: int) -> State:
        return {"adapter": at_rank(initial, client.rank)}

    def contribution(self, server: State, update: Update, round: int) -> Adapter:
        return update.state["adapter"]
