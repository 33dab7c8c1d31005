"""What right guesses about coins prove of a mechanism's privacy, from one run of it.

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023,
https://arxiv.org/abs/2305.08846. Each of m rows is in or out by a fair coin, an auditor sees what
the mechanism releases and guesses r coins, r being fixed beforehand; v guesses are right.

Under (epsilon, 0)-differential privacy each guess, whatever the coins before it, is right with
probability q = e^epsilon / (1 + e^epsilon) at most, so v is at most as large as W ~ Bin(r, q), in
distribution. Under (epsilon, delta) the mechanism behaves so but for events of probability delta,
in which a coin shows: v <= W + F, with F independent of W, at most m and of mean 2 m delta at most
(their theorem 5.2). Hence

    P[right >= v] <= P[W >= v] + sum over i of P[F = i] P[v > W >= v - i]
                  <= P[W >= v] + 2 m delta max over i of P[v > W >= v - i] / i,

where i > v adds nothing to i = v. That is `p_value`; the largest epsilon whose p-value is 5 % or
less is a lower bound that is too high in 5 % of all audits at most.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import binom

LEVEL = 0.05
LARGEST = 64.0  # an epsilon beyond any that guesses can show
MOST = 2**18  # rows beyond which nobody asks for more


def p_value(rows: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The probability of so many right guesses at most, under (epsilon, delta)-privacy.

    Args:
        rows: m, with a coin each.
        guesses: r, at most m.
        right: v, at most r.
        epsilon: at least 0.
        delta: in [0, 1].
    """
    if not 0 <= right <= guesses <= rows:
        raise ValueError(f"{right} right of {guesses} guesses of {rows} coins cannot be")
    q = 1.0 / (1.0 + math.exp(-epsilon))
    beta = float(binom.sf(right - 1, guesses, q))
    if not (delta and right):
        return min(1.0, beta)
    within = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, q))
    alpha = float((within / np.arange(1, right + 1)).max())
    return min(1.0, beta + 2 * rows * delta * alpha)


def lower_bound(rows: int, guesses: int, right: int, delta: float, level: float = LEVEL) -> float:
    """The largest epsilon that so many right guesses refute; 0 where they refute none."""
    if p_value(rows, guesses, right, 0.0, delta) > level:
        return 0.0
    low, high = 0.0, LARGEST
    while high - low > 1e-7:
        middle = (low + high) / 2
        if p_value(rows, guesses, right, middle, delta) > level:
            high = middle
        else:
            low = middle
    return low


def guessed(rows: int) -> int:
    """How many of so many coins are guessed: half, as many in as out, fixed before any score.

    The middle scores tell least, and each wrong guess costs more than an abstention.
    """
    return 2 * (rows // 4)


def reach(rows: int, delta: float) -> float:
    """The bound that a perfect auditor of so many coins would get."""
    return lower_bound(rows, guessed(rows), guessed(rows), delta)


def needed(epsilon: float, delta: float) -> int:
    """The fewest coins, a multiple of 4, of which a perfect auditor refutes epsilon; 0 for none."""

    def refutes(fours: int) -> bool:
        r = guessed(4 * fours)
        return p_value(4 * fours, r, r, epsilon, delta) <= LEVEL

    high = 1
    while not refutes(high):
        high *= 2
        if 4 * high > MOST:
            return 0
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if refutes(middle) else (middle, high)
    return 4 * high


def count_right(scores: Sequence[float], inserted: Sequence[bool]) -> tuple[int, int]:
    """(guesses, right ones): the highest scores are guessed in, as many of the lowest out.

    Equal scores are taken in the order of the rows, which knows nothing of the coins.
    """
    order = np.argsort(-np.asarray(scores, dtype=float), kind="stable")
    coins = np.asarray(inserted, dtype=bool)[order]
    half = guessed(len(coins)) // 2
    right = coins[:half].sum() + (~coins[len(coins) - half :]).sum()
    return 2 * half, int(right)


def exposures(scores: Sequence[float], inserted: Sequence[bool]) -> list[float]:
    """log2 |R| - log2 rank of each inserted row, in bits; R: itself and all rows left out.

    Carlini et al., "The Secret Sharer", USENIX Security 2019, https://arxiv.org/abs/1802.08232,
    definition 5. A model that never saw the row ranks it anywhere: more than b bits with
    probability 2^-b. Equal scores rank it below.
    """
    out = np.sort([s for s, coin in zip(scores, inserted, strict=True) if not coin])
    whole = len(out) + 1
    return [
        math.log2(whole) - math.log2(whole - int(np.searchsorted(out, s, side="left")))
        for s, coin in zip(scores, inserted, strict=True)
        if coin
    ]


def median(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and its 95 % interval from order statistics, whatever the distribution."""
    ordered, count = sorted(values), len(values)
    low = int(binom.ppf(0.025, count, 0.5))
    return float(np.median(ordered)), ordered[max(0, low - 1)], ordered[min(count - 1, count - low)]
