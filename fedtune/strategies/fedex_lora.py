"""FedEx-LoRA: average both factors, and add what that leaves out to the base.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large
Language Models", ACL 2025, https://arxiv.org/abs/2410.09432. The mean of the products is that of
the means and a residual of rank (K - 1) r, which joins the frozen weights: no aggregation error.
Departures: clients are weighted as the recipe says, where the paper has equal weights; the residual
travels as a pair of factors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.adapter import State
from fedtune.combine import Combine
from fedtune.errors import RecipeError
from fedtune.lowrank import added, named, residual, truncate
from fedtune.strategies.strategy import Strategy, Update, ended


@dataclass(frozen=True)
class FedExLoRA(Strategy):
    """FedIT, with its error put right in the base.

    Attributes:
        rank: of the residual's best approximation that joins the base; 0 is all of it, exact.
    """

    admits_dora: ClassVar[bool] = False
    changes_base: ClassVar[bool] = True
    sums_only: ClassVar[bool] = False
    rank: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no rank."""
        if self.rank < 0:
            raise RecipeError(f"strategy fedex_lora: rank = {self.rank} must be at least 0.")

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        after = super().aggregate(server, updates, combine, round)
        left = residual([ended(server, u) for u in updates], [u.weight for u in updates])
        if self.rank:
            left = {
                module: truncate(product, min(self.rank, len(product.A)), balanced=True)
                for module, product in left.items()
            }
        base = added(server.get("base", {}), named(left, server["adapter"]))
        return {**after, "base": base} if base else after
