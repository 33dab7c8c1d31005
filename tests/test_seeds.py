"""Seeds depend on what a draw is for and on nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from fedtune.seeds import generator, seed_of, uniform

PARTS = st.lists(st.one_of(st.integers(), st.text()), max_size=4)


@given(PARTS, PARTS)
def test_seeds_are_equal_only_for_equal_parts(
    first: list[int | str], second: list[int | str]
) -> None:
    assert (seed_of(*first) == seed_of(*second)) == (first == second)
    assert 0 <= seed_of(*first) < 2**63
    assert 0 <= uniform(*first) < 1


def test_parts_do_not_run_together() -> None:
    assert len({seed_of("ab", "c"), seed_of("a", "bc"), seed_of("abc"), seed_of("c", "ab")}) == 4
    assert seed_of(1) != seed_of("1")


def test_the_seed_of_a_draw_is_fixed_for_good() -> None:
    """A change here changes every result of every recipe."""
    assert seed_of(0, "cohort", 1, "north") == 4535319687810487592
    assert generator(0, "batches").initial_seed() == seed_of(0, "batches")
