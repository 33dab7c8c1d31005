"""Products of each client's rows with that client's own matrix, and their gradients.

A batch holds the rows of all clients, each client's together. Where the clients have equally many,
the products are one batched product, else one a client. A backward pass gives each client the sum
over its rows, or keeps every row's own gradient, which clipping for differential privacy needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class UnsupportedError(Exception):
    """The base hands its adapted parts something that cannot be told apart by clients."""


def product(x: Tensor, own: Tensor, sizes: Sequence[int], onto: Tensor | None = None) -> Tensor:
    """x_c own_c for each client's rows, added to `onto` in place where it is given.

    Args:
        x: (rows, n), the clients' rows one after another.
        own: (clients, n, m).
        sizes: rows of each client.
        onto: (rows, m).

    Returns:
        (rows, m).
    """
    result = x.new_empty(len(x), own.shape[2]) if onto is None else onto
    keep = 0 if onto is None else 1
    if min(sizes) == max(sizes):
        cut = result.view(len(own), sizes[0], -1)
        torch.baddbmm(cut, x.view(len(own), sizes[0], -1), own, beta=keep, out=cut)
        return result
    for place, rows, matrix in zip(_cut(result, sizes), _cut(x, sizes), own, strict=True):
        if len(rows):
            torch.addmm(place, rows, matrix, beta=keep, out=place)
    return result


def outer(g: Tensor, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """g_c^T x_c for each stretch of rows: (stretches, m, n) of g (rows, m) and x (rows, n)."""
    count = len(sizes)
    if min(sizes) == max(sizes):
        cut = g.view(count, sizes[0], -1).transpose(1, 2)
        return torch.bmm(cut, x.view(count, sizes[0], -1))
    result = g.new_zeros(count, g.shape[1], x.shape[1])
    for place, left, right in zip(result, _cut(g, sizes), _cut(x, sizes), strict=True):
        torch.mm(left.t(), right, out=place)
    return result


def _cut(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return torch.split(x, list(sizes))


@dataclass
class Layout:
    """Whose rows are whose in the batch that is being computed.

    Attributes:
        rows: of each client, at least one.
        tokens: of each row, as the base's layers see them: real ones, or all places.
        longest: places of a row in the padded batch.
        step: of the clients' local work, from 0.
        seeds: of each client's dropout.
        examples: name -> (rows, parameters) gradient of each row's own loss, filled by a backward
            pass; None where only their sums are wanted.
    """

    rows: list[int]
    tokens: list[int]
    longest: int
    step: int = 0
    seeds: Sequence[int] = ()
    examples: dict[str, Tensor] | None = None

    def sizes(self, x: Tensor) -> tuple[list[int], list[int]]:
        """(entries of each client, entries of each row) in x (..., features).

        Raises:
            UnsupportedError: x holds neither one entry a token, a place nor a row.
        """
        entries, count = x.numel() // x.shape[-1], len(self.tokens)
        if entries == sum(self.tokens):
            each = self.tokens
        elif entries in (count, count * self.longest):
            each = [entries // count] * count
        else:
            raise UnsupportedError("it has adapted parts that see neither rows nor tokens")
        begin, clients = 0, []
        for rows in self.rows:
            clients.append(sum(each[begin : begin + rows]))
            begin += rows
        return clients, each


class _Own(torch.autograd.Function):
    """y_c = x_c W_c^T, onto y where it is given, with each row's own gradient where asked for."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, onto: Tensor | None, layout: Layout, *names: str
    ) -> Tensor:
        ctx.sizes, ctx.each = layout.sizes(x)
        ctx.layout, ctx.names, ctx.onto = layout, names, onto is not None
        ctx.save_for_backward(x, weight)
        if onto is not None:
            ctx.mark_dirty(onto)
        return product(x, weight.transpose(1, 2), ctx.sizes, onto)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g = gradients[0].contiguous()
        dx = product(g, weight, ctx.sizes) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            if ctx.layout.examples is None:
                dw = outer(g, x, ctx.sizes)
            else:
                own, (name, *bias) = outer(g, x, ctx.each), ctx.names
                if bias:
                    ctx.layout.examples[bias[0]] = own[..., -1]
                    own = own[..., :-1]
                ctx.layout.examples[name] = own.flatten(1)
        return dx, dw, g if ctx.onto else None, None, *(None for _ in ctx.names)


def own_product(
    x: Tensor, weight: Tensor, layout: Layout, *names: str, onto: Tensor | None = None
) -> Tensor:
    """x_c W_c^T for each client's rows, added to `onto` in place where it is given.

    Args:
        x: (entries, n).
        weight: (clients, m, n).
        layout: whose the entries are.
        names: of the parameters in `weight`; a second one is its last column, a bias.
        onto: (entries, m).
    """
    result: Tensor = _Own.apply(x, weight, onto, layout, *names)  # type: ignore[no-untyped-call]
    return result
