"""Products as sketches that add up, for strategies that join products and see sums only.

With Omega (d_in, q) and Psi (p, d_out) random and known to all, a client sends for each module

    Y_i = B_i (A_i Omega),    Z_i = (Psi B_i) A_i

and from the means Y and Z follows the mean of the products, Q (Psi Q)^+ Z with Q R = Y, exactly
where q is its rank or more: then Q spans its columns. A mean is all that is needed, so updates may
be masked (secure aggregation). It costs (d_out q + p d_in) numbers a module instead of
r (d_out + d_in).

Clarkson and Woodruff 2009, "Numerical Linear Algebra in the Streaming Model",
https://doi.org/10.1145/1536414.1536445; Halko, Martinsson and Tropp 2011,
https://arxiv.org/abs/0909.4061, section 5.5 (one pass over a matrix).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedtune.adapter import Adapter, State, rank_of
from fedtune.combine import Combine
from fedtune.errors import RecipeError
from fedtune.lowrank import Product, named, products
from fedtune.seeds import generator
from fedtune.strategies.strategy import ClientInfo, Plan, Strategy, Turn, Update

LEFT, RIGHT = "left", "right"  # groups of a reply: Y and Z
SURPLUS = 8  # rows of Psi beyond q, without which Psi Q may be nearly singular


@dataclass(frozen=True)
class Sketched(Strategy):
    """Clients send sketches of their products.

    Attributes:
        width: q, the rank up to which the mean of the products is exact: at least the ranks of a
            round's clients together. Of a smaller matrix it is its own rank.
    """

    sends: ClassVar[Literal["delta", "adapter"]] = "adapter"
    admits_dora: ClassVar[bool] = False
    fixed_frame: ClassVar[bool] = False
    width: int = 64

    def __post_init__(self) -> None:
        """Refuse what is no width."""
        if self.width < 1:
            raise RecipeError(f"strategy {type(self).__name__}: width must be at least 1.")

    def shortage(self, initial: Adapter, clients: int) -> str:
        ranks = rank_of(initial) * clients
        tight = [p for _, p in products(initial) if self.width < min(ranks, *_shape(p))]
        if not tight:
            return ""
        largest = max(min(ranks, *_shape(product)) for product in tight)
        return (
            f"width = {self.width} is less than the rank {largest} that the mean of {clients} "
            f"clients' products can have, and a narrower sketch is far from it. Set width = "
            f"{largest}, a lower adapter.rank, or a smaller cohort"
        )

    def reply(self, turn: Turn, plan: Plan, trained: State) -> tuple[State, State]:
        own = trained["adapter"]
        sent: State = {LEFT: {}, RIGHT: {}}
        for module, product in products(own):
            b, a = product.B.double(), product.A.double()
            omega, psi = self._random(module, product, turn.round)
            sent[LEFT][module] = (b @ (a @ omega)).to(product.B.dtype)
            sent[RIGHT][module] = ((b if psi is None else psi @ b) @ a).to(product.A.dtype)
        return sent, {}

    def payload(self, initial: Adapter, client: ClientInfo, round: int) -> State:
        left, right = {}, {}
        for module, product in products(initial):
            (d_out, d_in), (q, p) = _shape(product), self._widths(product)
            left[module], right[module] = (
                product.B.new_zeros(d_out, q),
                product.A.new_zeros(p, d_in),
            )
        return {LEFT: left, RIGHT: right}

    def contribution(self, server: State, update: Update, round: int) -> Adapter:
        left, right = update.state[LEFT], update.state[RIGHT]
        return named(self._rebuilt(server["adapter"], left, right, round), server["adapter"])

    def mean(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> dict[str, Product]:
        """The mean of the clients' products, module by module, of rank q, in float64."""
        weights = [update.weight for update in updates]
        left, right = (
            combine([update.state[group] for update in updates], weights) for group in (LEFT, RIGHT)
        )
        return self._rebuilt(server["adapter"], left, right, round)

    def _rebuilt(
        self, like: Adapter, left: Mapping[str, Tensor], right: Mapping[str, Tensor], round: int
    ) -> dict[str, Product]:
        found = {}
        for module, product in products(like):
            _, psi = self._random(module, product, round)
            q = torch.linalg.qr(left[module].double())[0]
            seen = q if psi is None else psi @ q
            found[module] = Product(q, torch.linalg.pinv(seen) @ right[module].double())
        return found

    def _widths(self, product: Product) -> tuple[int, int]:
        """(q, p): no more than the matrix has."""
        d_out, d_in = _shape(product)
        q = min(self.width, d_out, d_in)
        return q, min(q + SURPLUS, d_out)

    def _random(self, module: str, product: Product, round: int) -> tuple[Tensor, Tensor | None]:
        """Omega and Psi, new in every round; None for Psi where it would save nothing."""
        (d_out, d_in), (q, p) = _shape(product), self._widths(product)
        draws = generator("sketch", module, round)
        omega = torch.randn(d_in, q, generator=draws, dtype=torch.float64)
        if p == d_out:
            return omega, None
        return omega, torch.randn(p, d_out, generator=draws, dtype=torch.float64)


def _shape(product: Product) -> tuple[int, int]:
    return product.B.shape[0], product.A.shape[1]
