"""Numbers as 32-bit words that add up modulo 2^32.

A client's delta becomes integers on a fixed grid, q = floor(s x + u) with u uniform in [0, 1): the
expectation of q is s x, its error below 1. The grid is the finest on which the sum of all clients
cannot overflow, so that its lift to (-2^31, 2^31) is the integer sum itself. What a plain reply
says beside the delta is appended and masked with it: that it is one client, its weight, metrics,
tokens, and a checksum over all words.

Where clients add shares of noise (fedtune/privacy/skellam.py), the clip is a power of two of steps,
the largest with which sum and noise fit, and a delta is scaled down to so much less than the clip
that its integers, rounded by less than one in each of d coordinates, have the norm `steps` at most:
|q| < |s x| + sqrt(d). Then it does not matter to the promise how they were rounded.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedtune.adapter import State
from fedtune.privacy import skellam
from fedtune.privacy.letters import RefusedError, digest, joined, number
from fedtune.privacy.masks import Words, keystream
from fedtune.privacy.skellam import Integers

HALF = 2**31
LIMBS, LIMB = 4, 20  # a metric is a number below 2^60 on a grid of 2^-20, in words of 20 bits
COUNT, WITHIN, WEIGHT, HEAD = 0, 1, 2, 3  # words before the metrics


@dataclass(frozen=True)
class Grid:
    """How a number becomes a word.

    Attributes:
        clients: the most whose words are added.
        bound: c, the largest absolute value of a coordinate.
        clip: C, the Euclidean norm to which a delta is scaled down, 0 for no limit.
        cap: the largest weight; rows above it do not count. A delta is scaled by weight / cap.
        noise: z, standard deviation over clip of the noise that clients' shares make; 0 for none.
        needed: of how many shares: with fewer there is no sum.
    """

    clients: int
    bound: float
    clip: float
    cap: int
    noise: float = 0.0
    needed: int = 0

    def __post_init__(self) -> None:
        """Refuse what could overflow."""
        fits = 1 <= self.clients < 2 ** (32 - LIMB) and self.cap >= 1
        if self.noise:
            self._require_noise(fits and self.cap == 1 and self.bound >= self.clip > 0)
            return
        if not (fits and self.clients * self.cap < HALF and self._fits(1.0)):
            raise ValueError(
                f"the sum of {self.clients} clients with weights up to {self.cap} and coordinates "
                f"up to {self.bound:g} does not fit 32 bits"
            )

    def _require_noise(self, fits: bool) -> None:
        least = skellam.LEAST_STEPS
        if not (fits and 1 <= self.needed <= self.clients and self._holds(least)):
            raise ValueError(
                f"the sum of {self.clients} clients with noise of {self.noise:g} times the clip "
                "could wrap around 32 bits"
            )
        if self.share < skellam.LEAST_MEAN:
            raise ValueError(
                f"noise of {self.noise:g} times the clip is too little to be made of shares of "
                f"{self.needed} clients"
            )

    def _fits(self, scale: float) -> bool:
        return self.clients * (scale * self.bound + 1) < HALF

    def _holds(self, steps: int) -> bool:
        """Whether sum and noise fit; noise does not, of all coordinates ever, once in 2^40."""
        mean = skellam.mean_of_share(self.noise * steps, self.needed)
        return self.clients * (steps + 1) + skellam.largest(self.clients, mean) < HALF

    @property
    def steps(self) -> int:
        """Of the clip, where there is noise: the largest power of two that fits."""
        steps = skellam.LEAST_STEPS
        while self._holds(2 * steps):
            steps *= 2
        return steps

    @property
    def share(self) -> int:
        """The mean of both Poisson numbers of a client's share of the noise; 0 without noise."""
        if not self.noise:
            return 0
        return skellam.mean_of_share(self.noise * self.steps, self.needed)

    def room(self, parameters: int) -> float:
        """The norm to which a delta of so many numbers is scaled down, 0 for none.

        With noise its integers have the norm `steps` at most; one step is for float64's own errors.
        """
        if not self.noise:
            return self.clip
        return self.clip * (1 - (math.sqrt(parameters) + 1) / self.steps)

    @property
    def scale(self) -> float:
        """s: steps / clip with noise, else a power of two with clients (s bound + 1) < 2^31."""
        if self.noise:
            return self.steps / self.clip
        scale = 1.0
        while self._fits(2 * scale):
            scale *= 2
        return scale

    def digest(self) -> bytes:
        """Equal for equal grids."""
        told = [self.clients, self.bound, self.clip, self.cap]
        if self.noise:
            told += [self.noise, self.needed]
        return digest(json.dumps(told).encode())


