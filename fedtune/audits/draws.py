"""Statistics of many releases with and without a canary: what a distinguisher can make of them.

Whatever is chosen (statistic, threshold, direction) is chosen on the first half of the draws, and
measured on the second, so that the bounds hold for the choice that was made.

References:
    Jagielski, Ullman and Oprea 2020, "Auditing Differentially Private Machine Learning: How Private
    is Private SGD?", https://arxiv.org/abs/2006.07709 (a bound from two Clopper-Pearson intervals).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]
TAIL = 0.025  # of each end of a 95 % interval
THRESHOLDS = 201
TINY = 1e-12


@dataclass(frozen=True)
class Bound:
    """A lower bound of epsilon.

    Attributes:
        epsilon: that the draws rule out to be smaller, with confidence 95 %.
        estimate: from the shares themselves.
        statistic: the number of the column that was chosen.
    """

    epsilon: float
    estimate: float
    statistic: int


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def clopper_pearson(hits: Array, count: int) -> tuple[Array, Array]:
    """The ends of the exact 95 % interval of a share."""
    low = np.where(hits > 0, stats.beta.ppf(TAIL, np.maximum(hits, 1), count - hits + 1), 0.0)
    rest = np.maximum(count - hits, 1)
    high = np.where(hits < count, stats.beta.ppf(1 - TAIL, hits + 1, rest), 1.0)
    return low, high


def bound(hits: Array, others: Array, count: int, delta: float) -> Array:
    """ln(max(L - delta, 1e-12) / U), at least 0: L of `hits` and U of `others` out of `count`."""
    low, high = clopper_pearson(hits, count)[0], clopper_pearson(others, count)[1]
    return np.maximum(0.0, np.log(np.maximum(low - delta, TINY) / high))


def largest(count: int, delta: float) -> float:
    """The bound where every one of `count` draws tells the sides apart."""
    return float(bound(np.array([count]), np.array([0]), count, delta)[0])


def separation(present: Array, absent: Array, delta: float) -> Bound:
    """The best bound of epsilon from statistics (draws, statistics) of both sides."""
    half = len(present) // 2
    best, chosen = -1.0, (0, 1.0, 0.0, False)
    for column in range(present.shape[1]):
        for sign in (1.0, -1.0):
            sides = sign * present[:half, column], sign * absent[:half, column]
            levels = np.quantile(np.concatenate(sides), np.linspace(0, 1, THRESHOLDS))
            for swapped in (False, True):
                first, second = sides[::-1] if swapped else sides
                found = bound(_above(first, levels), _above(second, levels), half, delta)
                place = int(found.argmax())
                if found[place] > best:
                    best = float(found[place])
                    chosen = (column, sign, float(levels[place]), swapped)
    column, sign, level, swapped = chosen
    rest = [sign * side[half:, column] for side in (present, absent)]
    first, second = rest[::-1] if swapped else rest
    count = len(first)
    hits, others = (_above(side, np.array([level])) for side in (first, second))
    shares = max(float(hits[0]) / count - delta, TINY), (float(others[0]) + 0.5) / count
    estimate = max(0.0, math.log(shares[0] / shares[1]))
    return Bound(float(bound(hits, others, count, delta)[0]), estimate, column)


def _above(values: Array, levels: Array) -> Array:
    """How many values are above each level."""
    return len(values) - np.searchsorted(np.sort(values), levels, side="right").astype(float)


def deviation(values: Array) -> Interval:
    """The standard deviation over draws (draws, numbers), the numbers' spread being one."""
    centred = values - values.mean(0)
    freedom = values.shape[1] * (len(values) - 1)
    total = float((centred**2).sum())
    low, high = (total / stats.chi2.ppf(p, freedom) for p in (1 - TAIL, TAIL))
    return Interval(math.sqrt(total / freedom), math.sqrt(low), math.sqrt(high))


def ratio(first: Interval, second: Interval) -> Interval:
    """Of two independent values, whose intervals are alike on a logarithmic scale; 0 with a 0."""
    if not (first.low > 0 and second.low > 0):
        return Interval(0.0, 0.0, 0.0)
    widths = (math.log(one.high / one.low) / 2 for one in (first, second))
    half, value = math.hypot(*widths), first.value / second.value
    return Interval(value, value * math.exp(-half), value * math.exp(half))


def shift(present: Array, absent: Array) -> Interval:
    """How far apart the means of two samples lie."""
    gap = float(present.mean() - absent.mean())
    error = math.sqrt(float(present.var(ddof=1) + absent.var(ddof=1)) / len(present))
    half = float(stats.norm.ppf(1 - TAIL)) * error
    return Interval(gap, gap - half, gap + half)


def correlation(first: Array, second: Array) -> Interval:
    """Of numbers whose means are known to be 0, by Fisher's transformation; 0 without a spread."""
    scale = math.sqrt(float((first**2).sum() * (second**2).sum()))
    value = float((first * second).sum()) / scale if scale else 0.0
    half = float(stats.norm.ppf(1 - TAIL)) / math.sqrt(max(1, first.size - 3))
    middle = math.atanh(max(-1 + 1e-15, min(1 - 1e-15, value)))
    return Interval(value, math.tanh(middle - half), math.tanh(middle + half))


def grain(values: Array, deviations: Sequence[float] | Array) -> Interval:
    """The step between values that noise can take, over its standard deviation.

    Of N normal draws on a grid of step g two are equal with probability g / (2 sqrt(pi) sigma), so
    equal pairs tell the step; their count's interval is Garwood's for a Poisson count.

    Args:
        values: (draws, numbers), each number with the same data in every draw.
        deviations: of each number; those of 0 have no grain and are left out.
    """
    kept = values[:, np.asarray(deviations) > 0]
    count, pairs = len(kept), kept.shape[1] * len(kept) * (len(kept) - 1) / 2
    if not pairs:
        return Interval(0.0, 0.0, 0.0)
    equal = 0.0
    for column in range(kept.shape[1]):
        times = np.unique(kept[:, column], return_counts=True)[1].astype(float)
        equal += float((times * (times - 1) / 2).sum())
    step = 2 * math.sqrt(math.pi) / pairs
    low = float(stats.chi2.ppf(TAIL, 2 * equal)) / 2 if equal else 0.0
    high = float(stats.chi2.ppf(1 - TAIL, 2 * equal + 2)) / 2
    assert count > 1
    return Interval(step * equal, step * low, step * high)
