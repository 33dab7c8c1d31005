"""The noisy steps of record-level privacy: which records, how they are bounded, what hides them.

    u = sum over units b of G_b min(1, C / |G_b|),     step = (u + N(0, (z C)^2)) / (q N)

G_b is the gradient of everything that unit b brings to the step, over all trained tensors together;
a unit is a record, or all records of one patient. Units are drawn by themselves with probability q
(Poisson), so a step may have none: it is then a step of noise. The denominator is the expected
number, never the drawn one. Everything after that sum (the proximal term, a correction, another
clip, AdamW) sees noised numbers only and costs nothing.

Who is drawn, and the noise, follow from a secret key and from the inputs of the round: the same
inputs repeat the same bytes, others are drawn and hidden independently.

References:
    Abadi et al. 2016, "Deep Learning with Differential Privacy", https://arxiv.org/abs/1607.00133,
    algorithm 1; McMahan et al. 2018, https://arxiv.org/abs/1710.06963 (fixed denominators).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedtune.privacy import noise
from fedtune.privacy.clipping import SLACK

HELD = 2**28  # bytes of gradients of single rows that one client holds at once
DRAWS_ABOVE = 2  # times the expected batch, which a draw seldom exceeds


@dataclass(frozen=True)
class Chunk:
    """Rows of a batch whose gradients are held at once.

    Attributes:
        start: the first row.
        stop: the one after the last.
        places: of each row's unit among those that are being added up.
        units: how many those are.
        closes: whether all their rows have been seen with this chunk.
    """

    start: int
    stop: int
    places: tuple[int, ...]
    units: int
    closes: bool


def chunks(units: Sequence[int], limit: int) -> list[Chunk]:
    """A batch in chunks of at most `limit` rows, and at most so many units at a time.

    Args:
        units: of each row; the rows of a unit stand together.
        limit: at least 1.
    """
    found, start = [], 0
    runs = [len(list(rows)) for _, rows in itertools.groupby(units)]
    for first in range(0, len(runs), limit):
        own = runs[first : first + limit]
        places = [place for place, count in enumerate(own) for _ in range(count)]
        for begin in range(0, len(places), limit):
            part = tuple(places[begin : begin + limit])
            end = begin + len(part)
            found.append(Chunk(start + begin, start + end, part, len(own), end == len(places)))
        start += len(places)
    return found


class ClippedSum:
    """The sum of units' gradients, each clipped to one norm over all tensors together.

    A unit whose gradient is not finite brings nothing: it could not be bounded, and to stop for it
    would tell of it.

    Args:
        shapes: of the trained tensors.
        clip: C.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], clip: float) -> None:
        self.clip = clip
        self.total = {n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items()}
        self.left_out = 0
        self._open: dict[str, Tensor] = {}

    def add(self, rows: Mapping[str, Tensor], chunk: Chunk) -> None:
        """Take the gradients (rows, parameters) of a chunk's rows, of every tensor."""
        if not self._open and chunk.closes and chunk.units == len(chunk.places):
            self._close(rows)
            return
        for name, gradients in rows.items():
            if name not in self._open:
                zeros = gradients.new_zeros(chunk.units, gradients.shape[1], dtype=torch.float64)
                self._open[name] = zeros
            places = torch.tensor(chunk.places, device=gradients.device)
            self._open[name].index_add_(0, places, gradients.double())
        if chunk.closes:
            self._close(self._open)
            self._open = {}

    def _close(self, units: Mapping[str, Tensor]) -> None:
        # In float64: a square of 1e20 overflows float32, and an infinite norm would clip nothing.
        norms = [torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) for g in units.values()]
        size = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        finite = size.isfinite()
        factors = torch.where(size <= self.clip, 1.0, self.clip * (1 - SLACK) / size)
        whole = bool(finite.all())
        if not whole:
            factors = torch.where(finite, factors, 0.0)
            self.left_out += int((~finite).sum())
        for name, gradients in units.items():
            if not whole:
                gradients = torch.where(finite[:, None], gradients, 0.0)
            # In float64: a bfloat16 sum would round by more than one unit may move it.
            part = (factors @ gradients.double()).cpu()
            self.total[name] += part.view(self.total[name].shape)


@dataclass(frozen=True)
class Steps:
    """How a client's steps keep its units private.

    Attributes:
        clip: C, of one unit's gradient over all trained tensors together.
        denominator: of the noisy sum.
        sigma: the noise's standard deviation on the sum, z C.
        key: the client's secret.
        context: what else the noise belongs to: run, arm, round, client, hash of the inputs.
        units: the unit of each row of each step; None where every row is one.
        limit: rows whose gradients are held at once.
    """

    clip: float
    denominator: float
    sigma: float
    key: bytes = field(repr=False)
    context: tuple[int | str, ...]
    units: Sequence[Sequence[int]] | None = None
    limit: int = 64

    def chunks(self, step: int, rows: int) -> list[Chunk]:
        """The batch of a step, which has so many rows; [] for an empty one."""
        return chunks(range(rows) if self.units is None else self.units[step], self.limit)

    def noised(self, sums: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The noisy mean of a step, in float64."""
        noisy = noise.noisy(sums, self.key, self.sigma, *self.context, "step", step)
        return {name: tensor / self.denominator for name, tensor in noisy.items()}


def limit_of(batch_size: int, parameters: int) -> int:
    """How many rows' gradients one client holds at once.

    As many as a draw has with few exceptions, fewer where they would take more than `HELD` bytes.
    """
    return max(1, min(DRAWS_ABOVE * batch_size, HELD // (4 * max(1, parameters))))


def drawn(
    units: Sequence[Sequence[int]],
    rate: float,
    steps: int,
    most: int,
    key: bytes,
    *context: int | str,
) -> Iterator[tuple[list[int], list[int]]]:
    """The rows of each step and their units: every unit by itself with probability `rate`.

    Args:
        units: the rows of each unit.
        rate: q.
        steps: how many.
        most: rows of a unit in one step, chosen anew each time; 0 is all.
        key: the client's secret. The recipe's seed would not do: who knows which records a step
            has seen is not deceived by the others.
        context: as the noise's.
    """
    for step in range(steps):
        coins = noise.uniforms(key, len(units), *context, "batch", step)
        rows: list[int] = []
        whose: list[int] = []
        for unit in np.flatnonzero(coins < rate).tolist():
            own = list(units[unit])
            if most and len(own) > most:
                order = noise.uniforms(key, len(own), *context, "rows", step, unit)
                own = sorted(own[i] for i in np.argsort(order, kind="stable")[:most])
            rows += own
            whose += [unit] * len(own)
        yield rows, whose
