"""Every row has one owner, and the same one each time."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from flwr_datasets.partitioner import IidPartitioner, NaturalIdPartitioner
from hypothesis import assume, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from fedtune import shards
from fedtune.components import build
from fedtune.config import DataSettings, Experiment
from fedtune.errors import RecipeError
from fedtune.partitions import PARTITIONS, Held, Partition, _divided
from fedtune.shards import Shard

COUNTED = {
    "iid": "iid",
    "dirichlet": "dirichlet(alpha=1.0)",
    "by_label": "by_label(labels=2)",
    "by_size": "by_size(growth='square')",
}
SEEDS = st.integers(0, 2**53)
few = limits(max_examples=12)  # a division by the library takes some 20 ms


def part(text: str) -> Partition:
    return build(text, PARTITIONS, "data.partition")


def labelled(labels: list[int] | list[str]) -> Dataset:
    return Dataset.from_dict({"label": labels, "number": list(range(len(labels)))})


def numbers(held: Held) -> list[int]:
    return sorted(row for rows in held.values() for row in rows)


def save(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(train: Path, partition: str, test: Path | str = "", **changes: Any) -> DataSettings:
    data = DataSettings(source=f"jsonl(train='{train}', test='{test}')", partition=partition)
    return dataclasses.replace(data, **changes)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """60 rows: 4 labels, clients with 30, 20, 8 and 2 rows."""
    owners = ["big"] * 30 + ["Mid Town"] * 20 + ["small"] * 8 + ["北京"] * 2
    return save(
        tmp_path / "train.jsonl",
        [{"text": f"t{i}", "label": f"l{i % 4}", "client": c} for i, c in enumerate(owners)],
    )


def test_all_partitions_are_under_these_tests() -> None:
    assert PARTITIONS.keys() == {*COUNTED, "by_column"}


@pytest.mark.parametrize("text", COUNTED.values())
@few
@given(labels=st.lists(st.integers(0, 3), min_size=60, max_size=90), seed=SEEDS)
def test_each_row_has_one_client(text: str, labels: list[int], seed: int) -> None:
    assume(min(Counter(labels).values()) >= 5)
    assume(len(set(labels)) >= 2)
    rows = labelled(labels)
    held = part(text).split(rows, 4, 1, seed)
    assert numbers(held) == list(range(len(labels)))
    assert list(held) == ["client-00", "client-01", "client-02", "client-03"]
    assert all(held.values())
    assert held == part(text).split(rows, 4, 1, seed)


@few
@given(st.lists(st.sampled_from(["a", "B", "b", "上海", "c d"]), min_size=1), st.integers(0, 6))
def test_by_column_keeps_the_largest_and_all_of_their_rows(owners: list[str], largest: int) -> None:
    rows = Dataset.from_dict({"client": owners})
    held = part(f"by_column(largest={largest})").split(rows, 0, 1, 0)
    counts = Counter(owners)
    kept = {owners[own[0]]: own for own in held.values()}
    assert all(
        own == [i for i, o in enumerate(owners) if o == owner] for owner, own in kept.items()
    )
    assert len(kept) == len(held) == min(largest or len(counts), len(counts))
    left = set(counts) - set(kept)
    assert not left or max(counts[o] for o in left) <= min(counts[o] for o in kept)


@pytest.mark.parametrize("text", COUNTED.values())
def test_another_seed_is_another_division(text: str) -> None:
    rows = labelled([i % 4 for i in range(80)])
    assert part(text).split(rows, 4, 1, 0) != part(text).split(rows, 4, 1, 1)


@few
@given(st.lists(st.sampled_from("abcd"), min_size=4, max_size=30), st.integers(1, 4), SEEDS)
def test_what_needs_no_library_divides_as_the_library_does(
    owners: list[str], clients: int, seed: int
) -> None:
    rows = Dataset.from_dict({"client": owners})
    iid = _divided(IidPartitioner(clients), seed, len(owners))
    assert part("iid").split(rows, clients, 1, seed) == iid
    natural = _divided(NaturalIdPartitioner("value"), seed, len(owners), owners)
    assert sorted(part("by_column").split(rows, 0, 1, seed).values()) == sorted(natural.values())


def test_iid_takes_no_neighbours() -> None:
    """flwr-datasets' IidPartitioner cuts the file as it lies; sorted labels must still mix."""
    held = part("iid").split(labelled(sorted(i % 4 for i in range(400))), 4, 1, 0)
    assert [len(own) for own in held.values()] == [100] * 4
    for own in held.values():
        assert len({row // 100 for row in own}) == 4


def test_sizes_grow_as_named() -> None:
    """100 rows, 4 clients: linear 10, 20, 30, 40; square 1, 4, 9, 16 of 30 = 3, 13, 30, 54."""
    rows = labelled([0] * 100)
    sizes = {
        growth: [
            len(own) for own in part(f"by_size(growth='{growth}')").split(rows, 4, 1, 0).values()
        ]
        for growth in ("linear", "square", "exponential")
    }
    assert sizes == {
        "linear": [10, 20, 30, 40],
        "square": [3, 13, 30, 54],
        "exponential": [3, 8, 23, 66],
    }


@few
@given(SEEDS, st.integers(1, 3))
def test_by_label_gives_each_client_its_number_of_labels(seed: int, labels: int) -> None:
    rows = labelled([f"label {i % 5}" for i in range(100)])
    for own in part(f"by_label(labels={labels})").split(rows, 7, 1, seed).values():
        assert len({row % 5 for row in own}) == labels


@few
@given(SEEDS)
def test_by_label_loses_no_label_where_few_clients_draw(seed: int) -> None:
    """4 clients with 2 labels each can just hold 6 labels; a single draw often leaves one out."""
    rows = labelled([i % 6 for i in range(120)])
    assert numbers(part("by_label(labels=2)").split(rows, 4, 1, seed)) == list(range(120))


def test_a_small_alpha_is_more_uneven_than_a_large_one() -> None:
    def largest_share(alpha: float) -> float:
        held = part(f"dirichlet(alpha={alpha})").split(
            labelled([i % 4 for i in range(400)]), 4, 1, 0
        )
        counts = [Counter(row % 4 for row in own) for own in held.values()]
        return max(count[label] / 100 for count in counts for label in range(4))

    assert largest_share(1e6) < 0.27 < 0.6 < largest_share(0.2)


@pytest.mark.parametrize("text", COUNTED.values())
def test_load_deals_all_test_rows(rows: Path, text: str) -> None:
    held = shards.load(settings(rows, text, rows, clients=4, minimum=1), 3)
    for split in ("train", "test"):
        texts = [value for shard in held for value in getattr(shard, split)["text"]]
        assert sorted(texts) == sorted(f"t{i}" for i in range(60))


def test_load_by_column_gives_test_rows_to_their_clients(rows: Path, tmp_path: Path) -> None:
    test = save(
        tmp_path / "test.jsonl",
        [
            {"text": "a", "label": "l0", "client": "big"},
            {"text": "b", "label": "l1", "client": "small"},
        ],
    )
    held = {s.name: s for s in shards.load(settings(rows, "by_column", test, minimum=2), 0)}
    assert sorted(held) == list(held)
    china = next(name for name in held if name.startswith("client-"))
    assert set(held) == {"big", "mid-town", "small", china}
    assert {n: len(s.train) for n, s in held.items() if n != china} == {
        "big": 30,
        "mid-town": 20,
        "small": 8,
    }
    assert list(held["big"].test["text"]) == ["a"]
    assert list(held["small"].test["text"]) == ["b"]
    assert len(held["mid-town"].test) == 0
    assert held["mid-town"].test.features == held["big"].test.features


def test_test_rows_of_strangers(rows: Path, tmp_path: Path) -> None:
    stranger = {"text": "a", "label": "l0", "client": "huge"}
    test = save(tmp_path / "test.jsonl", [{**stranger, "client": "big"}, stranger])
    with pytest.raises(RecipeError, match="row 2: column 'client' names client 'huge'"):
        shards.load(settings(rows, "by_column", test), 0)
    kept = shards.load(settings(rows, "by_column(largest=1)", test), 0)
    assert [len(shard.test) for shard in kept] == [1]


@given(st.integers(1, 400), st.floats(0, 0.999))
def test_held_out_share_leaves_a_row_to_train_on(rows: int, fraction: float) -> None:
    count = shards.tests_among(rows, fraction)
    assert 0 <= count < rows
    assert (count == 0) == (fraction == 0 or rows == 1)
    assert count == 1 or abs(count - rows * fraction) <= max(0.5, rows * fraction - (rows - 1))


def test_held_out_rows_are_the_same_every_time_and_the_clients_own(rows: Path) -> None:
    def texts(seed: int, fraction: float = 0.2) -> dict[str, tuple[set[str], set[str]]]:
        data = settings(rows, "by_column", minimum=1, test_fraction=fraction)
        return {
            s.name: (set(s.train["text"]), set(s.test["text"])) for s in shards.load(data, seed)
        }

    first = texts(0)
    assert first == texts(0) != texts(1)
    assert all(not train & test for train, test in first.values())
    assert len(set().union(*(train | test for train, test in first.values()))) == 60
    assert sorted(len(test) for _, test in first.values()) == [1, 2, 4, 6]
    assert all(not test for _, test in texts(0, fraction=0.0).values())


def test_minimum_counts_training_rows_after_tests_are_held_out(rows: Path) -> None:
    """60 rows for 10 clients: 6 each, of which 1 is held out and 5 remain."""
    held = shards.load(settings(rows, "iid", clients=10, minimum=5), 0)
    assert [(len(s.train), len(s.test)) for s in held] == [(5, 1)] * 10
    with pytest.raises(RecipeError, match="60 training rows cannot give 10 clients 7 each"):
        shards.load(settings(rows, "iid", clients=10, minimum=6), 0)


@pytest.mark.parametrize("own_tests", [True, False])
def test_validation_rows_come_out_of_the_training_rows(
    rows: Path, tmp_path: Path, own_tests: bool
) -> None:
    """While settings are tuned, nobody sees a test row, and no other row is held by others."""
    tests = [{"text": f"test{i}", "label": "l0", "client": "big"} for i in range(5)]
    test = save(tmp_path / "test.jsonl", tests) if own_tests else ""

    def held(fraction: float) -> dict[str, Shard]:
        data = settings(rows, "by_column", test, minimum=1, validation_fraction=fraction)
        return {shard.name: shard for shard in shards.load(data, 0)}

    real, tuned = held(0.0), held(0.25)
    assert real.keys() == tuned.keys()
    for name, shard in real.items():
        train, validation = set(tuned[name].train["text"]), set(tuned[name].test["text"])
        assert train | validation == set(shard.train["text"])
        assert not train & validation
        assert not validation & set(shard.test["text"])
    assert sum(len(shard.test) for shard in tuned.values()) > 10
    assert held(0.25)["big"].test["text"] == tuned["big"].test["text"]


def test_validation_leaves_the_minimum_to_train_on(rows: Path) -> None:
    data = settings(rows, "iid", clients=12, minimum=4, validation_fraction=0.9)
    assert [(len(s.train), len(s.test)) for s in shards.load(data, 0)] == [(4, 0)] * 12
    fewer = settings(rows, "iid", clients=12, minimum=3, validation_fraction=0.9)
    assert [(len(s.train), len(s.test)) for s in shards.load(fewer, 0)] == [(3, 1)] * 12


@pytest.mark.parametrize("own_tests", [True, False])
def test_rows_for_audits_are_neither_trained_nor_tested_on(
    rows: Path, tmp_path: Path, own_tests: bool
) -> None:
    """They come out of the training rows, and tuning does not move them."""
    tests = [{"text": f"test{i}", "label": "l0", "client": "big"} for i in range(5)]
    test = save(tmp_path / "test.jsonl", tests) if own_tests else ""

    def held(**changes: float) -> dict[str, Shard]:
        data = settings(rows, "by_column", test, minimum=1, **changes)
        return {shard.name: shard for shard in shards.load(data, 0)}

    plain, audited = held(), held(audit_holdout=0.2)
    tuned = held(audit_holdout=0.2, validation_fraction=0.25)
    assert all(shard.holdout is None for shard in plain.values())
    for name, shard in audited.items():
        assert shard.holdout is not None
        apart, train = set(shard.holdout["text"]), set(shard.train["text"])
        assert apart | train == set(plain[name].train["text"])
        assert not apart & train
        assert shard.test["text"] == plain[name].test["text"]
        also = tuned[name]
        assert also.holdout is not None
        assert also.holdout["text"] == shard.holdout["text"]
        assert not apart & {*also.train["text"], *also.test["text"]}
    everything = shards.pooled(list(audited.values()))
    assert everything.holdout is not None
    assert len(everything.holdout) + len(everything.train) == sum(
        len(shard.train) for shard in plain.values()
    )
    assert len(everything.holdout) > 5


def test_an_institution_sets_rows_apart_for_audits_too(rows: Path) -> None:
    data = settings(rows, "iid", audit_holdout=0.1, test_fraction=0.0)
    shard = shards.institution("north", rows, None, data, 0)
    assert shard.holdout is not None
    assert (len(shard.train), len(shard.holdout)) == (54, 6)
    assert not set(shard.train["text"]) & set(shard.holdout["text"])
    with pytest.raises(RecipeError, match=r"data\.audit_holdout = 1\.0 must be"):
        Experiment().replace(data__audit_holdout=1.0)


def test_rows_for_audits_leave_the_minimum_to_train_on(rows: Path) -> None:
    data = settings(rows, "iid", clients=12, minimum=4, audit_holdout=0.9)
    held = shards.load(data, 0)
    assert [(len(s.train), len(s.test), len(s.holdout or [])) for s in held] == [(4, 1, 0)] * 12


@few
@given(SEEDS)
def test_dirichlet_honours_the_minimum(seed: int) -> None:
    held = part("dirichlet(alpha=0.5)").split(labelled([i % 4 for i in range(200)]), 4, 8, seed)
    assert min(map(len, held.values())) >= 8


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "by_column": (
        {"minimum": 3},
        [
            "'client-",
            "1 training rows beside 1 held out",
            "data.minimum = 3",
            "by_column(largest=N)",
        ],
    ),
    "dirichlet(alpha=1e-3)": (
        {"clients": 6},
        ["alpha=0.001", "6 clients", "fewer than 3 of the 60 rows", "data.minimum", "raise alpha"],
    ),
    "by_size": (
        {"clients": 10, "minimum": 4},
        ["'client-00'", "data.minimum = 4", "gentler growth"],
    ),
    "by_size(growth='exponential')": ({"clients": 9}, ["60 rows", "without any", "gentler"]),
    "by_label(labels=5)": ({"clients": 4}, ["4 labels", "labels or data.clients"]),
    "by_label(labels=1)": ({"clients": 3}, ["4 labels", "data.clients = 3"]),
    "by_label(labels=4)": ({"clients": 16, "minimum": 1}, ["15 rows", "lower data.clients"]),
    "iid": ({"clients": 0}, ["data.clients = 0", "above 0", "data.partition"]),
    "by_column(column='label')": ({"clients": 4}, ["data.clients = 4", "0", "data.partition"]),
    "by_column(column='labels')": ({}, ["training rows", "'labels'", "Did you mean 'label'?"]),
    "by_column(largest=-1)": ({}, ["largest = -1"]),
    "by_size(growth='fast')": ({"clients": 4}, ["'fast'", "exponential"]),
    "dirichlet(alpha=0)": ({"clients": 4}, ["alpha = 0", "between"]),
    "by_label(labels=0)": ({"clients": 4}, ["labels = 0"]),
}


@pytest.mark.parametrize("text", REFUSED)
def test_divisions_that_cannot_be(rows: Path, text: str) -> None:
    changes, expected = REFUSED[text]
    with pytest.raises(RecipeError) as caught:
        shards.load(settings(rows, text, **changes), 0)
    assert all(piece in str(caught.value) for piece in expected), str(caught.value)


def test_columns_of_different_types_are_refused(rows: Path, tmp_path: Path) -> None:
    test = save(tmp_path / "test.jsonl", [{"text": "a", "label": 0, "client": "big"}])
    with pytest.raises(RecipeError, match="'label' is str in the training rows, int in the test"):
        shards.load(settings(rows, "dirichlet", test, clients=2), 0)


def test_pooled_holds_all_rows(rows: Path) -> None:
    held = shards.load(settings(rows, "by_column", minimum=1), 0)
    everything = shards.pooled(held)
    assert everything.name == "centralized"
    assert len(everything.train) == sum(len(shard.train) for shard in held)
    texts = [*everything.train["text"], *everything.test["text"]]
    assert sorted(texts) == sorted(f"t{i}" for i in range(60))


def test_mix_counts_training_rows() -> None:
    empty = Dataset.from_dict({"label": []})
    north = Shard("north", Dataset.from_dict({"label": ["b", "a", "b"]}), empty)
    south = Shard("south", Dataset.from_dict({"label": [10, 2, 2]}), empty)
    assert shards.mix([north, south], "label") == {
        "north": {"a": 1, "b": 2},
        "south": {"2": 2, "10": 1},
    }
    with pytest.raises(RecipeError, match="client 'north' have no column 'lable'"):
        shards.mix([north], "lable")


def test_institution_reads_its_own_files_only(rows: Path, tmp_path: Path) -> None:
    data = DataSettings(source="jsonl(train='absent.jsonl')", minimum=2, test_fraction=0.25)
    own = shards.institution("north", rows, None, data, 0)
    assert (own.name, len(own.train), len(own.test)) == ("north", 45, 15)
    assert set(own.train["text"]) | set(own.test["text"]) == {f"t{i}" for i in range(60)}
    assert set(own.test["text"]) == set(
        shards.institution("north", rows, None, data, 0).test["text"]
    )
    assert set(own.test["text"]) != set(
        shards.institution("south", rows, None, data, 0).test["text"]
    )
    test = save(tmp_path / "test.jsonl", [{"text": "a", "label": "l0", "client": "x"}])
    both = shards.institution("north", rows, test, data, 0)
    assert (len(both.train), len(both.test)) == (60, 1)


def test_institution_refuses_a_bad_name_or_too_few_rows(tmp_path: Path) -> None:
    file = save(tmp_path / "rows.jsonl", [{"text": "a"}])
    data = DataSettings(minimum=2)
    with pytest.raises(RecipeError, match="'North Clinic' is no client name"):
        shards.institution("North Clinic", file, None, data, 0)
    with pytest.raises(RecipeError, match="'north' would have 1 training rows"):
        shards.institution("north", file, None, data, 0)
    with pytest.raises(RecipeError, match="There is no file"):
        shards.institution("north", tmp_path / "none.csv", None, data, 0)


def test_partitioners_write_nothing(rows: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """flwr-datasets draws a progress bar and warns when it draws again."""
    shards.load(settings(rows, "by_column", minimum=1), 0)
    shards.load(settings(rows, "dirichlet(alpha=0.3)", clients=4, minimum=4), 0)
    assert capfd.readouterr() == ("", "")
