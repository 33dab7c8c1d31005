"""FedMomentum: the best approximation goes on as the adapter, the rest joins the base.

Yan et al., "FedMomentum: Preserving LoRA Training Momentum in Federated Fine-Tuning", 2026,
https://arxiv.org/abs/2603.08014. Of U S V^T, the mean of the clients' products, the first r
components become B = U sqrt(S) and A = sqrt(S) V^T, which go on in the directions that training
had; the components after them join the frozen weights. Departures: the decomposition is the exact
one of a small core, which costs less than the paper's randomised one; clients may have fewer ranks,
and begin from the first of the adapter's, as in FlexLoRA.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.adapter import State
from fedtune.combine import Combine
from fedtune.errors import RecipeError
from fedtune.lowrank import (
    Product,
    added,
    energy_rank,
    mean_products,
    named,
    split,
    svd,
    with_products,
)
from fedtune.strategies.factored import Factored
from fedtune.strategies.strategy import Update


@dataclass(frozen=True)
class FedMomentum(Factored):
    """The mean of the products, split between the adapter and the base.

    Attributes:
        energy: the share of the squared singular values that is kept, adapter and base together,
            module by module; at 1 nothing is dropped, at 0 nothing joins the base (FlexLoRA).
    """

    changes_base: ClassVar[bool] = True
    fixed_frame: ClassVar[bool] = False
    energy: float = 0.9999

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 <= self.energy <= 1:
            raise RecipeError(f"strategy fedmomentum: energy = {self.energy} must be in [0, 1].")

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        means = mean_products([u.state["adapter"] for u in updates], [u.weight for u in updates])
        rest: dict[str, Product] = {}

        def dominant(module: str, before: Product) -> Product:
            u, s, vt = svd(means[module])
            if not s.any():  # nothing was learnt; an SVD of zero would lose A
                return before
            rank, kept = len(before.A), energy_rank(s, self.energy)
            if kept > rank:
                tail = u[:, rank:kept], s[rank:kept], vt[rank:kept]
                rest[module] = split(*tail, kept - rank, balanced=True)
            return split(u, s, vt, rank, balanced=True)

        adapter = with_products(server["adapter"], dominant)
        base = added(server.get("base", {}), named(rest, adapter))
        return {**server, "adapter": adapter, **({"base": base} if base else {})}
