"""Numbers of a report against hand-made cases, and a page that asks nobody for anything."""

import html.parser
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from browser import DESK, PHONE, visit
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser
from rich.console import Console

from fedtune import page, report, tables
from fedtune.config import Experiment
from fedtune.errors import RecipeError, RunError
from fedtune.records import Rejection, RoundRecord, Sums
from fedtune.report import Row, Run


def sums(right: list[int], predicted: list[int], actual: list[int]) -> Sums:
    rows = float(sum(actual))
    return {
        "loss": [rows, rows],
        "accuracy": [float(sum(right)), rows],
        "true_positive": [float(x) for x in right],
        "predicted": [float(x) for x in predicted],
        "actual": [float(x) for x in actual],
    }


def record(round: int, right: tuple[int, int]) -> RoundRecord:
    """Two clients, ten test rows each; so many of them right."""
    own = {
        name: sums([count, 0], [10, 0], [count, 10 - count])
        for name, count in zip(("east", "west"), right, strict=True)
    }
    cohort = ["east", "west"] if round else []
    down, up = (1000, 500) if round else (0, 0)
    return RoundRecord(round, cohort, 2.0, down, up, evaluation={"own": own})


def written(
    folder: Path, experiment: Experiment, records: list[RoundRecord], name: str = "east"
) -> Path:
    """A run's folder as the coordinator leaves it."""
    folder.mkdir(parents=True)
    (folder / "experiment.toml").write_text(experiment.text(), encoding="utf-8")
    mix = {"refund": 12, "delivery": 3}
    clients = [
        {"name": name, "examples": 15, "test_examples": 10, "mix": mix},
        {"name": "west", "examples": 30, "test_examples": 10, "mix": None},
    ]
    roster = {"labels": ["refund", "delivery"], "clients": clients}
    (folder / "roster.json").write_text(json.dumps(roster), encoding="utf-8")
    lines = "".join(record.to_json() + "\n" for record in records)
    (folder / "rounds.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    experiment = Experiment().replace(name="pair", rounds=2, references="local_only,centralized")
    rounds = [record(0, (1, 1)), record(1, (5, 6)), record(2, (8, 9))]
    root = written(tmp_path / "pair", experiment, rounds)
    alone = replace(record(1, (7, 4)), seconds=3.0)
    alone.evaluation["pooled"] = {
        "east": sums([9, 0], [20, 0], [9, 11]),
        "west": sums([12, 0], [20, 0], [12, 8]),
    }
    written(root / "references" / "local_only", experiment, [record(0, (1, 1)), alone])
    written(root / "references" / "centralized", experiment, [record(0, (1, 1)), record(1, (9, 9))])
    return root


def test_the_table_compares_the_right_rows(folder: Path) -> None:
    result = report.result(report.read(folder))
    accuracy = [(row.kind, row.name, row.numbers["accuracy"]) for row in result.rows]
    assert accuracy == [
        ("untuned", "untuned model", 0.1),
        ("alone", "east alone", 0.45),  # pooled rows, not its own ones
        ("alone", "west alone", 0.6),
        ("federated", "federated (fedit)", 0.85),
        ("reference", "centralized", 0.9),
    ]
    assert [row.bytes_moved for row in result.rows] == [0, None, None, 3000, None]
    assert [row.seconds for row in result.rows] == [2.0, 1.0, 2.0, 4.0, 2.0]
    assert result.own["east"] == {"untuned": 0.1, "alone": 0.7, "federated": 0.8}
    assert result.test_rows == 20
    assert "accuracy 0.850" in result.verdict
    assert "0.250 better than the best client alone, west (at 0.600)" in result.verdict
    assert "0.050 worse than centralized training (at 0.900)" in result.verdict
    assert json.loads(json.dumps(result.to_json()))["own"] == result.own


def test_a_round_without_evaluation_leaves_the_last_one_standing(tmp_path: Path) -> None:
    rounds = [record(0, (1, 1)), record(1, (4, 4)), replace(record(2, (9, 9)), evaluation={})]
    run = report.read(written(tmp_path / "run", Experiment(), rounds))
    assert report.last_evaluated(run).round == 1


def test_a_line_cut_short_by_a_crash_is_not_read(folder: Path) -> None:
    path = folder / "rounds.jsonl"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + record(3, (0, 0)).to_json()[:40], encoding="utf-8")
    assert [r.round for r in report.read(folder).records] == [0, 1, 2]


