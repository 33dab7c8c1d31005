"""Noise that is a sum of shares: the difference of two Poisson numbers, on a grid of integers.

Shares add up to a share of their own kind, so the sum of clients' shares behind masks is the noise
of a trusted coordinator, which nobody ever held. Where a contribution is a vector of integers of
norm Delta_2 at most and the noise of a coordinate has variance mu, the Renyi divergence of integer
order alpha > 1 is at most

    alpha Delta_2^2 / (2 mu)
        + min(((2 alpha - 1) Delta_2^2 + 6 Delta_1) / (4 mu^2), 3 Delta_1 / (2 mu))

Integers have Delta_1 <= Delta_2^2, whatever their number, since |x| <= x^2. So with mu = (z S)^2,
where S steps of the grid are the sensitivity, the cost depends on z and S alone, and beyond the
Gaussian alpha / (2 z^2) by a part in S^2.

References:
    Agarwal, Kairouz and Liu, "The Skellam Mechanism for Differentially Private Federated Learning",
    NeurIPS 2021, https://arxiv.org/abs/2110.04995, corollary 3.6 (the bound), section 4 (shares
    behind secure aggregation). Hoermann 1993, "The transformed rejection method for generating
    Poisson random variables", Insurance: Mathematics and Economics 12, 39-45, algorithm PTRS.
    Loader 2000, "Fast and Accurate Computation of Binomial Probabilities" (Poisson probabilities
    without cancellation).
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedtune.privacy import noise
from fedtune.privacy.normal import Doubles, logarithm

LEAST_STEPS = 2**16  # of a sensitivity; ledgers charge every finer grid as this one
LEAST_MEAN = 2**14  # of a Poisson number, where the series below are exact to double precision
TAIL = 12.0  # standard deviations that noise exceeds with probability below 2^-102
GENERATOR = "AES-256-CTR, PTRS, difference of two Poisson numbers"
ORDERS = (*range(2, 129), *(2**n + 2 ** (n - 1) * half for n in range(7, 21) for half in (0, 1)))
TERMS = 12  # of the series of (1 + x) log(1 + x) - x

Integers = NDArray[np.int64]


def divergence(noise: float, steps: float, order: int) -> float:
    """The bound above, of one sum.

    Args:
        noise: z: the noise's standard deviation over the sensitivity.
        steps: S: the sensitivity in steps of the grid.
        order: alpha.
    """
    variance, square = (noise * steps) ** 2, steps**2
    small = ((2 * order - 1) * square + 6 * square) / (4 * variance**2)
    return order / (2 * noise**2) + min(small, 3 * square / (2 * variance))


def mean_of_share(deviation: float, needed: int) -> int:
    """The mean of both Poisson numbers of a share, `needed` of which have that deviation or more.

    Args:
        deviation: of their sum, in steps.
        needed: how many there are at least.
    """
    return math.ceil(deviation**2 / (2 * needed))


def largest(shares: int, mean: int) -> float:
    """What a coordinate of so many shares exceeds with probability below 2^-102, in steps.

    Chernoff: P(|X| >= r sigma) <= 2 exp(-r^2 / 2 + r^4 / (24 sigma^2)), sigma^2 = 2 shares mean.
    """
    return TAIL * math.sqrt(2 * shares * mean)


def share(key: bytes, count: int, mean: int, *context: bytes | int | str) -> Integers:
    """`count` numbers, each the difference of two Poisson numbers, fixed by key and context.

    Args:
        key: a client's secret.
        count: how many.
        mean: of each Poisson number.
        context: everything that makes this draw another one.

    Raises:
        ValueError: a mean for which the sampler is not exact.
    """
    if mean < LEAST_MEAN:
        raise ValueError(f"no share of noise has a mean of {mean}")
    draw, values = noise.stream(key, *context), np.empty(count, np.int64)
    for start in range(0, count, noise.CHUNK):
        part = values[start : start + noise.CHUNK]
        part[:] = _deviations(draw, len(part), mean)
        part -= _deviations(draw, len(part), mean)
    return values


def _deviations(draw: Callable[[int], Doubles], count: int, mean: int) -> Integers:
    """Poisson numbers less their mean."""
    values, left = np.empty(count, np.int64), np.arange(count)
    while len(left):
        uniform = draw(2 * len(left)).reshape(2, -1)
        proposed, accepted = _proposed(uniform[0], uniform[1], mean)
        values[left[accepted]] = proposed[accepted].astype(np.int64)
        left = left[~accepted]
    return values


def _proposed(first: Doubles, second: Doubles, mean: int) -> tuple[Doubles, NDArray[np.bool_]]:
    """PTRS without its shortcuts: what is proposed, as deviations, and whether it is accepted.

    A uniform u in (-1/2, 1/2) becomes k = floor((2 a / (1/2 - |u|) + b) u + mean + 0.43), accepted
    with probability p(k) (a / (1/2 - |u|)^2 + b) / h, where p is the Poisson probability and h is
    such that this is at most 1 everywhere.
    """
    b = 0.931 + 2.53 * math.sqrt(mean)
    a = -0.059 + 0.02483 * b
    h = 1.1239 + 1.1328 / (b - 3.4)
    u = first - 0.5
    room = 0.5 - np.abs(u)
    deviation = np.floor((2 * a / room + b) * u + 0.43)
    x = deviation / mean
    # A quarter of the mean away (32 deviations at least) the series would not hold; nor would any
    # number be accepted.
    inside = np.abs(x) < 0.25
    x = np.where(inside, x, 0.0)
    total = np.where(inside, deviation, 0.0) + float(mean)
    root = np.sqrt((2 * math.pi) * total)
    bound = second * h / (a / (room * room) + b) * root
    exponent = np.where(inside, deviation, 0.0) * x * _series(x) + 1 / (12 * total)
    return deviation, inside & (logarithm(bound) <= -exponent)


def _series(x: Doubles) -> Doubles:
    """((1 + x) log(1 + x) - x) / x^2 = 1/2 - x/6 + x^2/12 - ..."""
    total = np.full_like(x, 1 / (TERMS * (TERMS + 1)))
    for i in range(TERMS - 1, 0, -1):
        total = 1 / (i * (i + 1)) - x * total
    return total
