"""Audits of a study's cells: gathered over seeds, in every file, against epsilon."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
from made_comparison import example
from scipy import stats
from test_compare import Watching, compare, written

from fedtune.audits import kept
from fedtune.audits.finding import BROKEN, HOLDS, INAPPLICABLE, INVALID, Finding, Measure
from fedtune.config import Experiment
from fedtune.report import Run
from fedtune.studies import audits, files, page, promises, rows, study_file, tables
from fedtune.studies.comparison import Arm, Audit, Comparison, Condition, Interval
from fedtune.studies.evidence import Evidence
from fedtune.studies.marks import looks


def finding(value: float, verdict: str = HOLDS, allowed: float | None = 0.6) -> Finding:
    own = (
        Measure("AUC", value, value - 0.1, value + 0.1, "bootstrap", "", allowed),
        Measure("TPR", value / 10, None, None, "", ""),
        Measure("AUC", 0.9, None, None, "", "bank"),
    )
    return Finding("membership", "?", "who", own, "1", verdict, "because", "checked")  # type: ignore[arg-type]


def evidence(folder: Path, *findings: Finding) -> Evidence:
    runs = {}
    for seed, found in enumerate(findings):
        (folder / str(seed)).mkdir()
        kept.add(folder / str(seed), found)
        runs[seed] = Run(folder / str(seed), Experiment(), (), [], [])
    return Evidence("fedit", "strategy", "global", runs)


def test_leading_measures_are_averaged_over_seeds(tmp_path: Path) -> None:
    """Those of the first measure's subject; values .5 .6 .7: Student's t by hand."""
    arm = evidence(tmp_path, finding(0.5), finding(0.6, BROKEN), finding(0.7, allowed=0.9))
    auc, tpr = audits.of(arm, ["membership"])
    assert (auc.measure, auc.seeds, auc.values) == ("AUC", [0, 1, 2], [0.5, 0.6, 0.7])
    assert auc.mean == pytest.approx(0.6)
    half = stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    assert auc.interval is not None
    assert auc.interval.high == pytest.approx(0.6 + half)
    assert auc.allowed == pytest.approx(0.7)
    assert auc.verdicts == {HOLDS: 2, BROKEN: 1}
    assert (tpr.measure, tpr.allowed) == ("TPR", None)
    assert audits.of(arm, []) == audits.of(arm, ["tokens"]) == []
    assert audits.of(replace(arm, untuned=True), ["membership"]) == []


def test_one_seed_keeps_the_audits_own_interval(tmp_path: Path) -> None:
    auc, tpr = audits.of(evidence(tmp_path, finding(0.5, allowed=math.inf)), ["membership"])
    assert auc.interval == Interval(0.4, 0.6, "bootstrap")
    assert tpr.interval is None
    assert auc.allowed is None, "JSON has no infinity"


def test_what_was_invalid_or_not_measured_is_counted(tmp_path: Path) -> None:
    refused = Finding("membership", "", "", (), "none", INAPPLICABLE, "no rows", "")
    arm = evidence(tmp_path, finding(0.9, INVALID), refused, finding(0.5))
    auc, _ = audits.of(arm, ["membership"])
    assert (auc.values, auc.seeds) == ([0.9, 0.5], [0, 2])
    assert auc.verdicts == {INVALID: 1, INAPPLICABLE: 1, HOLDS: 1}
    (tmp_path / "none").mkdir()
    (none,) = audits.of(evidence(tmp_path / "none", refused), ["membership"])
    assert (none.measure, none.mean, none.reason) == ("", None, "no rows")


def audited(comparison: Comparison) -> Comparison:
    """The example with epsilon varied and an audit of each strategy; a name needs escaping."""
    values = itertools.count()

    def arm(one: Arm) -> Arm:
        if one.role == "reference":
            return one
        value = 0.5 + next(values) / 100
        ends = Interval(value - 0.05, value + 0.05, "Student t over 3 seeds")
        made = Audit("tokens", "AUC <b>", [0, 1], [value, value], value, ends, 0.6, {HOLDS: 2})
        return replace(one, audits=[made])

    def condition(one: Condition, epsilon: float) -> Condition:
        named = f"privacy.epsilon={epsilon or 'none'}"
        changes = {"privacy.epsilon": epsilon, "privacy.mode": "none" if not epsilon else "record"}
        return replace(one, name=named, changes=changes, arms=list(map(arm, one.arms)))

    made = [condition(c, e) for c, e in zip(comparison.conditions, (0.0, 8.0), strict=True)]
    return replace(comparison, conditions=made)


def test_every_file_has_them(tmp_path: Path) -> None:
    made = audited(example(2))
    assert Comparison.from_json(made.to_json()) == made
    files.write(made, tmp_path)
    assert "| fedit | tokens: AUC &lt;b&gt; | 0.500 \\[0.450, 0.550\\]" in (
        tmp_path / "comparison.md"
    ).read_text(encoding="utf-8")
    told = [row for row in files.rows(made) if row["table"] == "audits"]
    assert len(told) == 2 * 4 * (2 + 4 + 1)
    html = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "Quality and leakage against epsilon" in html
    assert "AUC <b>" not in html
    shown = [title for title, _ in tables.terminal(made)]
    assert any("Audits" in title for title in shown)


def test_a_broken_claim_stands_out() -> None:
    [condition, _] = audited(example(2)).conditions
    broken = [
        replace(a, audits=[replace(b, verdicts={BROKEN: 1}) for b in a.audits])
        for a in condition.arms
    ]
    table = rows.audits(replace(condition, arms=broken))
    assert table is not None
    assert {row.cells[-1].mark for _, group in table.groups for row in group} == {"worse"}
    bare = [replace(arm, audits=[]) for arm in condition.arms]
    assert rows.audits(replace(condition, arms=bare)) is None


def test_plots_against_epsilon_end_without_a_promise() -> None:
    """Epsilon 8, then none, whatever the study's order; one line a strategy, one for its claim."""
    made = audited(example(2))
    plans = promises.plans(made, looks(made))
    titles = [title for title, _, figure, _ in plans if figure]
    assert titles == [
        "Accuracy of the global model",
        "Accuracy of the personal models",
        "Tokens: AUC <b>",
    ]
    leak = plans[-1][2]
    assert leak is not None
    assert list(leak.layout.xaxis.ticktext) == ["8", "none"]
    lines = [trace for trace in leak.data if trace.showlegend is None]
    assert len(lines) == len(leak.data) / 2 == 4
    by_name = {trace.name: list(trace.y) for trace in lines}
    assert by_name["fedit"] == [0.54, 0.5], "the second condition is epsilon 8"
    assert promises.plans(example(2), looks(example(2))) == []


