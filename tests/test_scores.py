"""Scores of cells made by hand, where every number can be checked on paper."""

from pathlib import Path

import pytest

from fedtune.config import Experiment
from fedtune.records import RoundRecord, Sums
from fedtune.report import Run
from fedtune.studies import evidence, scores, statistics
from fedtune.studies.comparison import GLOBAL, PERSONAL, Score
from fedtune.studies.evidence import Evidence

# client -> (right, rows) after each round, from round 0
History = list[dict[str, tuple[int, int]]]
FIRST: History = [{"a": (1, 10), "b": (3, 30)}, {}, {"a": (5, 10), "b": (27, 30)}]
SECOND: History = [{"a": (2, 10), "b": (2, 30)}, {}, {"a": (6, 10), "b": (18, 30)}]


def sums(right: int, rows: int) -> Sums:
    return {"accuracy": [float(right), float(rows)], "loss": [float(rows - right), float(rows)]}


def run(history: History, up: int = 7, down: int = 5) -> Run:
    records = [
        RoundRecord(
            round=n,
            cohort=["a", "b"] if n else [],
            seconds=1.5,
            bytes_down=down if n else 0,
            bytes_up=up if n else 0,
            evaluation={"own": {c: sums(*counts) for c, counts in measured.items()}},
        )
        for n, measured in enumerate(history)
    ]
    clients = [
        {"name": c, "examples": 5 * rows, "test_examples": rows, "mix": None}
        for c, (_, rows) in history[0].items()
    ]
    return Run(Path("nowhere"), Experiment(), (), clients, records)


def arm(name: str, *histories: History, kind: str = GLOBAL, role: str = "strategy") -> Evidence:
    return Evidence(name, role, kind, {seed: run(h) for seed, h in enumerate(histories)})


def test_a_score_is_over_all_rows_and_clients_are_apart() -> None:
    found = scores.score(arm("fedit", FIRST, SECOND), GLOBAL, "accuracy", None)
    assert found.seeds == [0, 1]
    assert found.values == pytest.approx([32 / 40, 24 / 40])
    assert found.mean == pytest.approx(0.7)
    assert found.worst == pytest.approx((0.5 + 0.6) / 2)
    # Of .5 and .9 the standard deviation is .2, of .6 and .6 it is 0.
    assert found.spread == pytest.approx((0.2 + 0.0) / 2)
    assert found.interval is not None
    assert found.interval.high - found.interval.low == pytest.approx(2 * 12.7062047 * 0.1)
    assert found.bootstrap is not None
    assert found.bootstrap.method == "bootstrap over seeds and clients"
    assert found.difference is None


def test_the_worst_client_is_the_one_with_the_highest_loss() -> None:
    found = scores.score(arm("fedit", FIRST), GLOBAL, "loss", None)
    assert found.worst == pytest.approx(0.5)
    assert found.interval is None


def test_a_difference_is_paired_by_seed() -> None:
    better: History = [FIRST[0], {}, {"a": (7, 10), "b": (29, 30)}]
    other: History = [SECOND[0], {}, {"a": (8, 10), "b": (18, 30)}]
    base = arm("fedit", FIRST, SECOND, FIRST)
    found = scores.difference(arm("ffa_lora", better, other), base, "accuracy")
    assert found is not None
    assert found.seeds == [0, 1]
    assert found.values == pytest.approx([4 / 40, 2 / 40])
    assert found.mean == pytest.approx(0.075)
    assert found.p == statistics.paired_t(found.values)
    assert (found.p_permutation, found.p_smallest) == (0.5, 0.5)
    assert found.bootstrap is not None
    assert 0 <= found.bootstrap.low < 0.075 < found.bootstrap.high <= 0.2
    assert scores.difference(base, arm("x", FIRST), "accuracy").seeds == [0]  # type: ignore
    late = Evidence("late", "strategy", GLOBAL, {9: run(FIRST)})
    assert scores.difference(late, base, "accuracy") is None


def test_arms_of_other_clients_are_paired_by_seed_alone() -> None:
    pooled: History = [{"all": (4, 40)}, {}, {"all": (36, 40)}]
    central = arm("centralized", pooled, pooled, role="reference")
    found = scores.score(central, GLOBAL, "accuracy", arm("fedit", FIRST, SECOND))
    assert (found.worst, found.spread, found.bootstrap) == (None, None, None)
    assert found.difference is not None
    assert found.difference.values == pytest.approx([4 / 40, 12 / 40])
    assert found.difference.bootstrap is not None
    assert found.difference.bootstrap.method == "bootstrap over seeds"
    one = scores.difference(arm("centralized", pooled), arm("fedit", FIRST), "accuracy")
    assert one is not None
    assert (one.bootstrap, one.interval, one.p) == (None, None, None)


def test_holm_counts_strategies_of_the_whole_study() -> None:
    base = arm("fedit", FIRST, SECOND, FIRST)
    up: History = [FIRST[0], {}, {"a": (9, 10), "b": (28, 30)}]
    one = scores.score(arm("rolora", up, SECOND, up), GLOBAL, "accuracy", base)
    two = scores.score(arm("ffa_lora", SECOND, FIRST, up), GLOBAL, "accuracy", base)
    own = scores.score(base, GLOBAL, "accuracy", base)
    told = [("strategy", own), ("reference", one), ("strategy", one), ("strategy", two)]
    found = scores.corrected(told)
    assert found[0] == own
    gaps = [score.difference for score in found[1:]]
    assert [gap.family for gap in gaps if gap] == [2, 2, 2]
    p = [one.difference.p, two.difference.p]  # type: ignore[union-attr]
    assert [gap.p_holm for gap in gaps if gap] == [None, *statistics.holm(p)]


