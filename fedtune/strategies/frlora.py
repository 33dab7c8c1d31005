"""FRLoRA: begin every round from the principal factors of the weights, and sum what was learnt.

Yan et al., "Federated Residual Low-Rank Adaption of Large Language Models", ICLR 2025,
https://openreview.net/forum?id=e0rQRMUhs7. A_0 and B_0 are the principal factors of the frozen
weights, and -B_0 A_0 joins the base, so that the start leaves the weights as they were. After a
round base <- base + B-bar A-bar - B_0 A_0, and everybody begins from A_0 and B_0 again. The formula
is read from the abstract: the global weights gain the change of the product in each round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedtune.adapter import Adapter, State
from fedtune.combine import Combine
from fedtune.lowrank import Product, added, named, products, stack
from fedtune.strategies.strategy import Strategy, Update


@dataclass(frozen=True)
class FRLoRA(Strategy):
    """A round is FedIT's; its change of the product stays in the base, of rank 2 r a round."""

    admits_dora: ClassVar[bool] = False
    changes_base: ClassVar[bool] = True
    begins: ClassVar[Literal["random", "principal"]] = "principal"
    # Everybody begins from A_0 and B_0 again, so a server optimizer would have nothing to step on.
    fixed_frame: ClassVar[bool] = False

    def start(self, initial: Adapter) -> State:
        taken = {module: Product(-own.B, own.A) for module, own in products(initial)}
        return {"adapter": initial, "base": named(taken, initial)}

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        first = server["adapter"]
        mean = dict(products(super().aggregate(server, updates, combine, round)["adapter"]))
        change = {
            module: stack(
                [
                    Product(mean[module].B.double() - own.B.double(), mean[module].A),
                    Product(own.B, mean[module].A.double() - own.A.double()),
                ],
                [1.0, 1.0],
            )
            for module, own in products(first)
        }
        return {**server, "base": added(server["base"], named(change, first))}
