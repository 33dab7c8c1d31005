"""How good a round's aggregation was: its distance from the mean of the clients' products.

Every client ends a round with a product B_i A_i beside the base it was sent. The ideal is their
weighted mean Delta* = sum_i p_i B_i A_i; what a strategy makes of it is the change of the base plus
the product of the new adapter. Whatever is measured here is in units of B A, before the adapter's
scaling, and norms are over all modules together.

Factors are first brought into an orthonormal basis of their span, by the R of a QR, which changes
no norm, inner product or singular value; differences are formed there and then measured, so that
nearly equal products lose nothing. With k the ranks of all clients together and modules of d_out x
d_in, a round costs O(k^2 (d_out + d_in)) until k reaches them, then O(k d_out d_in): what concerns
pairs of clients follows from sums, and no matrix has more entries than the clients' factors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedtune.adapter import Adapter, State
from fedtune.lowrank import Product, products
from fedtune.strategies.strategy import Strategy, Update

SVD_BUDGET = 2.0**28  # multiplications: a tenth of a second
ROUNDING = 1e-12  # of the squares a difference of squares comes from: what float64 leaves of it


def of_round(
    strategy: Strategy, before: State, updates: Sequence[Update], after: State, round: int
) -> dict[str, float]:
    """`measure` of a round's accepted updates; {} where clients keep what it would need."""
    ended = [strategy.contribution(before, update, round) for update in updates]
    known = [adapter for adapter in ended if adapter is not None]
    if not known or len(known) < len(ended):
        return {}
    return measure(known, [update.weight for update in updates], before, after)


def measure(
    clients: Sequence[Adapter], weights: Sequence[float], before: State, after: State
) -> dict[str, float]:
    """The figures of one round. One that has no value, as of one client's pairs, is left out.

    error: |Delta* - what the model changed by|, Frobenius; relative_error: over |Delta*| = ideal;
        cosine: of the two.
    effective_rank: exp of the entropy of sigma^2 / sum sigma^2 (Roy and Vetterli 2007) and
        stable_rank: sum sigma^2 / max sigma^2 of Delta*, means over the modules (evenly spaced ones
        where SVDs of all would take longer than SVD_BUDGET); accumulated_...: of the new base and
        adapter together.
    change: |mean of the clients' changes|; drift: the distance of a client's product from Delta*,
        the root of its weighted mean square, over `change`.
    update_cosine: the mean cosine of two clients' changes, each pair weighted by the product of
        their weighted lengths.
    moved_A, moved_B: how far clients moved each factor, weighted mean. A client of fewer ranks than
        the server has moved what it has.

    Args:
        clients: the adapter that each ended with; ranks may differ.
        weights: above 0.
        before: the coordinator's state that the round began from.
        after: the state that it ended with.
    """
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    ended = [dict(products(adapter)) for adapter in clients]
    adapters, bases = [], []
    for state in (before, after):
        adapters.append(dict(products(state["adapter"])))
        bases.append(dict(products(state.get("base", {}))))
    sums = _Sums.of(len(clients), len(adapters[0]))
    for module, start in adapters[0].items():
        own = [one[module] for one in ended]
        changes = _base_change(bases[0].get(module), bases[1].get(module))
        sums.add_module(start, own, shares, [adapters[1][module], *changes])
        whole = [part[module] for part in (bases[1], adapters[1]) if module in part]
        left, right = _in_basis(*_stacked(whole))
        sums.accumulated.add(left @ right)
    return sums.figures(shares)