def test_the_ranking_knows_who_is_first_in_every_seed_and_client() -> None:
    best: History = [FIRST[0], {}, {"a": (10, 10), "b": (30, 30)}]
    arms = [arm("fedit", FIRST, SECOND), arm("flora", best, best), arm("late", SECOND, SECOND)]
    found = scores.ranking(arms, GLOBAL, "accuracy")
    assert found is not None
    assert [rank.arm for rank in found.ranks] == ["flora", "fedit", "late"]
    assert (found.ranks[0].mean, found.ranks[0].best) == (1.0, 1.0)
    assert found.ranks[0].low == found.ranks[0].high == 1.0
    loss = scores.ranking(arms, GLOBAL, "loss")
    assert loss is not None
    assert loss.ranks == found.ranks  # here the loss is 1 - accuracy, and less is better
    assert scores.ranking(arms[:1], GLOBAL, "accuracy") is None


def test_curves_count_bytes_up_to_each_round_and_skip_what_was_not_evaluated() -> None:
    gap: History = [FIRST[0], {"a": (4, 10)}, FIRST[2]]
    found = scores.curve(arm("fedit", gap), 0, ["accuracy"])
    assert found.rounds == [0, 1, 2]
    assert found.values == {"accuracy": [0.1, None, 0.8]}
    assert found.bytes == [0, 12, 24]
    assert found.seconds == [1.5, 3.0, 4.5]


@pytest.mark.parametrize(
    ("target", "rounds", "moved"), [(0.8, [2, None], [24, None]), (0.05, [0, 0], [0, 0])]
)
def test_costs_to_a_target(target: float, rounds: list[int], moved: list[int]) -> None:
    fedit = arm("fedit", FIRST, SECOND)
    curves = [scores.curve(fedit, seed, ["accuracy", "loss"]) for seed in (0, 1)]
    cost = scores.cost(fedit, curves, "accuracy", target)
    assert cost.rounds == [2, 2]
    assert (cost.bytes_up, cost.bytes_down) == ([14, 14], [10, 10])
    assert cost.rounds_to_target == rounds
    assert cost.bytes_to_target == moved
    assert cost.seconds_to_target == [None if r is None else 1.5 * (r + 1) for r in rounds]
    assert scores.cost(fedit, curves, "loss", 0.2).rounds_to_target == [2, None]
    assert scores.cost(fedit, curves, "loss", None).rounds_to_target == []


def test_what_is_not_federated_has_no_bytes() -> None:
    alone = arm("local_only", FIRST, kind=PERSONAL, role="reference")
    curves = [scores.curve(alone, 0, ["accuracy"])]
    cost = scores.cost(alone, curves, "accuracy", 0.5)
    assert (cost.bytes_up, cost.bytes_down, cost.bytes_to_target) == (None, None, [])
    assert curves[0].bytes == [0, 0, 0]


def test_untuned_is_round_0_of_whoever_has_the_seed() -> None:
    pooled: History = [{"all": (4, 40)}, {}, {"all": (36, 40)}]
    cells = {
        "centralized": arm("centralized", pooled, pooled, role="reference"),
        "fedit": Evidence("fedit", "strategy", GLOBAL, {0: run(FIRST)}),
        "ffa_lora": Evidence("ffa_lora", "strategy", GLOBAL, {1: run(SECOND)}),
    }
    before = evidence.untuned(cells)
    assert before is not None
    found = scores.score(before, GLOBAL, "accuracy", None)
    assert (found.seeds, found.values) == ([0, 1], [0.1, 0.1])
    assert scores.curve(before, 0, ["accuracy"]).rounds == [0]
    assert [c.values["accuracy"] for c in scores.clients_of(before)] == [0.1, 0.1, 0.2, 2 / 30]
    assert evidence.untuned({"centralized": cells["centralized"]}) is None


@pytest.mark.parametrize(
    ("name", "kind", "role", "protocols"),
    [
        ("fedit", GLOBAL, "strategy", [GLOBAL, PERSONAL]),  # the baseline is a yardstick
        ("ffa_lora", GLOBAL, "strategy", [GLOBAL]),
        ("fedsa_lora", PERSONAL, "strategy", [PERSONAL]),
        ("local_only", PERSONAL, "reference", [PERSONAL]),
        ("centralized", GLOBAL, "reference", [GLOBAL, PERSONAL]),
    ],
)
def test_one_model_and_one_a_client_are_never_mixed(
    name: str, kind: str, role: str, protocols: list[str]
) -> None:
    one = arm(name, FIRST, kind=kind, role=role)
    assert [p for p in (GLOBAL, PERSONAL) if evidence.has(one, p, "fedit")] == protocols


def test_a_score_without_difference_is_no_test() -> None:
    one = Score(GLOBAL, "accuracy", [0], [0.5], 0.5)
    assert scores.corrected([("strategy", one)]) == [one]
