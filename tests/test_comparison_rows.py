"""Cells of a comparison's tables against hand-made cases."""

from dataclasses import replace

import pytest
from made_comparison import example

from fedtune.pages import plain, soft
from fedtune.report import human_time
from fedtune.studies import extras, rows
from fedtune.studies.comparison import GLOBAL, PERSONAL, Failure, Trial
from fedtune.studies.page_tables import ABSENT, Cell, averaged, fixed, leaf, p_value, signed


def test_a_mean_says_how_much_of_it_is_missing() -> None:
    assert averaged([10.0, 20.0], human_time) == Cell("15.0 s", 15.0)
    assert averaged([10.0, None, 30.0], human_time) == Cell("20.0 s", 20.0, "2 of 3 seeds")
    assert averaged([None, None], human_time) == Cell("not reached", missing=True)
    assert averaged([], human_time) == ABSENT


def test_numbers_are_written_for_people() -> None:
    assert (signed(0.0123), signed(-0.0123), fixed(-0.5)) == ("+0.012", "−0.012", "−0.500")
    assert p_value(0.0004).text == "< 0.001"
    assert p_value(None) == ABSENT
    assert leaf(0.00025) == Cell("0.00025", 0.00025)
    assert leaf("4,8,16") == Cell("4,8,16")


def test_names_may_break_and_numbers_may_not() -> None:
    assert soft("data.partition=iid") == "data.<wbr>partition=<wbr>iid"
    assert soft("learning_rate=0.5") == "learning_rate=0.5"
    assert soft("0.741 of 1,000") == "0.741 of 1,000"
    assert soft("<b>f(a") == "&lt;b&gt;f(<wbr>a"
    assert soft("noise (p") == "noise (p"
    assert plain("<b>'") == "&lt;b&gt;'"


@pytest.mark.parametrize(("protocol", "strategies"), [(GLOBAL, 3), (PERSONAL, 2)])
def test_strategies_are_apart_from_references_and_best_first(
    protocol: str, strategies: int
) -> None:
    made = example(1)
    table = rows.quality(made, made.conditions[0], protocol)
    assert table is not None
    assert [title for title, _ in table.groups] == ["Strategies", "References"]
    means = [[row.cells[1].value for row in group] for _, group in table.groups]
    assert len(means[0]) == strategies
    assert all(group == sorted(group, key=lambda v: -(v or 0)) for group in means)
    references = [row.cells for row in table.groups[1][1]]
    assert all(cells[4] == cells[5] == ABSENT for cells in references), "references are not tested"


def test_a_protocol_without_strategies_has_no_table() -> None:
    made = example(1)
    [condition] = made.conditions
    only = [arm for arm in condition.arms if arm.role == "reference"]
    assert rows.quality(made, replace(condition, arms=only), GLOBAL) is None


def test_seeds_that_are_missing_are_told() -> None:
    made = replace(example(1), seeds=[0, 1, 2, 3])
    table = rows.quality(made, made.conditions[0], GLOBAL)
    assert table is not None
    assert table.groups[0][1][0].cells[1].small.endswith("(3 of 4 seeds)")


def test_a_choice_at_the_edge_of_what_was_tried_is_told() -> None:
    made = example(1)
    [tuning] = made.tuning

    def told(**changes: object) -> str:
        changed = replace(tuning, **changes)  # type: ignore[arg-type]
        table = extras.tuned(replace(made, tuning=[changed]))
        assert table is not None
        return table.groups[0][1][0].cells[-1].text

    assert told() == ""
    assert told(chosen=0.05) == "at the edge of what was tried"
    assert told(chosen=0.001) == "at the edge of what was tried"
    failed = [Trial(0.1, None, 1.0, "RunError: no")]
    assert told(chosen=None, trials=failed) == "every trial failed, so no cell ran"


def test_every_failure_has_its_reason() -> None:
    made = replace(example(1), failures=[Failure("", "fedit", 1, "why")])
    table = extras.failures(made)
    assert table is not None
    [row] = table.groups[0][1]
    assert [cell.text for cell in row.cells] == ["fedit", "–", "1", "why"]
    assert extras.failures(replace(made, failures=[])) is None
