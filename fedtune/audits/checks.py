"""What a release path shows from outside: checks of its draws with a canary and without.

`separated` is the bound of epsilon. It sees most faults, and the other checks those that it cannot:

shifted       how far the canary moves the mean, against the clip: whatever unbounds a contribution
spread        each tensor's noise against the claim: a tensor without noise, a number divided twice
steady        the noise with the canary against that without it: a denominator that counts replies
grained       the step of the noise: half precision, in which gaps tell noise from data
predicted     the same global seeds twice: noise that anybody can repeat and subtract
repeated      one key with other data: noise that cancels in the difference of two releases
refused       NaN, infinity and overflow in a change: a norm that compares with nothing
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedtune.audits import draws
from fedtune.audits.draws import Array, Interval
from fedtune.audits.finding import Measure
from fedtune.audits.paths import Path
from fedtune.audits.sides import Sides, clients_of, keys_of, quiet, sides_of, statistics, whole
from fedtune.privacy import accounting
from fedtune.privacy.accounting import Event
from fedtune.privacy.mechanism import Mechanism

DRAWS = 2000  # of each side; half of them choose, half of them count
TOLERANCE = 1.05  # of spread and rates: smaller faults are not told from chance
SURE = 1.6  # half widths of an interval by which a shift must exceed, 3.1 standard errors
GRAIN = 2.0**-14  # of the noise's standard deviation; half precision has about 2^-11
LINKED = 0.2  # a correlation of what should be independent
VISIBLE = (0.5, 4.0)  # claims that so many draws can refute
REFERENCE = 2.0  # noise over sensitivity where a claim is outside: epsilon 1.99 for delta 1e-5
PAIRS = 24  # of releases after the same global seeds


@dataclass(frozen=True)
class Check:
    """One of the numbers, and whether it contradicts the claim.

    Attributes:
        measure: the number.
        broken: what is wrong, "" where nothing is.
        control: what the same draws show of a planted fault, "" without one.
        seen: whether they show it.
    """

    measure: Measure
    broken: str = ""
    control: str = ""
    seen: bool = True


def checked(path: Path, count: int = DRAWS) -> list[Check]:
    """Everything that a release path shows by itself."""
    sides = sides_of(path, count)
    epsilon = claimed(path.mechanism)
    found = [separated(path.mechanism, sides, "the run's own noise")]
    if not VISIBLE[0] <= epsilon <= VISIBLE[1]:
        own = path.mechanism
        louder = replace(own, noise=REFERENCE * own.sensitivity / own.clip)
        other = replace(path, mechanism=louder)
        found.append(
            separated(louder, sides_of(other, count), f"the same code, z = {louder.noise}")
        )
    mechanism = path.mechanism
    return [
        *found,
        shifted(mechanism, sides),
        spread(mechanism, sides),
        steady(sides),
        grained(sides),
        predicted(path, sides),
        repeated(sides),
        refused(path),
    ]


def claimed(mechanism: Mechanism) -> float:
    """Epsilon of one release, to who knows that the canary's unit was asked."""
    event = Event(mechanism.sigma / mechanism.sensitivity)
    return accounting.epsilon([event], mechanism.delta)


def separated(mechanism: Mechanism, sides: Sides, subject: str) -> Check:
    """The bound of epsilon, and beside it the one that a quarter of the noise would give."""
    limit, half = claimed(mechanism), len(sides.present) // 2
    most = draws.largest(half, mechanism.delta)
    found, fault = (
        draws.separation(*statistics(one), mechanism.delta) for one in (sides, quiet(sides))
    )
    measure = Measure(
        "epsilon of one release, at least",
        found.epsilon,
        found.epsilon,
        None,
        f"Clopper-Pearson over {half:,} draws a side, {most:.2f} at most",
        subject,
        limit,
    )
    told = f"epsilon is at least {found.epsilon:.2f}, claimed {limit:.2f} ({subject})"
    control = f"a quarter of the noise would give {fault.epsilon:.2f} where {limit:.2f} is claimed"
    return Check(measure, told if found.epsilon > limit else "", control, fault.epsilon > limit)


