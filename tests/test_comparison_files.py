"""Tables and files have every number, and nothing in a name can break them."""

import re
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from made_comparison import example

from fedtune.studies import files, tables
from fedtune.studies.comparison import Comparison


@pytest.fixture(scope="module")
def made() -> Comparison:
    return example()


def test_every_file_is_written_and_the_two_tables_agree(made: Comparison, tmp_path: Path) -> None:
    paths = files.write(made, tmp_path)
    assert [p.name for p in paths] == [
        f"comparison.{end}" for end in ("json", "csv", "parquet", "md", "tex", "html")
    ]
    assert Comparison.from_json(paths[0].read_text(encoding="utf-8")) == made
    rows = pq.read_table(paths[2]).to_pylist()
    assert rows == [{**dict.fromkeys(files.SCHEMA.names), **row} for row in
                    files.rows(made)]  # fmt: skip
    assert len(paths[1].read_text().splitlines()) == len(rows) + 1


def test_no_number_is_left_out(made: Comparison) -> None:
    """Whatever number the comparison's JSON has is a value of some row."""
    told = {row.get("value") for row in files.rows(made)}
    numbers: set[float] = set()
    for condition in made.conditions:
        for arm in condition.arms:
            for score in arm.scores:
                gap = score.difference
                numbers |= {*score.values, score.mean}
                numbers |= {gap.mean, *gap.values, gap.p_smallest} if gap else set()
                for interval in (score.interval, score.bootstrap):
                    numbers |= {interval.low, interval.high} if interval else set()
            numbers |= {v for held in arm.clients for v in held.values.values()}
            for curve in arm.curves:
                numbers |= {v for values in curve.values.values() for v in values if v is not None}
                numbers |= {*curve.bytes, *curve.seconds}
            numbers |= {*(arm.cost.bytes_up or ()), *arm.cost.seconds, *arm.aggregation.values()}
        numbers |= {r.mean for ranking in condition.rankings for r in ranking.ranks}
    numbers |= {t.score for tuned in made.tuning for t in tuned.trials if t.score is not None}
    assert len(numbers) > 300
    assert numbers <= told


def test_a_row_says_what_it_is_of(made: Comparison) -> None:
    rows = list(files.rows(made))
    keys = [tuple(v for k, v in sorted(r.items()) if k not in ("value", "other")) for r in rows]
    assert len(set(keys)) == len(keys)


def test_markdown_tables_are_tables(made: Comparison) -> None:
    text = tables.markdown(made)
    assert "<script>" not in text
    assert "fed_&lt;b&gt;&amp;_%$#(scale=0.5)" in text
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(blocks) == 2 * (2 + 1 + 1 + 1) + 2  # quality, cost, ranks, audits; tuning, failures
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert "| **fed_&lt;b" in text  # the best strategy stands out


def test_what_would_end_a_cell_does_not() -> None:
    assert tables._plain("a|b`c*d[e]\n<f>") == r"a\|b\`c\*d\[e\] &lt;f&gt;"
    shown = tables._tex(r"50% of {a_b} & $c ~ ^ \d #1 <e> [-0.5, +2] x-y")
    assert shown == (
        r"50\% of \{a\_b\} \& \$c \textasciitilde{} \textasciicircum{} \textbackslash{}d \#1 "
        r"\textless{}e\textgreater{} {[}$-$0.5, +2{]} x-y"
    )


def test_latex_has_as_many_cells_as_columns_and_every_brace_closed(made: Comparison) -> None:
    text = tables.latex(made)
    bare = re.sub(r"\\[\\{}%&#$_]", "", text)
    assert bare.count("{") == bare.count("}")
    tabulars = re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.S)
    assert len(tabulars) == 12
    for columns, body in tabulars:
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) > 1
        for line in lines:
            assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1
    for name in ("table", "tabular"):
        assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}")


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="there is no LaTeX here")
def test_latex_compiles(made: Comparison, tmp_path: Path) -> None:
    (tmp_path / "tables.tex").write_text(tables.latex(made), encoding="utf-8")
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs,graphicx}\\usepackage[T1]{fontenc}\n"
        "\\begin{document}\\input{tables}\\end{document}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_target_that_no_seed_reaches_is_said(made: Comparison) -> None:
    table = tables.cost(made, made.conditions[0])
    rows = {row[0]: row for row in table.rows}
    assert rows["local_only"][5:] == ["0 of 3 seeds", "-", "-", "-", "-"]
    assert rows["fedit"][5:8] == ["3.0", "4.5 MB", "7.0 s"]
    assert rows["centralized"][2:4] == ["-", "-"]