@dataclass(frozen=True)
class Layout:
    """What the words stand for, in this order: tensors, head, metrics, tokens, checksum.

    Attributes:
        tensors: (group, name, shape), sorted.
        metrics: (name, how many numbers), sorted.
    """

    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    metrics: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, state: State, metrics: Mapping[str, int]) -> "Layout":
        """The layout of a payload and of the numbers each metric has."""
        tensors = [
            (group, name, tuple(tensor.shape))
            for group, adapter in state.items()
            for name, tensor in adapter.items()
        ]
        return cls(tuple(sorted(tensors)), tuple(sorted(metrics.items())))

    @property
    def parameters(self) -> int:
        """Words of all tensors."""
        return sum(math.prod(shape) for _, _, shape in self.tensors)

    @property
    def words(self) -> int:
        """All words."""
        numbers = sum(length for _, length in self.metrics) + 2
        return self.parameters + HEAD + LIMBS * numbers + 1

    def digest(self) -> bytes:
        """Equal for equal layouts."""
        return digest(json.dumps([self.tensors, self.metrics]).encode())


@dataclass(frozen=True)
class Contribution:
    """What one client gives to the sum."""

    state: State
    weight: int
    metrics: Mapping[str, Sequence[float]]
    tokens: Sequence[float]  # [real, computed]


@dataclass(frozen=True)
class Totals:
    """What the sum of so many clients tells.

    Attributes:
        clients: how many there are in it.
        within: how many did not have to be scaled down to the clip.
        weight: of all together.
        mean: sum of weight times delta, over `weight`.
        metrics: sums.
        tokens: [real, computed] of all.
    """

    clients: int
    within: int
    weight: int
    mean: State
    metrics: dict[str, list[float]]
    tokens: list[float]


def clipped(delta: NDArray[np.float64], clip: float) -> tuple[NDArray[np.float64], bool]:
    """The delta with a norm of at most `clip` (0: any), and whether it had one already.

    Raises:
        RefusedError: E_NONFINITE.
    """
    norm = float(np.linalg.norm(delta))
    if not math.isfinite(norm):
        raise RefusedError("E_NONFINITE", "the update holds NaN, infinity or numbers near it")
    within = not clip or norm <= clip
    return (delta if within else delta * (clip / norm)), within


def encoded(
    grid: Grid,
    layout: Layout,
    given: Contribution,
    rounding: Words,
    multipliers: Words,
    share: Integers | None = None,
) -> Words:
    """The words of a client's contribution.

    Args:
        grid: of the round.
        layout: of the round; it must be that of `given`.
        given: the contribution.
        rounding: as many words of a cryptographic stream as there are parameters.
        multipliers: of the checksum.
        share: of the noise, a number for each parameter, where the grid has noise.

    Raises:
        RefusedError: E_SCHEMA, E_NONFINITE or E_RANGE.
        ValueError: there is noise in the grid and no share of it, or the other way round.
    """
    if bool(grid.noise) != (share is not None):
        raise ValueError("a share of noise belongs to a grid with noise, and to no other")
    lengths = {name: len(values) for name, values in given.metrics.items()}
    if Layout.of(given.state, lengths) != layout:
        raise RefusedError(
            "E_SCHEMA", "the update has other tensors or metrics than were asked for"
        )
    room = grid.room(layout.parameters)
    if grid.noise and room <= 0:
        raise RefusedError("E_RANGE", f"{layout.parameters} numbers are too many for the grid")
    delta, within = clipped(_flat(given.state, layout), room)
    if delta.size and float(np.abs(delta).max()) > grid.bound:
        # How large it is would tell something of the update.
        raise RefusedError(
            "E_RANGE",
            f"a coordinate is above bound = {grid.bound:g} of secure_aggregation; raise it, or "
            "lower the learning rate",
        )
    if not 1 <= given.weight <= grid.cap:
        raise RefusedError("E_RANGE", f"the weight is not between 1 and {grid.cap}")
    words = np.empty(layout.words, np.uint32)
    scaled = delta * (grid.scale * given.weight / grid.cap)
    scaled += rounding * 2.0**-32
    integers = np.floor(scaled).astype(np.int64)
    if share is not None:
        integers += share
        within = True  # how many were would be a release of its own, which no noise hides
    # int64 keeps negative numbers; the cast to 32 bits is their residue modulo 2^32.
    words[: layout.parameters] = integers.astype(np.uint32)
    values = [v for name, _ in layout.metrics for v in given.metrics[name]]
    tail = [1, int(within), given.weight]
    for value in [*values, *given.tokens]:
        tail += _limbs(float(value))
    words[layout.parameters : -1] = tail
    words[-1] = checksum(words, multipliers)
    return words