def shifted(mechanism: Mechanism, sides: Sides) -> Check:
    """How far the canary moves the sum, on the second half of the draws."""
    half = len(sides.present) // 2
    found = sides.present[:half].mean(0) - sides.absent[:half].mean(0)
    allowed = mechanism.sensitivity / mechanism.clip
    scale = mechanism.denominator / mechanism.clip
    shifts = []
    for way in (-sides.canary, found):
        if length := float(np.linalg.norm(way)):
            along = [side[half:] @ (way / length) * scale for side in (sides.present, sides.absent)]
            shifts.append(draws.shift(*along))
    worst = max(shifts, key=lambda one: one.low)
    measure = measured("the canary's shift of the sum, over the clip", worst, "normal", allowed)
    told = f"one unit moves the sum by {worst.value:.3g} clips, {allowed:g} allowed"
    least = worst.value - SURE * (worst.value - worst.low)
    return Check(measure, told if least > allowed else "")


def spread(mechanism: Mechanism, sides: Sides) -> Check:
    """The least noise of any tensor, over the claimed."""
    promised = mechanism.sigma / mechanism.denominator
    by_name = {name: draws.deviation(sides.absent[:, at]) for name, at in sides.names.items()}
    name, least = min(by_name.items(), key=lambda item: item[1].value)
    ratio = Interval(*(number / promised for number in (least.value, least.low, least.high)))
    measure = measured("noise over the claimed noise, least tensor", ratio, "chi squared", None)
    told = f"the noise of '{name}' is {ratio.value:.3g} times the claimed"
    return Check(measure, told if ratio.high < 1 / TOLERANCE else "")


def steady(sides: Sides) -> Check:
    """The noise with the canary over that without it."""
    found = draws.ratio(draws.deviation(sides.present), draws.deviation(sides.absent))
    measure = measured("noise with the canary over noise without", found, "log-normal", None)
    told = f"the noise is {found.value:.3g} times as large with the canary as without it"
    wrong = found.low > TOLERANCE or found.high < 1 / TOLERANCE
    return Check(measure, told if wrong else "")


def grained(sides: Sides) -> Check:
    """How coarse the noise is."""
    found = draws.grain(sides.absent, sides.size)
    measure = measured("grain of the noise over its size", found, "equal pairs of draws", GRAIN)
    told = f"noise comes in steps of {found.value:.2g} of its size: its gaps tell it from data"
    return Check(measure, told if found.low > GRAIN else "")


def predicted(path: Path, sides: Sides) -> Check:
    """Two keys after the same seeds of every global generator."""
    collected = path.collected(clients_of(path)[1])
    noises: list[list[Array]] = [[], []]
    for number in range(PAIRS):
        for which in (0, 1):
            with _seeded(number):
                key = keys_of(1, f"pair {number} {which}")[0]
                noises[which].append(whole(path.released(collected, key).mean))
    kept = sides.size > 0
    centre, size = sides.absent.mean(0)[kept], sides.size[kept]
    first, second = ((np.stack(drawn)[:, kept] - centre) / size for drawn in noises)
    found = draws.correlation(first, second)
    title = "correlation of two keys' noise after the same global seeds"
    told = "noise follows from the seeds of global generators: anybody can subtract it"
    return Check(measured(title, found, "Fisher", LINKED), told if found.low > LINKED else "")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Every global generator seeded, and afterwards as it was."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


def repeated(sides: Sides) -> Check:
    """One key with the canary and without: the noise must be another one."""
    kept = sides.size > 0
    first, second = (
        (side - side.mean(0))[:, kept] / sides.size[kept] for side in (sides.present, sides.absent)
    )
    found = draws.correlation(first, second)
    title = "correlation of one key's noise on other data"
    told = "the same key hides other data by the same noise, which their difference is free of"
    return Check(measured(title, found, "Fisher", LINKED), told if found.low > LINKED else "")


def refused(path: Path) -> Check:
    """Numbers that no norm bounds, in one place of the canary's change."""
    wrong = 0
    for value in (math.nan, math.inf, -math.inf, 1e38):
        present, _ = clients_of(path)
        change = {name: tensor.clone() for name, tensor in present[0].change.items()}
        next(iter(change.values())).view(-1)[0] = value
        try:
            collected = path.collected([replace(present[0], change=change), *present[1:]])
            done = path.released(collected, keys_of(1, "refused")[0])
        except FloatingPointError:
            continue
        vectors = [*done.mean.values(), *done.more.values()]
        wrong += sum(int((~vector.isfinite()).sum()) for vector in vectors)
    told = f"{wrong} released numbers are not finite, where a change is not"
    measure = Measure("released numbers that are not finite", wrong, allowed=0.0)
    return Check(measure, told if wrong else "")


def measured(name: str, found: Interval, method: str, allowed: float | None) -> Measure:
    """A measure with its interval."""
    return Measure(name, found.value, found.low, found.high, method, "", allowed)
