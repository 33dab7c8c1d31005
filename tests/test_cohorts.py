"""Cohorts are drawn by name and by nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.cohorts import COHORTS, All, Fixed, Poisson
from fedtune.components import build
from fedtune.errors import RecipeError

NAMES = [f"client-{i:03d}" for i in range(200)]
populations = st.lists(st.sampled_from(NAMES), unique=True, min_size=1)


@given(populations, st.integers(1, 99), st.integers(0, 2**31))
def test_the_order_of_the_population_does_not_matter(
    names: list[str], round: int, seed: int
) -> None:
    for cohort in (All(), Fixed(1), Poisson(0.3)):
        drawn = cohort.draw(names, round, seed)
        assert drawn == cohort.draw(names[::-1], round, seed) == sorted(set(drawn))
        assert set(drawn) <= set(names)


@given(populations, st.data())
def test_fixed_draws_its_size(names: list[str], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(names)))
    assert len(Fixed(size).draw(names, 1, 0)) == size


def test_poisson_clients_do_not_depend_on_each_other() -> None:
    some, more = Poisson(0.4).draw(NAMES[:50], 3, 1), Poisson(0.4).draw(NAMES, 3, 1)
    assert some == [name for name in more if name in NAMES[:50]]


def test_frequencies_are_the_rates() -> None:
    """Over 500 rounds of 200 clients: 20 of 200 and rate 0.1 give 10,000 draws, sd below 100."""
    fixed = [Fixed(20).draw(NAMES, round, 7) for round in range(500)]
    poisson = [Poisson(0.1).draw(NAMES, round, 7) for round in range(500)]
    assert sum(map(len, poisson)) == pytest.approx(10_000, abs=500)
    for draws in (fixed, poisson):
        counts = [sum(name in drawn for drawn in draws) for name in NAMES[:40]]
        # Each count is about binomial(500, 0.1): mean 50, sd 6.7.
        assert min(counts) > 20
        assert max(counts) < 85
    assert len({tuple(drawn) for drawn in fixed}) == 500


def test_poisson_can_be_empty() -> None:
    assert Poisson(1e-9).draw(NAMES, 1, 0) == []
    assert Poisson(1.0).draw(NAMES, 1, 0) == NAMES


@pytest.mark.parametrize(
    "text", ["fixed(size=0)", "poisson(rate=0.0)", "poisson(rate=1.5)", "half"]
)
def test_cohorts_without_meaning_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="cohort"):
        build(text, COHORTS, "cohort")


def test_a_cohort_larger_than_the_population_is_told() -> None:
    with pytest.raises(RecipeError, match="larger than the population of 3"):
        Fixed(4).draw(NAMES[:3], 1, 0)