@dataclass
class _Ranks:
    """Effective and stable ranks, module by module.

    Attributes:
        modules: how many there will be.
        seen: how many there were.
        effective: of those that were measured.
        stable: the same.
    """

    modules: int
    seen: int = 0
    effective: list[float] = field(default_factory=list)
    stable: list[float] = field(default_factory=list)

    def add(self, matrix: Tensor) -> None:
        """Those of one more module, nothing of a matrix of zeros.

        Where the SVDs of all would cost too much, every second, third ... module is measured.
        """
        cost = min(matrix.shape) * matrix.numel() * self.modules
        number, self.seen = self.seen, self.seen + 1
        if number % math.ceil(cost / SVD_BUDGET):
            return
        squares = torch.linalg.svdvals(matrix).square()
        total = float(squares.sum())
        if total > 0:
            self.effective.append(math.exp(float(torch.special.entr(squares / total).sum())))
            self.stable.append(total / float(squares.max()))

    def figures(self, prefix: str) -> dict[str, float]:
        count = len(self.effective)
        if not count:
            return {}
        return {
            f"{prefix}effective_rank": sum(self.effective) / count,
            f"{prefix}stable_rank": sum(self.stable) / count,
        }


@dataclass
class _Sums:
    """Squares and inner products over the modules so far.

    Attributes:
        error: |Delta* - Gamma|^2, Gamma being what the model changed by.
        ideal: |Delta*|^2.
        real: |Gamma|^2.
        both: <Delta*, Gamma>.
        change: |u|^2 of the mean change u = Delta* - B0 A0.
        lengths: |u_i|^2 of each client's change, (clients,).
        moved: client by client, the squared distances of A and of B, (2, clients).
        ranks: of Delta*.
        accumulated: of the whole change of the model until now.
    """

    lengths: Tensor
    moved: Tensor
    ranks: _Ranks
    accumulated: _Ranks
    error: float = 0.0
    ideal: float = 0.0
    real: float = 0.0
    both: float = 0.0
    change: float = 0.0

    @classmethod
    def of(cls, clients: int, modules: int) -> "_Sums":
        """Zeros."""
        zeros = torch.zeros(3, clients, dtype=torch.float64)
        return cls(zeros[0], zeros[1:], _Ranks(modules), _Ranks(modules))

    def add_module(
        self, start: Product, clients: Sequence[Product], shares: Tensor, real: Sequence[Product]
    ) -> None:
        """One more module.

        Args:
            start: the server's product before the round, B0 A0.
            clients: B_i A_i of each.
            shares: p_i.
            real: products whose sum is Gamma.
        """
        rank = max(len(product.A) for product in (start, *clients))
        b0, a0 = _filled(start, rank)
        filled = [_filled(product, rank) for product in clients]
        # With rank r: d_out x r and r x d_in, client after client.
        moves = torch.cat([b - b0 for b, _ in filled], dim=1)
        ends = torch.cat([a for _, a in filled])
        self._add_moves(moves, ends, a0, [len(product.A) for product in clients])
        others_left, others_right = _stacked(real)
        left, right = _in_basis(
            torch.cat([b0, moves, others_left], dim=1), torch.cat([a0, ends, others_right])
        )
        sizes = [rank, moves.shape[1], others_left.shape[1]]
        b0, moves, others_left = torch.split(left, sizes, dim=1)
        a0, ends, others_right = torch.split(right, sizes)
        self._add_compared(b0, a0, moves, ends, shares, others_left @ others_right)

    def _add_moves(self, moves: Tensor, ends: Tensor, a0: Tensor, ranks: Sequence[int]) -> None:
        """The distances of the factors, of each client's own ranks."""
        rank = len(a0)
        has = torch.arange(rank) < torch.tensor(ranks).unsqueeze(1)
        squares = (ends.view(-1, rank, a0.shape[1]) - a0).square().sum(dim=2)
        self.moved[0] += (squares * has).sum(dim=1)
        squares = moves.square().sum(dim=0).view(-1, rank)
        self.moved[1] += (squares * has).sum(dim=1)

    def _add_compared(
        self, b0: Tensor, a0: Tensor, moves: Tensor, ends: Tensor, shares: Tensor, real: Tensor
    ) -> None:
        """What is asked of the products, from their coordinates in the basis.

        A change is B_i A_i - B0 A0 = (B_i - B0) A_i + B0 (A_i - A0), which loses nothing however
        small it is.
        """
        clients, rank = len(shares), len(a0)
        turns = ends.view(clients, rank, -1) - a0
        weighted = moves * shares.repeat_interleave(rank)
        mean = weighted @ ends + b0 @ torch.einsum("k,kri->ri", shares, turns)
        ideal = b0 @ a0 + mean
        self.error += _square(ideal - real)
        self.ideal += _square(ideal)
        self.real += _square(real)
        self.both += float((ideal * real).sum())
        self.change += _square(mean)
        self.ranks.add(ideal)
        # |D A + B0 T|^2 from rank x rank Grams, D = B_i - B0 and T = A_i - A0.
        d = moves.T.reshape(clients, rank, -1)
        a, gram = ends.view(clients, rank, -1), b0.T @ b0
        self.lengths += ((d @ d.mT) * (a @ a.mT)).sum(dim=(1, 2))
        self.lengths += 2 * ((d @ b0) * (a @ turns.mT)).sum(dim=(1, 2))
        self.lengths += (gram * (turns @ turns.mT)).sum(dim=(1, 2))

    def figures(self, shares: Tensor) -> dict[str, float]:
        """The figures by name."""
        found = {"error": math.sqrt(self.error), "ideal": math.sqrt(self.ideal)}
        if self.ideal > 0:
            found["relative_error"] = found["error"] / found["ideal"]
            if self.real > 0:
                found["cosine"] = self.both / math.sqrt(self.ideal * self.real)
        found |= self.ranks.figures("") | self.accumulated.figures("accumulated_")
        found["change"] = math.sqrt(self.change)
        # sum_i p_i |u_i - u|^2; of equal clients rounding alone would be left.
        mean_square = float(shares @ self.lengths)
        spread = mean_square - self.change
        if self.change > 0:
            genuine = spread if spread > ROUNDING * mean_square else 0.0
            found["drift"] = math.sqrt(genuine / self.change)
        weighted = shares * self.lengths.clamp(min=0).sqrt()
        alone, pairs = _square(weighted), float(weighted.sum()) ** 2
        if pairs - alone > ROUNDING * pairs:
            found["update_cosine"] = (self.change - alone) / (pairs - alone)
        found["moved_A"], found["moved_B"] = (self.moved.sqrt() @ shares).tolist()
        return found


