"""Areas, rates and their intervals, against direct counts, another library and simulated truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from fedtune.audits import ranking

SCORES = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=25)
SHIFT = 0.8  # between two normal groups, whose area is then Phi(SHIFT / sqrt 2)
TRUE = float(norm.cdf(SHIFT / 2**0.5))


def groups(draw: int, first: int = 60, second: int = 40) -> tuple[ranking.Scores, ranking.Scores]:
    random = np.random.default_rng(draw)
    return random.normal(SHIFT, 1, first), random.normal(0, 1, second)


def pairs(first: list[float], second: list[float]) -> ranking.Scores:
    return np.array([[(a > b) + (a == b) / 2 for b in second] for a in first])


@given(SCORES, SCORES)
def test_the_area_is_the_share_of_pairs_that_are_ordered(
    first: list[float], second: list[float]
) -> None:
    found = ranking.auc(np.array(first), np.array(second))
    assert found == pytest.approx(pairs(first, second).mean(), abs=1e-12)
    assert ranking.auc(np.array(second), np.array(first)) == pytest.approx(1 - found, abs=1e-12)


@given(SCORES, SCORES)
def test_delongs_variance_is_that_of_rows_and_columns_of_pairs(
    first: list[float], second: list[float]
) -> None:
    whole = pairs(first, second)
    variance = whole.mean(1).var(ddof=1) / len(first) + whole.mean(0).var(ddof=1) / len(second)
    found = ranking.delong(np.array(first), np.array(second), "area")
    assert found.low == pytest.approx(max(0, found.value - 1.959964 * variance**0.5), abs=1e-5)
    assert found.high == pytest.approx(min(1, found.value + 1.959964 * variance**0.5), abs=1e-5)


@pytest.mark.parametrize("method", ["delong", "bootstrap"])
def test_intervals_hold_the_truth_in_nineteen_of_twenty_draws(method: str) -> None:
    """Within four standard errors of 95 % over 200 draws: 88.8 to 100."""
    held = 0
    for draw in range(200):
        first, second = groups(draw)
        if method == "delong":
            found = ranking.delong(first, second, "area")
        else:
            found = ranking.bootstrapped(first, second, "area", draw)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= TRUE <= found.high
    assert held >= 178


def test_a_group_of_one_has_no_interval_and_an_empty_one_is_an_error() -> None:
    assert ranking.delong(np.ones(1), np.zeros(5), "area").low is None
    with pytest.raises(ValueError, match="groups of 0 and 5"):
        ranking.auc(np.ones(0), np.zeros(5))
    with pytest.raises(ValueError, match="no number"):
        ranking.auc(np.array([np.nan]), np.zeros(5))


def test_what_passes_a_threshold_by_hand() -> None:
    """Of others 0 ... 9 two may pass at a rate of 0.2: 8 and 9 exceed 7, as do 7.5, 8 and 30."""
    first, second = np.array([1.0, 7.0, 7.5, 8.0, 30.0]), np.arange(10.0)
    found = ranking.caught(first, second, 0.2)
    assert found.share == 3 / 5
    assert ranking.caught(first, second, 0.01).share == 1 / 5


@limits(max_examples=30)
@given(st.integers(0, 30), st.integers(1, 30))
def test_exact_intervals_are_those_of_scipy(hits: int, more: int) -> None:
    low, high = ranking.exact(hits, hits + more)
    other = binomtest(hits, hits + more).proportion_ci(0.95, method="exact")
    assert (low, high) == pytest.approx((other.low, other.high), abs=1e-9)


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_false_alarms_of_the_whole_population_are_bounded(rate: float) -> None:
    """In 97.5 % of draws, although the threshold is made of the same rows: 95 % of 400 at least."""
    bounded = 0
    for draw in range(400):
        _, second = groups(draw, 1, 100)
        threshold = np.sort(second)[len(second) - 1 - int(rate * len(second))]
        found = ranking.caught(np.zeros(1), second, rate)
        bounded += float(norm.sf(threshold)) <= found.passes
    assert bounded >= 380
