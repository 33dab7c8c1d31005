"""Epsilon against published numbers, closed forms and another accountant."""

import itertools
import math

import numpy as np
import pytest
from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from fedtune.errors import RecipeError
from fedtune.privacy import accounting
from fedtune.privacy.accounting import Event, cost, epsilon, merged
from fedtune.privacy.calibration import noise_for

POISSON = Event(1.0, "poisson", 0.1, 100)  # 100 of 1000 clients, z = 1, 100 rounds


@pytest.mark.parametrize(
    ("delta", "pld", "coarse", "rdp", "observed", "observed_rdp"),
    [
        (1e-5, 7.0466, 7.0492, 7.9039, 91.817, 96.1163),
        (1e-3, 4.7844, 4.7866, 5.6551, 80.033, 85.1754),
    ],
)
def test_a_tenth_of_a_thousand_clients(
    delta: float, pld: float, coarse: float, rdp: float, observed: float, observed_rdp: float
) -> None:
    found = cost([POISSON], delta)
    assert found.pld == pytest.approx(pld, abs=1e-4)
    assert found.epsilon == found.pld
    assert found.rdp == pytest.approx(rdp, abs=1e-4)
    assert found.observed_pld == pytest.approx(observed, abs=1e-3)
    assert found.observed_rdp == pytest.approx(observed_rdp, abs=1e-4)
    assert found.rho == 50
    assert cost([POISSON], delta, 1e-2).pld == pytest.approx(coarse, abs=1e-4)


@pytest.mark.parametrize(
    ("noise", "delta", "expected"),
    [(1.0, 1e-5, 14.0538), (1.0, 1e-3, 10.8154), (0.5, 1e-5, 83.9369), (0.5, 1e-3, 79.3317)],
)
def test_a_fixed_number_of_clients_costs_more_than_coins(
    noise: float, delta: float, expected: float
) -> None:
    """Noise 0.5 is z = 1: a replacement moves the sum by 2 C."""
    found = cost([Event(noise, "fixed", 0.1, 100, population=1000)], delta)
    assert found.epsilon == pytest.approx(expected, abs=1e-4)
    assert math.isinf(found.pld)


TABLE = """
    1 1 4.3772 3.1387 2.3178     20 2 11.4800 8.7873 7.0246
    1 2 1.9931 1.3523 0.9195     20 4 4.9833 3.6051 2.6936
    10 4 3.3414 2.3518 1.6924    20 8 2.2581 1.5460 1.0668
    10 8 1.5347 1.0212 0.6714    20 16 1.0471 0.6760 0.4197
    10 16 0.7162 0.4476 0.2588   20 24 0.6715 0.4172 0.2380
    20 1 28.3735 23.0635 19.6037 100 1 91.8173 80.0325 72.3663
"""


def _exact(mu: float, delta: float) -> float:
    """Balle and Wang 2018, theorem 8: delta of epsilon for a Gaussian mechanism, turned round."""

    def excess(eps: float) -> float:
        tail = math.exp(eps + norm.logcdf(-mu / 2 - eps / mu))
        return float(norm.cdf(mu / 2 - eps / mu)) - tail - delta

    return float(brentq(excess, 0, 1000))


def test_without_sampling_it_is_the_closed_form() -> None:
    numbers = [float(number) for number in TABLE.split()]
    rows = [numbers[start : start + 5] for start in range(0, len(numbers), 5)]
    assert len(rows) == 12
    for count, noise, *epsilons in rows:
        for delta, expected in zip((1e-5, 1e-3, 1e-2), epsilons, strict=True):
            assert _exact(math.sqrt(count) / noise, delta) == pytest.approx(expected, abs=1e-4)
            event = Event(noise, count=int(count))
            assert epsilon([event], delta) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("steps", "noises"),
    [(63, (0.851, 0.603, 0.432)), (630, (1.470, 0.816, 0.579)), (1890, (2.563, 1.077, 0.698))],
)
def test_noise_for_an_epsilon_of_2000_records(steps: int, noises: tuple[float, ...]) -> None:
    """The published noise is at interval 1e-2; the ledger's finer one needs no more of it."""
    delta = 2000**-1.1
    for target, noise in zip((1.0, 3.0, 8.0), noises, strict=True):
        event = Event(1.0, "poisson", 32 / 2000, steps)
        assert noise_for(target, delta, event, 1e-2) == pytest.approx(noise, abs=1e-3)
        found = noise_for(target, delta, event)
        assert 0.85 * noise < found <= noise
        exact = Event(found, "poisson", 32 / 2000, steps)
        assert 0.99 * target < epsilon([exact], delta) <= target