def test_what_is_damaged_or_missing_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no run"):
        report.read(tmp_path)
    (folder / "roster.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match=r"damaged or missing.*--resume"):
        report.read(folder)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_macro_scores_are_those_of_the_definition(pairs: list[tuple[int, int]]) -> None:
    """From (label, prediction) pairs, class by class, against the merged counts."""
    counts = [[0.0] * 4 for _ in range(3)]
    for label, prediction in pairs:
        counts[0][label] += label == prediction
        counts[1][prediction] += 1
        counts[2][label] += 1
    names = ("true_positive", "predicted", "actual")
    numbers = report.summarise(dict(zip(names, counts, strict=True)))
    f1, precision, recall = [], [], []
    for k in sorted({x for pair in pairs for x in pair}):
        hits = sum(a == b == k for a, b in pairs)
        p = hits / max(1, sum(b == k for _, b in pairs))
        r = hits / max(1, sum(a == k for a, _ in pairs))
        precision.append(p)
        recall.append(r)
        f1.append(2 * p * r / (p + r) if p + r else 0.0)
    expected = {"macro_f1": f1, "precision": precision, "recall": recall}
    for name, values in expected.items():
        assert math.isclose(numbers[name], sum(values) / len(values), abs_tol=1e-12)


def test_perplexity_is_of_the_mean_loss_a_token() -> None:
    numbers = report.summarise({"loss": [6.0, 4.0], "token_accuracy": [1.0, 4.0]})
    assert math.isclose(numbers["perplexity"], math.exp(1.5))
    assert numbers["token_accuracy"] == 0.25


@pytest.mark.parametrize(
    ("correct", "rows", "low", "high"),
    [(0, 10, 0.0, 0.27753), (8, 10, 0.49016, 0.94331), (50, 50, 0.92865, 1.0)],
)
def test_wilson_intervals(correct: int, rows: int, low: float, high: float) -> None:
    """Against the textbook's formula, worked by hand for z = 1.96."""
    found = report.wilson(correct, rows)
    assert found == pytest.approx((low, high), abs=1e-5)


def test_many_clients_are_shown_as_best_median_and_worst() -> None:
    alone = [Row("alone", f"c{k:02d} alone", {"loss": float(k)}, None, 1.0) for k in range(21)]
    others = [Row("untuned", "untuned", {"loss": 9.0}, 0, 1.0)]
    shown = tables.shown_rows([*others, *alone], "loss")
    assert [row.name for row in shown] == [
        "untuned",
        "c00 alone (best)",
        "c10 alone (median)",
        "c20 alone (worst)",
    ]


@pytest.mark.parametrize("width", [80, 100])
def test_no_line_of_the_tables_is_cut(folder: Path, width: int) -> None:
    printed = io.StringIO()
    for table in tables.of_result(report.result(report.read(folder))):
        Console(width=width, file=printed).print(table)
    text = printed.getvalue()
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width


class _Requests(html.parser.HTMLParser):
    """Collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {v}" for k, v in attributes if k in ("src", "href", "srcset")]


def test_the_page_is_whole_and_asks_nobody(folder: Path) -> None:
    page.write(report.read(folder), folder / "report.html")
    text = (folder / "report.html").read_text(encoding="utf-8")
    requests = _Requests()
    requests.feed(text)
    assert requests.found == []
    assert "default-src 'none'" in text
    for title in ("What federation bought", "What each client holds", "Traffic by round"):
        assert title in text
    assert "withheld" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)


def test_a_browser_draws_the_page_without_complaint(folder: Path, browser: Browser) -> None:
    """Curves, clients' curves, the mix, the aggregation, traffic, time."""
    path, run = folder / "report.html", report.read(folder)
    for number in (1, 2):
        figures = {"relative_error": 0.1**number, "drift": 1.5}
        run.records[number] = replace(run.records[number], aggregation=figures)
    page.write(run, path)
    with visit(browser, path) as seen:
        seen.settle()
        assert seen.page.locator("table").count() == 3
        drawn = seen.drawn()
        assert len(drawn) == 6
        for plot in drawn:
            assert float(plot["width"]) > 200, plot
            assert float(plot["height"]) > 100, plot
            assert float(plot["marks"]) > 0, plot
        assert seen.too_wide(PHONE) == []
        assert seen.too_wide(DESK) == []
        assert seen.complaints == []
        assert seen.requests == [path.as_uri()]


def test_the_aggregation_of_every_round_is_shown(folder: Path) -> None:
    """A round without figures has none shown; a figure that a round lacks is a dash."""
    run = report.read(folder)
    assert tables.of_aggregation(run.records) == []
    page.write(run, folder / "report.html")
    assert "Aggregation, round by round" not in (folder / "report.html").read_text("utf-8")
    run.records[1] = replace(run.records[1], aggregation={"relative_error": 0.0123, "drift": 1.5})
    run.records[2] = replace(run.records[2], aggregation={"relative_error": 4.5e-8})
    printed = io.StringIO()
    (table,) = tables.of_aggregation(run.records)
    Console(width=80, file=printed).print(table)
    lines = [line.split() for line in printed.getvalue().splitlines()[3:]]
    assert lines == [["1", "0.0123", "-", "-", "1.5", "-"], ["2", "4.5e-08", "-", "-", "-", "-"]]
    page.write(run, folder / "report.html")
    text = (folder / "report.html").read_text("utf-8")
    assert "<td>0.0123</td>" in text
    assert "Aggregation error by round" in text


def test_of_many_rounds_some_are_tabled() -> None:
    records = [replace(record(k, (0, 0)), aggregation={"cosine": 1.0}) for k in range(1, 101)]
    printed = io.StringIO()
    Console(width=80, file=printed).print(tables.of_aggregation(records)[0])
    rounds = [int(line.split()[0]) for line in printed.getvalue().splitlines()[3:]]
    assert len(rounds) == tables.MOST_ROWS
    assert (rounds[0], rounds[-1]) == (1, 100)


def test_names_from_data_cannot_become_code(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    reason = Rejection("east", "E_CLIENT", evil)
    rounds = [record(0, (1, 1)), replace(record(1, (4, 4)), rejected=[reason])]
    experiment = Experiment().replace(name="evil", rounds=1)
    root = written(tmp_path / "run", experiment, rounds, name=evil)
    page.write(report.read(root), root / "report.html")
    text = (root / "report.html").read_text(encoding="utf-8")
    assert evil not in text
    assert "<img" not in text.split("<body>")[1]


def test_an_unfinished_run_has_a_page_too(tmp_path: Path) -> None:
    experiment = Experiment().replace(name="half", rounds=5)
    run = report.read(written(tmp_path / "run", experiment, [record(0, (1, 1))]))
    assert isinstance(run, Run)
    page.write(run, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.search(r"0 of\s+5 \(unfinished\)", text)


def test_the_share_of_padding_is_told_where_clients_tell_it(folder: Path) -> None:
    """Of 100 + 300 computed tokens 90 + 250 were real: 15 % padding."""
    run = report.read(folder)
    assert report.result(run).padding is None
    run.records[1] = replace(run.records[1], tokens=[90.0, 100.0])
    run.records[2] = replace(run.records[2], tokens=[250.0, 300.0])
    result = report.result(run)
    assert result.padding == pytest.approx(0.15)
    console = Console(file=io.StringIO(), width=100)
    console.print(tables.of_result(result)[0])
    assert "pooled test rows, padding 15%" in console.file.getvalue()  # type: ignore[attr-defined]
