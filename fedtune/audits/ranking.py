"""How well a score tells two groups apart, with 95 % intervals.

The area under the ROC curve is the chance that a random member of the first group scores above a
random one of the second, ties counting half: it needs no threshold and no equal groups. What an
adversary who may hardly ever be wrong achieves is another question, which `caught` answers.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from fedtune.audits.finding import Measure
from fedtune.seeds import seed_of

Scores: TypeAlias = NDArray[np.float64]
Z = 1.959963984540054  # of a 95 % interval
TAIL = 0.025
DRAWS = 1000  # of a bootstrap


def placements(first: Scores, second: Scores) -> Scores:
    """For each score of `first`, the share of `second` below it, ties counting half."""
    ordered = np.sort(second)
    below = np.searchsorted(ordered, first, side="left")
    within = np.searchsorted(ordered, first, side="right")
    share: Scores = (below + within) / (2 * len(second))
    return share


def auc(first: Scores, second: Scores) -> float:
    """The area under the ROC curve.

    Raises:
        ValueError: a group is empty, or a score is no number.
    """
    if not len(first) or not len(second):
        raise ValueError(f"groups of {len(first)} and {len(second)} cannot be told apart")
    if np.isnan(first).any() or np.isnan(second).any():
        raise ValueError("a score is no number")
    return float(placements(first, second).mean())


def delong(first: Scores, second: Scores, name: str, subject: str = "") -> Measure:
    """The area with DeLong's interval, for two independent samples.

    DeLong, DeLong, Clarke-Pearson 1988, Biometrics 44, 837-845: the variance of the mean of both
    groups' placements. Of a group of one row it is not known, and of groups that do not overlap 0.
    """
    value = auc(first, second)
    if min(len(first), len(second)) < 2:
        return Measure(name, value, subject=subject)
    spread = [
        float(placements(a, b).var(ddof=1)) / len(a) for a, b in ((first, second), (second, first))
    ]
    half = Z * sum(spread) ** 0.5
    method = f"DeLong, {len(first):,} and {len(second):,} rows"
    return Measure(name, value, max(0.0, value - half), min(1.0, value + half), method, subject)


def bootstrapped(first: Scores, second: Scores, name: str, *seed: int | str) -> Measure:
    """The area with the percentiles of a seeded bootstrap of both groups."""
    value = auc(first, second)
    wins = (first[:, None] > second[None, :]) + 0.5 * (first[:, None] == second[None, :])
    draws = np.random.default_rng(seed_of(*seed, "bootstrap"))
    counts = [
        draws.multinomial(len(group), np.full(len(group), 1 / len(group)), size=DRAWS) / len(group)
        for group in (first, second)
    ]
    areas = ((counts[0] @ wins) * counts[1]).sum(axis=1)
    low, high = np.quantile(areas, [TAIL, 1 - TAIL])
    method = f"bootstrap, {len(first):,} and {len(second):,} tokens"
    return Measure(name, value, float(low), float(high), method)


@dataclass(frozen=True)
class Caught:
    """What a threshold that few of the second group pass finds of the first.

    Attributes:
        rate: of the second group that may pass, at most.
        share: of the first group that passes.
        low: the lower end of its interval.
        high: the upper end.
        passes: the upper end of the share of the whole second population that passes.
    """

    rate: float
    share: float
    low: float
    high: float
    passes: float


def caught(first: Scores, second: Scores, rate: float) -> Caught:
    """The true positive rate at a false positive rate.

    The threshold is the score of `second` that k = floor(rate n) others exceed; of the population
    behind `second` a share distributed as Beta(k + 1, n - k) exceeds it, whatever that population
    is, so `passes` holds although the same rows set the threshold. Given a threshold, the share of
    the first group is binomial: Clopper and Pearson 1934.
    """
    allowed = int(rate * len(second) + 1e-9)
    threshold = np.sort(second)[len(second) - 1 - allowed]
    found = int((first > threshold).sum())
    low, high = exact(found, len(first))
    passes = float(beta.ppf(1 - TAIL, allowed + 1, len(second) - allowed))
    return Caught(rate, found / len(first), low, high, passes)


def exact(hits: int, trials: int) -> tuple[float, float]:
    """Clopper and Pearson's interval of a proportion."""
    low = float(beta.ppf(TAIL, hits, trials - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - TAIL, hits + 1, trials - hits)) if hits < trials else 1.0
    return low, high
