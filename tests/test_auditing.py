"""Audits as a command: what is asked, what is kept, what a person reads."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_cli import call, write_recipe

from fedtune import page_audits, parts
from fedtune.audits import auditing, kept, shown
from fedtune.audits.finding import BROKEN, HOLDS, INAPPLICABLE, Finding, Measure
from fedtune.config import Experiment
from fedtune.errors import RecipeError, RunError
from fedtune.pages import rendered

FOUND = Finding(
    audit="mechanism",
    question="Does one client show?",
    adversary="who sees every model",
    measures=(
        Measure("epsilon, at least", 0.62, 0.62, None, "Clopper-Pearson", "add", 1.99),
        Measure("AUC", 0.5, 0.45, 0.55, "bootstrap", "bank <b>"),
        Measure("rows", 12),
    ),
    claim="epsilon 1.99",
    verdict=HOLDS,
    reason="it is below",
    validity="a mutant is flagged",
)
finite = st.floats(allow_nan=False, allow_infinity=False)
measures = st.builds(
    Measure,
    st.text(max_size=9),
    finite,
    st.none() | finite,
    st.none() | finite,
    st.text(max_size=9),
    st.text(max_size=9),
    st.none() | finite,
)


@given(st.lists(measures, max_size=4), st.text(max_size=20))
def test_a_finding_survives_json(found: list[Measure], text: str) -> None:
    finding = replace(FOUND, measures=tuple(found), reason=text)
    assert Finding.from_json(json.loads(json.dumps(finding.to_json()))) == finding


def test_findings_are_kept_in_order_beside_those_not_asked_again(tmp_path: Path) -> None:
    assert kept.read(tmp_path) == {}
    tokens = replace(FOUND, audit="tokens")
    newer = replace(FOUND, verdict=BROKEN)
    for finding in (tokens, FOUND, newer):
        kept.add(tmp_path, finding)
    assert list(kept.read(tmp_path).items()) == [("mechanism", newer), ("tokens", tokens)]
    assert [path.name for path in tmp_path.iterdir()] == [kept.FILE]
    assert kept.missing(tmp_path, ["membership", "tokens"]) == ["membership"]
    text = (tmp_path / kept.FILE).read_text()
    (tmp_path / kept.FILE).write_text(text.replace(kept.code(), "of other sources"))
    assert kept.missing(tmp_path, ["mechanism", "tokens"]) == ["mechanism", "tokens"]


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 0}', '{"schema": 1, "audits": [1]}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / kept.FILE).write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=r"audit\.json is damaged: .* Delete it"):
        kept.read(tmp_path)


def test_an_unknown_audit_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"no audit 'mechanisms'\. Did you mean 'mechanism'\?"):
        auditing.chosen("mechanisms")
    assert auditing.chosen(" mechanism ,mechanism") == ("mechanism",)
    assert auditing.chosen("") == auditing.AUDITS


def test_a_terminal_shows_the_numbers_and_the_words() -> None:
    refused = Finding("extraction", "", "", (), "none", INAPPLICABLE, "a classifier", "")
    console = Console(file=io.StringIO(), width=80)
    for table in shown.tables([FOUND, refused], most=2):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0.62 [0.62, -]" in text
    assert "0.5 [0.45, 0.55]" in text
    assert "1 more in audit.json" in text
    assert "bank <b>" in text
    assert "extraction: not applicable" in text
    assert "a classifier" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_page_sets_measures_beside_the_claim() -> None:
    values = page_audits.of([FOUND])
    (figure,) = values["audit_figures"]["mechanism"]
    dots, limits = json.loads(figure.json)["data"]
    assert dots["x"] == [0.62, 0.5, 12]
    assert dots["error_x"]["array"] == [0, pytest.approx(0.05), 0]
    assert dots["error_x"]["arrayminus"] == [0, pytest.approx(0.05), 0]
    assert (limits["x"], limits["y"]) == ([1.99], ["epsilon, at least (add)"])
    assert all("<b>" not in name for name in dots["y"])  # plotly would read it as a tag
    html = rendered("{% for a, rows in audits %}{{ rows }}{% endfor %}", **values)
    assert "<b>" not in html


def test_not_a_number_does_not_break_a_table() -> None:
    assert shown.number(Measure("x", math.inf)) == "inf"


@pytest.fixture
def fedtune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore
    return lambda *arguments: call(capsys, monkeypatch, *arguments)


def test_a_private_run_is_audited_and_a_broken_claim_is_an_error(
    tiny: Experiment,
    tmp_path: Path,
    fedtune,  # type: ignore
) -> None:
    private = ("privacy.mode=record", "privacy.noise=2.0", "rounds=1", "train.steps=2")
    assert fedtune("run", write_recipe(tiny, tmp_path), *private)[0] == 0
    folder = parts.folder_of(tiny)
    code, out, err = fedtune("audit", folder, "--only", "mechanism", "--json")
    assert (code, err) == (0, "")
    (found,) = json.loads(out)
    assert (found["audit"], found["verdict"]) == ("mechanism", HOLDS)
    assert "differentially private" in found["claim"]
    assert kept.read(folder) == {"mechanism": Finding.from_json(found)}
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "<h2>Audits</h2>" in html
    assert 'id="audit-mechanism"' in html

    # What a run like this must not tell: the loss of the rows that it trained on.
    first, last = (folder / "rounds.jsonl").read_text().splitlines()
    record = json.loads(last)
    record["train"] = {"north": {"loss": [3.5, 4.0]}}
    (folder / "rounds.jsonl").write_text(f"{first}\n{json.dumps(record)}\n")
    code, out, err = fedtune("audit", folder, "--only", "mechanism")
    assert code == 1
    assert "mechanism broken" in " ".join(out.split())
    assert "tells them in round 1" in " ".join(out.split())
    assert "is broken by: mechanism" in err
    assert kept.read(folder)["mechanism"].verdict == BROKEN


def test_a_run_that_promises_nothing_has_no_mechanism(
    tiny: Experiment,
    tmp_path: Path,
    fedtune,  # type: ignore
) -> None:
    assert fedtune("run", write_recipe(tiny, tmp_path), "rounds=1")[0] == 0
    folder = parts.folder_of(tiny)
    code, out, _ = fedtune("audit", folder, "--only", "mechanism")
    assert code == 0
    assert "mechanism: not applicable" in out
    assert kept.read(folder)["mechanism"].verdict == INAPPLICABLE
    code, _, err = fedtune("audit", folder, "--only", "mechanisms")
    assert (code, "Did you mean 'mechanism'?" in err) == (2, True)
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    (folder / "rounds.jsonl").write_text(lines[0] + "\n")
    code, _, err = fedtune("audit", folder)
    assert (code, "has come to round 0 of 1" in err) == (2, True)


def test_a_run_of_other_rows_than_its_recipes_is_not_audited(
    tiny: Experiment,
    tmp_path: Path,
    fedtune,  # type: ignore
) -> None:
    """At institutions the rows are those of files that only they can read."""
    assert fedtune("run", write_recipe(tiny, tmp_path), "rounds=1", "train.steps=1")[0] == 0
    folder = parts.folder_of(tiny)
    told = (folder / "roster.json").read_text(encoding="utf-8")
    names = [client["name"] for client in json.loads(told)["clients"]]
    (folder / "roster.json").write_text(told.replace(f'"{names[0]}"', '"clinic"'), encoding="utf-8")
    code, _, err = fedtune("audit", folder, "--only", "membership")
    assert code == 2
    assert "it ran at institutions, whose rows are not here" in err
