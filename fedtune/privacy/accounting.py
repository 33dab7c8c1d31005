"""Events, and what they cost.

An event says what happened: so many sums were released with noise, over so large a share of the
units. What that costs is the accountants' business: privacy loss distributions (PLD), which are
tight, and Renyi divergences (RDP), an upper bound beside them. Both are dp-accounting's, but for
the divergences of Skellam noise, of which it knows nothing. Central limit (GDP) accounting is not
offered: it understates.

References:
    Koskela et al. 2020, https://arxiv.org/abs/1906.03049 (PLD); Mironov et al. 2019,
    https://arxiv.org/abs/1908.10530 (RDP with Poisson sampling); Wang et al. 2019,
    https://arxiv.org/abs/1808.00087 (without replacement); Bun and Steinke 2016,
    https://arxiv.org/abs/1605.02065 (zCDP).
"""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

import dp_accounting
from dp_accounting import pld, rdp

from fedtune.privacy import skellam

INTERVAL = 1e-3  # of the discretised privacy loss; the error is always upwards
CELLS = 1e5  # of a privacy loss distribution at most, so that a hopeless noise costs no minutes
HOPELESS = 1e4  # an epsilon beyond which only RDP is computed
SMALLEST = 1e-5  # delta of nothing spent


@dataclass(frozen=True)
class Event:
    """Releases of one kind.

    Attributes:
        noise: standard deviation over sensitivity, the sensitivity being that of the neighbouring
            relation: a clip C if a unit is added or removed, 2 C if it is replaced.
        sampling: "all" (every unit is in every sum), "poisson" (each by itself with probability
            `rate`) or "fixed" (a subset of fixed size; the relation is then replace-one).
        rate: the share of the units in a sum.
        count: how many sums.
        population: units there are; only "fixed" needs it.
        steps: of a grid of integers that make up the sensitivity, where the noise is Skellam's; 0
            where it is Gaussian.
    """

    noise: float
    sampling: str = "all"
    rate: float = 1.0
    count: int = 1
    population: int = 0
    steps: int = 0

    @property
    def tight(self) -> bool:
        """Whether PLD applies."""
        return self.sampling != "fixed" and not self.steps


@dataclass(frozen=True)
class Cost:
    """An epsilon for one delta, from both accountants.

    Attributes:
        delta: of (epsilon, delta).
        pld: epsilon by PLD; infinite where PLD does not apply (sampling without replacement,
            Skellam noise).
        rdp: epsilon by RDP.
        observed_pld: epsilon against who also sees which units were sampled: nothing is amplified.
        observed_rdp: the same by RDP.
        rho: of zCDP against the latter; infinite where none is known (Skellam noise).
    """

    delta: float
    pld: float
    rdp: float
    observed_pld: float
    observed_rdp: float
    rho: float

    @property
    def epsilon(self) -> float:
        """Of the models alone: what budgets are compared with."""
        return self.pld if math.isfinite(self.pld) else self.rdp

    @property
    def observed(self) -> float:
        """Against who also sees which units were sampled."""
        return self.observed_pld if math.isfinite(self.observed_pld) else self.observed_rdp


def merged(events: Sequence[Event]) -> tuple[Event, ...]:
    """The events with equal ones counted together, in a fixed order."""
    counts: dict[Event, int] = {}
    for event in events:
        kind = replace(event, count=1)
        counts[kind] = counts.get(kind, 0) + event.count
    kinds = sorted(counts, key=lambda e: (e.noise, e.sampling, e.rate, e.population, e.steps))
    return tuple(replace(kind, count=counts[kind]) for kind in kinds if counts[kind])


def cost(events: Sequence[Event], delta: float, interval: float = INTERVAL) -> Cost:
    """What all `events` together cost.

    Raises:
        ValueError: a delta outside (0, 1), a noise of 0 or less, or a rate that is none.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must be above 0 and below 1, not {delta}")
    for event in events:
        sampled = event.sampling != "all"
        priced = event.noise > 0 and 0 < event.rate <= 1 and event.count >= 0
        if not priced or (event.steps and sampled):
            raise ValueError(f"no accountant can price {event}")
    return _cost(merged(events), delta, interval)


def epsilon(events: Sequence[Event], delta: float, interval: float = INTERVAL) -> float:
    """`Cost.epsilon` alone, for searches and budgets: seldom more than one accountant is asked."""
    return _epsilon(merged(events), delta, interval)


@functools.lru_cache(maxsize=4096)
def _epsilon(events: tuple[Event, ...], delta: float, interval: float) -> float:
    if not events:
        return 0.0
    rho = sum(event.count / (2 * event.noise**2) for event in events)
    rough = rho + 2 * math.sqrt(rho * math.log(1 / delta))  # without amplification
    if rough > HOPELESS or not all(event.tight for event in events):
        rough = _rdp(events, delta)
    tight = _pld(events, delta, interval, rough / 10)
    return tight if math.isfinite(tight) else rough


@functools.lru_cache(maxsize=4096)
def _cost(events: tuple[Event, ...], delta: float, interval: float) -> Cost:
    if not events:
        return Cost(delta, 0.0, 0.0, 0.0, 0.0, 0.0)
    seen = merged([replace(event, sampling="all", rate=1.0, population=0) for event in events])
    rough, seen_rough = _rdp(events, delta), _rdp(seen, delta)
    return Cost(
        delta,
        _pld(events, delta, interval, rough),
        rough,
        _pld(seen, delta, interval, seen_rough),
        seen_rough,
        math.inf if events[0].steps else sum(e.count / (2 * e.noise**2) for e in events),
    )


def _dp_event(event: Event) -> dp_accounting.DpEvent:
    one: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(event.noise)
    if event.sampling == "poisson":
        one = dp_accounting.PoissonSampledDpEvent(event.rate, one)
    elif event.sampling == "fixed":
        size = round(event.rate * event.population)
        one = dp_accounting.SampledWithoutReplacementDpEvent(event.population, size, one)
    return dp_accounting.SelfComposedDpEvent(one, event.count)


def _pld(events: tuple[Event, ...], delta: float, interval: float, rough: float) -> float:
    """Epsilon by PLD; `rough` is RDP's, which bounds it, and with it the work."""
    if rough > HOPELESS or not all(event.tight for event in events):
        return math.inf
    accountant = pld.PLDAccountant(value_discretization_interval=max(interval, rough / CELLS))
    for event in events:
        accountant.compose(_dp_event(event))
    return float(accountant.get_epsilon(delta))


@functools.lru_cache(maxsize=4096)
def _rdp(events: tuple[Event, ...], delta: float) -> float:
    if any(event.steps for event in events):
        if not all(event.steps for event in events):
            raise ValueError("no accountant can price Gaussian and Skellam noise together")
        divergences = [
            sum(e.count * skellam.divergence(e.noise, e.steps, order) for e in events)
            for order in skellam.ORDERS
        ]
        return float(rdp.compute_epsilon(skellam.ORDERS, divergences, delta)[0])
    fixed = any(event.sampling == "fixed" for event in events)
    relation = dp_accounting.NeighboringRelation
    accountant = rdp.RdpAccountant(
        neighboring_relation=relation.REPLACE_ONE if fixed else relation.ADD_OR_REMOVE_ONE
    )
    with _quiet():
        for event in events:
            accountant.compose(_dp_event(event))
        return float(accountant.get_epsilon(delta))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep absl from telling of each order that it leaves out; leaving one out is safe."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def accountant() -> str:
    """The accountants' name and version, for the ledger."""
    return f"dp-accounting {version('dp-accounting')}"
