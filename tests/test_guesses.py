"""What right guesses prove: closed forms, exact sums, and mechanisms whose epsilon is known."""

import bisect
import functools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from fedtune.audits import guesses

EPSILONS = st.floats(0.0, 8.0)


@given(st.integers(1, 200), EPSILONS)
def test_guesses_that_are_all_right_have_a_closed_form(count: int, epsilon: float) -> None:
    """P[Bin(r, q) >= r] = q^r, and the bound is where that is 5 %: q = 0.05^(1/r)."""
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    assert guesses.p_value(count, count, count, epsilon, 0.0) == pytest.approx(q**count)
    edge = 0.05 ** (1 / count)
    expected = max(0.0, math.log(edge / (1 - edge)))
    assert guesses.lower_bound(count, count, count, 0.0) == pytest.approx(expected, abs=1e-6)


@given(st.data())
def test_the_p_value_is_the_theorems_sum(data: st.DataObject) -> None:
    """In exact fractions, with i up to the number of coins and not to that of right guesses."""
    rows = data.draw(st.integers(1, 12))
    count = data.draw(st.integers(0, rows))
    right = data.draw(st.integers(0, count))
    odds = Fraction(data.draw(st.integers(1, 9)))  # e^epsilon
    delta = Fraction(data.draw(st.integers(0, 20)), 1000)
    q = odds / (1 + odds)
    mass = [math.comb(count, k) * q**k * (1 - q) ** (count - k) for k in range(count + 1)]
    beta = sum(mass[right:], Fraction(0))
    alpha = max(
        2 * sum((mass[k] for k in range(max(0, right - i), right)), Fraction(0)) / i
        for i in range(1, rows + 1)
    )
    expected = min(1.0, float(beta + delta * rows * alpha))
    found = guesses.p_value(rows, count, right, math.log(odds), float(delta))
    assert found == pytest.approx(expected)


