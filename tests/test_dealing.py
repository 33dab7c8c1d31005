"""Whole rows to whole clients: what every partition needs."""

from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import assume, given
from hypothesis import strategies as st

from fedtune import dealing
from fedtune.config import NAME
from fedtune.errors import RecipeError
from fedtune.partitions import Held

SEEDS = st.integers(0, 2**53)


def numbers(held: Held) -> list[int]:
    return sorted(row for rows in held.values() for row in rows)


@given(st.integers(0, 500), st.lists(st.integers(0, 50), min_size=1, max_size=9), SEEDS)
def test_apportion_sums_and_stays_within_one_of_the_exact_share(
    total: int, weights: list[int], seed: int
) -> None:
    assume(any(weights))
    quotas = dealing.apportion(total, weights, seed)
    assert sum(quotas) == total
    for quota, weight in zip(quotas, weights, strict=True):
        assert abs(quota - total * weight / sum(weights)) < 1
        assert weight or not quota


def test_deal_by_hand() -> None:
    """North has 3 of 4 "a" and no "b", south the rest. Of 4 "a" tests north gets 3, of 2 "b" none.

    Nobody trains on "c", so its 2 rows are spread evenly.
    """
    held = {"north": [0, 1, 2], "south": [3, 4, 5]}
    test = ["a", "b", "c", "a", "a", "b", "c", "a"]
    dealt = dealing.deal(test, ["a", "a", "a", "a", "b", "b"], held, 0)
    counts = {name: Counter(test[row] for row in own) for name, own in dealt.items()}
    assert counts == {"north": {"a": 3, "c": 1}, "south": {"a": 1, "b": 2, "c": 1}}


@given(
    st.lists(st.sampled_from("abcde"), max_size=60),
    st.lists(st.sampled_from("abcd"), min_size=6, max_size=60),
    SEEDS,
)
def test_each_test_row_has_one_client(test: list[str], train: list[str], seed: int) -> None:
    held = {f"c{i}": list(range(i, len(train), 3)) for i in range(3)}
    dealt = dealing.deal(test, train, held, seed)
    assert numbers(dealt) == list(range(len(test)))
    assert dealt == dealing.deal(test, train, held, seed)
    for value in set(test) & set(train):
        for name, own in dealt.items():
            share = sum(train[row] == value for row in held[name]) / train.count(value)
            assert abs(sum(test[row] == value for row in own) - share * test.count(value)) < 1


def test_gaps_and_fractions_are_refused_with_their_row() -> None:
    for values, expected in (
        (["a", None], "row 2: column 'label' is empty"),
        (["a", "b", ""], "row 3: column 'label' is empty"),
        ([0.5], "row 1: column 'label' is of type float"),
    ):
        with pytest.raises(RecipeError, match=expected):
            dealing.values_of(Dataset.from_dict({"label": values}), "label", "Rows")


@given(st.sets(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80)))
def test_names_are_valid_and_different(values: set[str]) -> None:
    names = dealing.names_of(sorted(values))
    assert names.keys() == values
    assert len(set(names.values())) == len(values)
    assert all(NAME.fullmatch(name) for name in names.values())
    assert all(names[value] == value for value in values if NAME.fullmatch(value))


def test_names_by_hand() -> None:
    names = dealing.names_of(["north", "North", "NORTH!", "Hamburg Süd", "Straße"])
    assert names == {
        "north": "north",
        "NORTH!": "north-2",
        "North": "north-3",
        "Hamburg Süd": "hamburg-sud",
        "Straße": "strasse",
    }
    assert dealing.names_of([7, 10]) == {7: "7", 10: "10"}
    china = dealing.names_of(["北京", "上海 Hospital"])
    assert china["北京"].startswith("client-")
    assert china["上海 Hospital"].startswith("hospital-")
    assert dealing.names_of(["北京"])["北京"] == china["北京"]  # whoever else is there