@pytest.mark.parametrize(
    ("clients", "size", "noise"),
    [(100, 10, 0.704), (1000, 100, 0.805), (1000, 50, 0.608), (10000, 1000, 0.896)],
)
def test_noise_for_an_epsilon_of_clients(clients: int, size: int, noise: float) -> None:
    """The published noise reaches epsilon 7.83 to 7.99, so the least is up to 1 % below it."""
    event = Event(1.0, "poisson", size / clients, 100)
    assert 0.99 * noise < noise_for(8.0, clients**-1.1, event) <= noise


GRID = [
    *itertools.product((0.01, 0.1), (0.7, 1.0, 2.0), (10, 100)),
    *itertools.product((0.02, 0.3), (0.8, 4.0), (5, 200)),
]


def _prv(noise: float, rate: float, count: int) -> tuple[float, float, float]:
    """PRV's lower bound, estimate and upper bound; the bounds are 0.04 apart."""
    with np.errstate(over="ignore"):  # it subtracts infinities where the loss is beyond 700
        prv = PRVAccountant(
            prvs=PoissonSubsampledGaussianMechanism(rate, noise),
            max_self_compositions=count,
            eps_error=0.02,
            delta_error=1e-9,
        )
        low, estimate, high = prv.compute_epsilon(1e-5, count)
    return low, estimate, high


def _compared(grid: list[tuple[float, float, int]]) -> None:
    """PRV (Gopi et al. 2021) within 0.5 %; RDP above; monotone in noise, rate and count."""
    for rate, noise, count in grid:
        found = cost([Event(noise, "poisson", rate, count)], 1e-5)
        _, other, _ = _prv(noise, rate, count)
        assert abs(found.pld - other) <= 0.005 * other + 5e-4, (rate, noise, count)
        assert found.rdp >= found.pld
        assert found.observed >= found.epsilon
        for dearer in (
            Event(noise / 1.1, "poisson", rate, count),
            Event(noise, "poisson", rate * 1.1, count),
            Event(noise, "poisson", rate, count + 1),
        ):
            assert epsilon([dearer], 1e-5) > found.pld


def test_another_accountant_agrees_and_more_noise_costs_less() -> None:
    _compared(GRID[1::5])


@pytest.mark.slow
def test_another_accountant_agrees_everywhere() -> None:
    assert len(GRID) == 20
    _compared(GRID)


def test_events_compose_in_any_order_and_equal_ones_add_up() -> None:
    a, b = Event(1.0, "poisson", 0.1, 3), Event(2.0)
    assert merged([a, b, a]) == merged([b, Event(1.0, "poisson", 0.1, 6)])
    assert cost([a, b, a], 1e-5) == cost([b, Event(1.0, "poisson", 0.1, 6)], 1e-5)
    assert cost([], 1e-5).epsilon == 0
    both = cost([a, b], 1e-5)
    assert max(cost([a], 1e-5).pld, cost([b], 1e-5).pld) < both.pld < both.rdp


@pytest.mark.parametrize(
    ("event", "delta"),
    [
        (Event(0.0), 1e-5),
        (Event(-1.0), 1e-5),
        (Event(1.0, "poisson", 1.5), 1e-5),
        (Event(1.0, "poisson", 0.0), 1e-5),
        (Event(math.nan), 1e-5),
        (Event(1.0), 0.0),
        (Event(1.0), 1.0),
    ],
)
def test_what_has_no_price_is_refused(event: Event, delta: float) -> None:
    with pytest.raises(ValueError, match=r"must be above 0|no accountant can price"):
        cost([event], delta)


def test_hopeless_noise_is_told_in_seconds() -> None:
    """A privacy loss distribution of a noise of 0.01 would have a hundred million cells."""
    assert cost([Event(0.01, "poisson", 0.5, 100)], 1e-5).epsilon > 1e4
    with pytest.raises(RecipeError, match=r"privacy.epsilon = 1e-09 cannot be reached"):
        noise_for(1e-9, 1e-12, Event(1.0, count=10**4))


def test_the_ledger_names_its_accountant() -> None:
    assert accounting.accountant().startswith("dp-accounting 0.")
