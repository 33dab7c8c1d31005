"""Every interval and test against a closed form, scipy, a table by hand, or its own promise."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedtune import report
from fedtune.studies import statistics
from fedtune.studies.statistics import Resampling

SMALL = st.floats(-10, 10).map(lambda x: round(x, 3))


@given(st.lists(SMALL, min_size=2, max_size=9).filter(lambda v: np.std(v) > 1e-6))
def test_t_interval_and_test_are_scipys(values: list[float]) -> None:
    found = stats.ttest_1samp(values, 0.0)
    interval = found.confidence_interval(0.95)
    assert statistics.t_interval(values) == pytest.approx((interval.low, interval.high))
    assert statistics.paired_t(values) == pytest.approx(found.pvalue)


def test_t_interval_of_three_by_hand() -> None:
    """1, 2, 3: standard error 1/sqrt(3), and t(.975, 2) = 4.30265."""
    half = 4.302652729911275 / math.sqrt(3)
    assert statistics.t_interval([1, 2, 3]) == pytest.approx((2 - half, 2 + half))
    assert statistics.t_interval([1]) is None


def test_the_t_interval_of_three_seeds_covers_as_often_as_it_says() -> None:
    draws, trials = np.random.default_rng(1), 4000
    covered = 0
    for _ in range(trials):
        low, high = statistics.t_interval(list(draws.normal(0.7, 0.02, 3))) or (0, 0)
        covered += low <= 0.7 <= high
    error = math.sqrt(0.95 * 0.05 / trials)
    assert abs(covered / trials - 0.95) < 4 * error


def test_a_t_test_without_spread_claims_nothing() -> None:
    assert statistics.paired_t([0.1, 0.1, 0.1]) is None
    assert statistics.paired_t([0.3 - 0.2, 0.1, 0.1]) is None  # equal but for the last bit
    assert statistics.paired_t([0.0, 0.0, 0.0]) == 1.0
    assert statistics.paired_t([0.2]) is None


@given(st.lists(SMALL, min_size=1, max_size=7))
def test_sign_flip_is_scipys_exact_permutation_test(values: list[float]) -> None:
    def by_hand() -> float:
        flipped = [abs(sum(s * v for s, v in zip(signs, values, strict=True)))
                   for signs in itertools.product((1, -1), repeat=len(values))]  # fmt: skip
        return sum(f >= abs(sum(values)) - 1e-9 for f in flipped) / len(flipped)

    assert statistics.sign_flip(values) == pytest.approx(by_hand())
    if len(values) > 1:
        found = stats.permutation_test(
            (values,), np.sum, permutation_type="samples", n_resamples=10_000
        )
        assert statistics.sign_flip(values) == pytest.approx(found.pvalue, abs=1e-9)


def test_three_seeds_cannot_give_less_than_a_quarter() -> None:
    assert statistics.sign_flip([5.0, 6.0, 7.0]) == 0.25
    assert statistics.sign_flip([1.0, -1.0, 0.0]) == 1.0


def test_more_seeds_than_can_be_enumerated_agree_with_the_normal_limit() -> None:
    values = np.random.default_rng(3).normal(0.4, 1.0, 40)
    limit = 2 * stats.norm.sf(abs(values.sum()) / math.sqrt((values**2).sum()))
    assert statistics.sign_flip(list(values)) == pytest.approx(limit, abs=0.01)


def test_holm_by_hand() -> None:
    """Of four: .01 x 4, .04 x 2 after .03 x 3, and .005 x 5 is none: sorted .01 .02 .03 .04."""
    assert statistics.holm([0.03, 0.01, None, 0.04, 0.02]) == pytest.approx(
        [0.06, 0.04, None, 0.06, 0.06]
    )
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(p: list[float]) -> None:
    adjusted = statistics.holm(p)
    for (a, x), (b, y) in itertools.combinations(zip(p, adjusted, strict=True), 2):
        assert x is not None
        assert y is not None
        assert (a <= b and x <= y + 1e-12) or (b <= a and y <= x + 1e-12)
    for a, x in zip(p, adjusted, strict=True):
        assert x is not None
        assert a - 1e-12 <= x <= min(1.0, len(p) * a) + 1e-12


def sums_of(draws: np.random.Generator, clients: int) -> dict[str, np.ndarray]:
    """Classification sums of clients with 4 classes, one of which may never occur."""
    actual = draws.integers(0, 6, (clients, 4)).astype(float)
    actual[:, 0] += 1
    predicted = draws.permuted(actual, axis=1)
    right = np.minimum(predicted, actual)
    rows = actual.sum(1)
    return {
        "loss": np.stack([rows * draws.uniform(0.2, 3, clients), rows], 1),
        "accuracy": np.stack([right.sum(1), rows], 1),
        "true_positive": right,
        "predicted": predicted,
        "actual": actual,
    }


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_metrics_of_many_sums_are_those_of_each(seed: int, clients: int) -> None:
    sums = sums_of(np.random.default_rng(seed), clients)
    for number in range(clients):
        one = report.summarise({name: list(values[number]) for name, values in sums.items()})
        for metric, value in one.items():
            assert statistics.metric_of(metric, sums)[number] == pytest.approx(value)
        assert set(one) == {"loss", "accuracy", "precision", "recall", "macro_f1"}


def test_perplexity_is_of_the_mean_loss() -> None:
    sums = {"loss": np.array([[6.0, 3.0], [1e9, 1.0]]), "token_accuracy": np.ones((2, 2))}
    found = statistics.metric_of("perplexity", sums)
    expected = [
        report.summarise({k: list(v[i]) for k, v in sums.items()})["perplexity"] for i in range(2)
    ]
    assert found == pytest.approx(expected)


def test_the_bootstrap_has_the_mean_and_the_error_of_theory() -> None:
    """Seeds drawn whole: variance of the mean of n drawn values is their variance over n."""
    values = [0.7, 0.74, 0.69, 0.8, 0.72]
    samples = [{"accuracy": np.array([[v, 1.0]])} for v in values]
    draws = Resampling((1,) * 5, draws=40_000).means("accuracy", samples)
    assert draws.mean() == pytest.approx(np.mean(values), abs=4e-4)
    assert draws.std() == pytest.approx(np.std(values) / math.sqrt(5), rel=0.02)


def test_the_bootstrap_of_clients_has_the_error_of_theory() -> None:
    """One seed, clients of equal size: the same formula, over clients."""
    values = np.random.default_rng(2).uniform(0.4, 0.9, 20)
    sample = {"accuracy": np.stack([values * 10, np.full(20, 10.0)], 1)}
    draws = Resampling((20,), draws=40_000).means("accuracy", [sample])
    assert draws.std() == pytest.approx(np.std(values) / math.sqrt(20), rel=0.02)
    low, high = statistics.percentiles(draws)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / math.sqrt(20), rel=0.05)


def test_draws_are_paired() -> None:
    """An arm that is better by the same amount everywhere is so in every draw."""
    draw = np.random.default_rng(4)
    rows = [np.full(n, 50.0) for n in (4, 6, 5)]
    correct = [draw.integers(10, 30, len(r)).astype(float) for r in rows]
    first = [{"accuracy": np.stack([c, r], 1)} for c, r in zip(correct, rows, strict=True)]
    second = [{"accuracy": np.stack([c + 5, r], 1)} for c, r in zip(correct, rows, strict=True)]
    resampling = Resampling((4, 6, 5), draws=500)
    gap = resampling.means("accuracy", second) - resampling.means("accuracy", first)
    assert gap == pytest.approx(np.full(500, 0.1))
    stand = statistics.standings(
        np.stack([resampling.means("accuracy", arm) for arm in (first, second)]), higher=True
    )
    assert [s.mean for s in stand] == [2.0, 1.0]
    assert [s.best for s in stand] == [0.0, 1.0]


def test_equal_arms_share_ranks() -> None:
    same = np.tile(np.random.default_rng(0).uniform(size=300), (3, 1))
    for standing in statistics.standings(same, higher=False):
        assert (standing.mean, standing.low, standing.high) == (2.0, 2.0, 2.0)
        assert standing.best == pytest.approx(1 / 3)


def test_lower_is_better_where_it_is() -> None:
    draws = np.array([[1.0, 1.0], [2.0, 0.5]])
    assert [s.mean for s in statistics.standings(draws, higher=False)] == [1.5, 1.5]
    assert [s.best for s in statistics.standings(draws[:, :1], higher=False)] == [1.0, 0.0]
