"""The noise that an epsilon needs: the accountant turned round."""

import functools
import math
from dataclasses import replace

from scipy.optimize import brentq

from fedtune.errors import RecipeError
from fedtune.privacy import accounting
from fedtune.privacy.accounting import Event

COARSE = 1e-2  # interval of the privacy losses while the noise is not yet bracketed
RESOLUTION = 1e-4  # of epsilon; finer intervals take minutes where epsilon is in the hundreds
LOW, HIGH = 1e-2, 1e5  # standard deviation over sensitivity
STEP = 1e-4  # relative


@functools.lru_cache(maxsize=1024)
def noise_for(
    epsilon: float, delta: float, event: Event, interval: float = accounting.INTERVAL
) -> float:
    """The least noise, to 0.01 %, with which `event` costs no more than `epsilon`.

    Args:
        epsilon: above 0.
        delta: of (epsilon, delta).
        event: its noise does not matter.
        interval: of PLD accounting.

    Raises:
        RecipeError: no noise is enough.
    """
    if event.count == 0:
        return LOW
    rough = _solved(epsilon, delta, event, COARSE, 1.0, 2.0)
    fine = max(interval, epsilon * RESOLUTION)
    return rough if fine >= COARSE else _solved(epsilon, delta, event, fine, rough, 1.1)


def _solved(
    epsilon: float, delta: float, event: Event, interval: float, guess: float, factor: float
) -> float:
    """The root, searched for outwards from `guess` in steps of `factor`, then between two."""

    def excess(logarithm: float) -> float:
        cost = accounting.epsilon([replace(event, noise=math.exp(logarithm))], delta, interval)
        return math.log(max(cost, 1e-12) / epsilon)

    low = high = math.log(guess)
    while excess(high) > 0:
        low, high = high, high + math.log(factor)
        if high > math.log(HIGH):
            raise RecipeError(
                f"privacy.epsilon = {epsilon} cannot be reached with {event.count} noisy sums and "
                f"delta = {delta:.3g}. Take a larger epsilon, or fewer rounds and steps."
            )
    while low == high or excess(low) <= 0:
        low, high = low - math.log(factor), low
        if low < math.log(LOW):
            return LOW
    found = float(brentq(excess, low, high, xtol=STEP / 4))
    while excess(found) > 0:
        found += STEP / 4
    return math.exp(found)