@given(st.integers(4, 300), EPSILONS, st.sampled_from([0.0, 1e-5, 1e-2]))
def test_more_right_guesses_prove_no_less_and_delta_no_more(
    rows: int, epsilon: float, delta: float
) -> None:
    count = guesses.guessed(rows)
    right = int(count * math.exp(epsilon) / (1 + math.exp(epsilon)))
    bound = guesses.lower_bound(rows, count, right, delta)
    assert bound <= guesses.lower_bound(rows, count, min(count, right + 1), delta) + 1e-6
    assert bound <= guesses.lower_bound(rows, count, right, 0.0) + 1e-6
    assert guesses.lower_bound(rows, count, count // 2, delta) == 0.0


@given(st.floats(0.01, 20.0), st.integers(1, 400))
def test_the_bound_exceeds_randomized_response_in_five_percent_at_most(
    epsilon: float, count: int
) -> None:
    """Exactly, not by simulation: right guesses of its answers are Bin(r, q)."""
    q = 1 / (1 + math.exp(-epsilon))

    def exceeds(right: int) -> bool:
        return guesses.lower_bound(count, count, right, 0.0) > epsilon

    least = bisect.bisect_left(range(count + 1), True, key=exceeds)
    assert binom.sf(least - 1, count, q) <= 0.05


def answers(
    rows: int, epsilon: float, delta: float, draws: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Coins, and what (epsilon, delta)-private randomized response says of each.

    It says +-1, the truth with probability e^epsilon / (1 + e^epsilon); with probability delta it
    says +-2, always the truth.
    """
    coins = draws.random(rows) < 0.5
    honest = draws.random(rows) < 1 / (1 + math.exp(-epsilon))
    said = np.where(coins == honest, 1.0, -1.0)
    shown = draws.random(rows) < delta
    return coins, np.where(shown, np.where(coins, 2.0, -2.0), said)


def exceeding(rows: int, epsilon: float, delta: float, assumed: float, times: int) -> float:
    """How often the bound from simulated answers exceeds the truth."""
    draws, above = np.random.default_rng(5), 0
    bound = functools.cache(guesses.lower_bound)
    for _ in range(times):
        coins, said = answers(rows, epsilon, delta, draws)
        count, right = guesses.count_right(said.tolist(), coins.tolist())
        above += bound(rows, count, right, assumed) > epsilon
    return above / times


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_simulated_randomized_response_is_rarely_called_less_private(epsilon: float) -> None:
    """1,000 audits of 400 coins: 5 % by the theorem, and three standard errors of chance more."""
    assert 0.01 < exceeding(400, epsilon, 0.0, 0.0, 1000) <= 0.05 + 3 * 0.007


def test_delta_is_what_makes_the_bound_hold_of_a_mechanism_that_sometimes_tells() -> None:
    """Of 1,000 coins 40 are told outright: without its delta term the bound would be too high."""
    assert exceeding(1000, 0.5, 0.04, 0.0, 300) > 0.1
    assert exceeding(1000, 0.5, 0.04, 0.04, 300) <= 0.05


def test_a_stronger_mechanism_would_have_been_found_out() -> None:
    """Answers of epsilon 3 refute a claim of 1 in every one of 100 audits."""
    draws = np.random.default_rng(0)
    bound = functools.cache(guesses.lower_bound)
    for _ in range(100):
        coins, said = answers(400, 3.0, 0.0, draws)
        count, right = guesses.count_right(said.tolist(), coins.tolist())
        assert bound(400, count, right, 1e-5) > 1.0


@settings(max_examples=20)
@given(st.floats(0.05, 6.0), st.sampled_from([0.0, 1e-6, 1e-5]))
def test_so_many_coins_as_are_needed_can_refute_a_claim_and_fewer_cannot(
    epsilon: float, delta: float
) -> None:
    rows = guesses.needed(epsilon, delta)
    assert guesses.reach(rows, delta) >= epsilon - 1e-6
    assert rows == 4 or guesses.reach(rows - 4, delta) < epsilon


def test_what_no_number_of_coins_refutes_is_told() -> None:
    """Wrong guesses are so few that delta explains them: at 1e-5 from an epsilon of 7.6."""
    assert guesses.needed(7.5, 1e-5) > 0
    assert guesses.needed(7.6, 1e-5) == 0


def test_guesses_by_hand() -> None:
    """Eight scores, four guesses: 9 and 8 are guessed in, 1 and 0 out; 8 and 0 wrongly."""
    scores = [5.0, 9.0, 0.0, 4.0, 8.0, 1.0, 3.0, 2.0]
    inserted = [True, True, True, False, False, False, True, False]
    assert guesses.count_right(scores, inserted) == (4, 2)


def test_equal_scores_know_nothing_of_the_coins() -> None:
    """The first rows are guessed in and the last out, whatever their coins."""
    coins = [False, False, True, True, True, True, True, True]
    assert guesses.count_right([0.0] * 8, coins) == (4, 0)
    assert guesses.count_right([0.0] * 8, [not coin for coin in coins]) == (4, 4)


def test_exposures_by_hand() -> None:
    """Three rows left out, at 1, 2 and 3. Ranks 1, 2 and 4 of 4: 2, 1 and 0 bits."""
    scores = [4.0, 1.0, 2.5, 2.0, 3.0, 1.0]
    inserted = [True, False, True, False, False, True]
    assert guesses.exposures(scores, inserted) == [2.0, 1.0, 0.0]


def test_a_median_and_its_interval_by_hand() -> None:
    """Of ten values the second and the ninth: P[Bin(10, 1/2) <= 1] = 0.0107 is below 0.025."""
    assert guesses.median([3, 1, 2, 10, 9, 8, 4, 5, 6, 7]) == (5.5, 2, 9)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="5 right of 4 guesses of 8 coins"):
        guesses.p_value(8, 4, 5, 1.0, 0.0)