def _flat(state: State, layout: Layout) -> NDArray[np.float64]:
    parts = [state[group][name].double().numpy().reshape(-1) for group, name, _ in layout.tensors]
    return np.concatenate(parts) if parts else np.empty(0)


def _limbs(value: float) -> list[int]:
    if not (math.isfinite(value) and 0 <= value < 2.0 ** (LIMBS * LIMB - LIMB)):
        raise RefusedError("E_RANGE", "a metric is not between 0 and 2^60")
    units = round(value * 2**LIMB)
    return [units >> LIMB * place & (2**LIMB - 1) for place in range(LIMBS)]


def multipliers(run: str, round: int, words: int) -> Words:
    """The public factors of the checksum, odd, so that no change of one word is missed."""
    seed = digest(b"checksum", joined(run.encode(), number(round)))
    stream: Words = keystream(seed, words - 1) | np.uint32(1)
    return stream


def checksum(words: Words, factors: Words) -> int:
    """The sum of factor times word over all but the last, modulo 2^32: linear, so it adds up."""
    return int(np.sum(words[:-1] * factors, dtype=np.uint32))


def decoded(grid: Grid, layout: Layout, total: Words, factors: Words, schema: State) -> Totals:
    """What the sum of words tells.

    Args:
        grid: of the round.
        layout: of the round.
        total: the sum modulo 2^32.
        factors: of the checksum.
        schema: tensors whose dtypes the mean has.

    Raises:
        RefusedError: E_SUM: it is no sum of whole contributions.
    """
    if len(total) != layout.words or checksum(total, factors) != int(total[-1]):
        raise RefusedError("E_SUM", "the checksum of the unmasked sum is wrong")
    tail = total[layout.parameters : -1].astype(np.int64)
    clients, within, weight = (int(tail[place]) for place in (COUNT, WITHIN, WEIGHT))
    if not (1 <= clients <= grid.clients and within <= clients <= weight <= clients * grid.cap):
        raise RefusedError("E_SUM", "the unmasked sum has an impossible count or weight")
    lifted = total[: layout.parameters].view(np.int32).astype(np.float64)
    lifted *= grid.cap / (grid.scale * weight)
    mean = {group: dict(tensors) for group, tensors in schema.items()}  # in the schema's order
    start = 0
    for group, name, shape in layout.tensors:
        values = lifted[start : start + math.prod(shape)].reshape(shape)
        mean[group][name] = torch.from_numpy(values).to(schema[group][name].dtype)
        start += math.prod(shape)
    numbers = [_number(tail[at : at + LIMBS]) for at in range(HEAD, len(tail), LIMBS)]
    metrics, at = {}, 0
    for name, length in layout.metrics:
        metrics[name] = numbers[at : at + length]
        at += length
    return Totals(clients, within, weight, mean, metrics, numbers[at:])


def _number(limbs: NDArray[np.int64]) -> float:
    units: int = sum(int(limb) << LIMB * place for place, limb in enumerate(limbs))
    return units / (1 << LIMB)
