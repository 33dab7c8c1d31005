"""Intervals and tests for few seeds, and the bootstrap that also draws clients.

Whoever compares two arms must pair them: the same seeds, and within a seed the same clients. A
`Resampling` draws once and is then asked about each arm, so its draws are paired too.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

LEVEL = 0.95
DRAWS = 2000
EXACT = 16  # seeds up to which every pattern of signs is tried
Array = npt.NDArray[np.float64]
Sample = Mapping[str, Array]  # metric sums of one seed: name -> (clients, numbers)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of the mean, None for fewer than two values."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def paired_t(differences: Sequence[float]) -> float | None:
    """Two-sided p of the t test that paired differences have mean 0.

    None for fewer than two, and where all are equal but not 0: their spread is then unknown, and t
    would call any such difference certain. 1 where all are 0.
    """
    if len(differences) < 2:
        return None
    largest = max(abs(d) for d in differences)
    if largest == 0:
        return 1.0
    spread = float(np.std(differences, ddof=1))
    if spread <= 1e-12 * largest:
        return None
    t = float(np.mean(differences)) / (spread / math.sqrt(len(differences)))
    return float(2 * stats.t.sf(abs(t), len(differences) - 1))


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of the permutation test that flips the signs of paired differences.

    All 2^n patterns are tried for up to 16 differences, so the least that n can give is 2^(1-n):
    .25 for three seeds. For more, 65,535 patterns are drawn beside the one observed.
    """
    n = len(differences)
    if n <= EXACT:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        draws = np.random.default_rng(0).integers(0, 2, (2**EXACT - 1, n))
        signs = np.vstack([np.ones(n), 1.0 - 2.0 * draws])
    sums = np.abs(signs @ np.asarray(differences))
    # The first pattern is the observed one; equal sums may differ in their last bit.
    return float(np.mean(sums >= sums[0] * (1 - 1e-9)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p values; None stays None and does not count.

    Holm 1979, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6.
    """
    tests = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, place) in enumerate(tests):
        least = max(least, min(1.0, (len(tests) - rank) * p))
        adjusted[place] = least
    return adjusted


def metric_of(metric: str, sums: Mapping[str, Array]) -> Array:
    """`report.summarise` for one metric and many sums at once.

    Args:
        metric: its name.
        sums: name -> array (..., numbers); where they are of no rows the metric is NaN.

    Raises:
        KeyError: the sums do not have the metric.
    """
    if metric == "perplexity":
        return np.exp(np.minimum(metric_of("loss", sums), 700.0))
    if metric not in ("macro_f1", "precision", "recall"):
        total, count = sums[metric][..., 0], sums[metric][..., 1]
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    right, predicted, actual = (sums[k] for k in ("true_positive", "predicted", "actual"))
    below = {"precision": predicted, "recall": actual, "macro_f1": (predicted + actual) / 2}[metric]
    shares = np.divide(right, below, out=np.zeros_like(right), where=below > 0)
    seen = ((predicted > 0) | (actual > 0)).sum(-1)
    return np.asarray(shares.sum(-1) / np.maximum(1, seen))


class _Summed(dict[str, Array]):
    """Sums over drawn clients, made when a metric asks for them."""

    def __init__(self, times: Array, sample: Sample) -> None:
        super().__init__()
        self.times, self.sample = times, sample

    def __missing__(self, name: str) -> Array:
        return self.setdefault(name, self.times @ self.sample[name])


@dataclass(frozen=True)
class Resampling:
    """Draws of a two-stage bootstrap: seeds, then clients within each drawn seed.

    Attributes:
        clients: how many there are in each seed; 1 where the seed is drawn as a whole.
        draws: how many.
        seed: of the generator; the same clients, draws and seed give the same draws.
    """

    clients: tuple[int, ...]
    draws: int = DRAWS
    seed: int = 0

    @functools.cached_property
    def _drawn(self) -> tuple[npt.NDArray[np.int64], list[Array]]:
        """A seed for each place and draw, and how often each of a seed's clients is drawn there.

        A seed that is drawn twice has other clients in each of its places.
        """
        drawn, seeds = np.random.default_rng(self.seed), len(self.clients)
        chosen = drawn.integers(0, seeds, (seeds, self.draws))
        times = [
            drawn.multinomial(n, [1 / n] * n, (seeds, self.draws)).astype(np.float64)
            for n in self.clients
        ]
        return chosen, times

    def means(self, metric: str, samples: Sequence[Sample]) -> Array:
        """(draws,) the mean over the drawn seeds of `metric` over the drawn clients' rows.

        Args:
            metric: its name.
            samples: one for each seed, with as many clients as `clients` says.
        """
        chosen, times = self._drawn
        values = np.stack(
            [
                metric_of(metric, _Summed(drawn, sample))
                for drawn, sample in zip(times, samples, strict=True)
            ]
        )
        places, draws = np.arange(len(chosen))[:, None], np.arange(self.draws)
        return np.asarray(values[chosen, places, draws].mean(0))


def percentiles(draws: Array) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrap draws."""
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Standing:
    """An arm's rank over bootstrap draws, 1 being best.

    Attributes:
        mean: of the rank.
        low: of its 95 % interval.
        high: of the same.
        best: share of draws in which it is first; ties share.
    """

    mean: float
    low: float
    high: float
    best: float


def standings(draws: Array, higher: bool) -> list[Standing]:
    """One for each row of `draws`, (arms, draws) of one `Resampling`; `higher` is better."""
    ranks = np.asarray(stats.rankdata(-draws if higher else draws, axis=0))
    first = ranks == ranks.min(0)
    best = (first / first.sum(0)).mean(1)
    return [
        Standing(float(rank.mean()), *percentiles(rank), float(share))
        for rank, share in zip(ranks, best, strict=True)
    ]