def test_the_page_without_audits_has_no_section(tmp_path: Path) -> None:
    page.write(example(1), tmp_path / "page.html")
    assert "against epsilon" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_study_audits_each_cell_once(tiny: Experiment) -> None:
    """In the workers, private cells and others; a cell that has its audits is finished."""
    text = """
[vary]
strategy = ["ffa_lora"]
"privacy.epsilon" = [1.0, 0.0]
[study]
references = []
audits = "mechanism"
"""
    recipe = tiny.replace(rounds=1, train__steps=2, privacy__mode="record", privacy__epsilon=1.0)
    study = study_file.load(written(recipe, text))
    assert study.audits == ("mechanism",)
    view = Watching()
    found = compare(study, view, workers=2)
    assert [reason for _, reason in view.over] == ["", ""]
    promised, none = (condition.arms[-1].audits for condition in found.conditions)
    assert promised[0].verdicts == {HOLDS: 1}
    assert none[0].verdicts == {INAPPLICABLE: 1}
    assert "promises nothing" in none[0].reason
    folders = [study.folder / "cells" / cell.experiment.name for cell in study.cells()]
    before = [(folder / kept.FILE).stat().st_mtime_ns for folder in folders]
    again = Watching()
    assert compare(study, again, workers=1).conditions == found.conditions
    assert again.complete == [2]
    (folders[0] / kept.FILE).unlink()
    last = Watching()
    compare(study, last, workers=1)
    assert (last.complete, last.rounds) == ([1], []), "it is audited and not trained again"
    assert (folders[1] / kept.FILE).stat().st_mtime_ns == before[1]
    assert (folders[0] / kept.FILE).exists()