def _base_change(before: Product | None, after: Product | None) -> list[Product]:
    """Products whose sum is by how much a base changed; what both begin with cancels exactly."""
    if after is None:
        return [] if before is None else [_negative(before)]
    if before is None:
        return [after]
    same = len(before.A)
    began = Product(after.B[:, :same], after.A[:same])
    if all(
        one.dtype == other.dtype and torch.equal(one, other)
        for one, other in ((began.A, before.A), (began.B, before.B))
    ):
        return [Product(after.B[:, same:], after.A[same:])]
    return [after, _negative(before)]


def _negative(product: Product) -> Product:
    return Product(-product.B, product.A)


def _filled(product: Product, rank: int) -> tuple[Tensor, Tensor]:
    """(B, A) in float64, filled up with zeros to `rank`."""
    missing = rank - len(product.A)
    b = torch.nn.functional.pad(product.B.double(), (0, missing))
    return b, torch.nn.functional.pad(product.A.double(), (0, 0, 0, missing))


def _stacked(terms: Sequence[Product]) -> tuple[Tensor, Tensor]:
    """(B, A) of the sum of products, in float64."""
    left = torch.cat([term.B.double() for term in terms], dim=1)
    return left, torch.cat([term.A.double() for term in terms])


def _in_basis(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of the columns of `left` and the rows of `right` in bases of their spans.

    A side with as many ranks as entries in each stays as it is: they span everything.
    """
    rank = len(right)
    if rank < len(left):
        left = torch.linalg.qr(left, mode="r").R
    if rank < right.shape[1]:
        right = torch.linalg.qr(right.T, mode="r").R.T
    return left, right


def _square(tensor: Tensor) -> float:
    return float(tensor.square().sum())
