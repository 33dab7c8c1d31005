"""Rows without their padding: where a batch's real tokens are, and back again.

All real tokens of a batch stand in one row. Attention, which must see the rows apart, gets them in
buckets of like length, so that little is padded there either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIKE = 0.75  # of a bucket's longest row; a shorter one begins the next bucket


@dataclass(frozen=True)
class Bucket:
    """Rows of like length: `rows` x `longest` places, of which `real` (rows, longest) hold tokens.

    `real` is None where all do.
    """

    rows: int
    longest: int
    real: Tensor | None


@dataclass(frozen=True)
class Packing:
    """Where a batch's real tokens are; rows are padded on the right.

    Attributes:
        lengths: real tokens of each row.
        longest: places of a row in the padded batch.
        tokens: (tokens,) the place of each real token in the flat padded batch.
        buckets: the rows sorted by length; attention runs over one after another.
        order: (places,) the real token that each place of the buckets reads, its row's own.
        place: (tokens,) the place in the buckets of each real token.
    """

    lengths: tuple[int, ...]
    longest: int
    tokens: Tensor
    buckets: tuple[Bucket, ...]
    order: Tensor
    place: Tensor

    @property
    def aligned(self) -> bool:
        """Whether the buckets hold the tokens in their own order, so that nothing need move."""
        return len(self.buckets) == 1 and self.buckets[0].real is None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Packing":
        """The packing of rows with these numbers of tokens."""
        longest = max(lengths)
        sizes = torch.tensor(lengths)
        columns = torch.arange(longest)
        tokens = (columns < sizes.unsqueeze(1)).flatten().nonzero().flatten()
        if min(lengths) == longest:
            # Sorting nothing: the rows are one bucket as they stand.
            everything = torch.arange(len(tokens))
            whole = (Bucket(len(lengths), longest, None),)
            parts = (t.to(device) for t in (tokens, everything, everything))
            tokens, order, place = parts
            return cls(tuple(lengths), longest, tokens, whole, order, place)
        first = sizes.cumsum(0) - sizes
        rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        buckets, orders, begin = [], [], 0
        place = torch.empty(len(tokens), dtype=torch.int64)
        offset = 0
        while begin < len(rows):
            wide = lengths[rows[begin]]
            end = begin
            while end < len(rows) and lengths[rows[end]] >= ALIKE * wide:
                end += 1
            own = torch.tensor(rows[begin:end])
            inside = torch.arange(wide) < sizes[own].unsqueeze(1)
            # A place without a token reads its own row's first: no row ever sees another's values.
            order = torch.where(inside, first[own].unsqueeze(1) + torch.arange(wide), 0)
            order = torch.where(inside, order, first[own].unsqueeze(1))
            place[order[inside]] = offset + inside.flatten().nonzero().flatten()
            orders.append(order.flatten())
            buckets.append(
                Bucket(len(own), wide, None if bool(inside.all()) else inside.to(device))
            )
            offset += order.numel()
            begin = end
        return cls(
            tuple(lengths),
            longest,
            tokens.to(device),
            tuple(buckets),
            torch.cat(orders).to(device),
            place.to(device),
        )

    def pack(self, padded: Tensor) -> Tensor:
        """(rows, longest, ...) as (1, tokens, ...)."""
        flat = padded.reshape(-1, *padded.shape[2:])
        if len(flat) != len(self.tokens):
            flat = flat.index_select(0, self.tokens)
        return flat.unsqueeze(0)

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, tokens, ...) as (rows, longest, ...), zero where there is no token."""
        flat = packed[0]
        places = len(self.lengths) * self.longest
        if len(flat) != places:
            flat = flat.new_zeros(places, *flat.shape[1:]).index_copy(0, self.tokens, flat)
        return flat.view(len(self.lengths), self.longest, *flat.shape[1:])


class _Moved(torch.autograd.Function):
    """x[there], its gradient g[back]: a gather both ways, where index_select's would scatter-add.

    `back` says for each row of x the one place whose gradient counts; every other has none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradients[0].index_select(0, back), None, None


class _Taken(torch.autograd.Function):
    """x[there] where several places of x are left out: their gradient is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor) -> Tensor:
        ctx.save_for_backward(there)
        ctx.rows = len(x)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (there,) = ctx.saved_tensors
        gradient = gradients[0]
        whole = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        return whole.index_copy_(0, there, gradient), None


def bucketed(x: Tensor, packing: Packing) -> Tensor:
    """(tokens, ...) as (places of all buckets, ...)."""
    if packing.aligned:
        return x
    moved: Tensor = _Moved.apply(x, packing.order, packing.place)  # type: ignore[no-untyped-call]
    return moved


def in_order(x: Tensor, packing: Packing) -> Tensor:
    """(places of all buckets, ...) as (tokens, ...)."""
    if packing.aligned:
        return x
    taken: Tensor = _Taken.apply(x, packing.place)  # type: ignore[no-untyped-call]
    return taken
