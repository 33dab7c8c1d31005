"""The tables of a comparison: once as text, then as Markdown, LaTeX or for a terminal."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable
from rich.text import Text

from fedtune.config import Leaf
from fedtune.report import human_bytes, human_time
from fedtune.studies.comparison import (
    PROTOCOLS,
    Arm,
    Comparison,
    Condition,
    Interval,
    Ranking,
    Score,
)

NONE = "-"
SHOWN = ("relative_error", "effective_rank", "drift")  # of the diagnostics; files have all
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


@dataclass(frozen=True)
class Table:
    """Text in rows and columns, escaped for nothing yet.

    Attributes:
        title: what it shows.
        columns: the first is text, the others are numbers.
        rows: as long as `columns` each.
        bold: numbers of rows that stand out.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    bold: tuple[int, ...] = ()


def all_of(comparison: Comparison) -> list[Table]:
    """Every table: quality by protocol, cost and ranking of each condition, tuning, failures."""
    tables: list[Table] = []
    for condition in comparison.conditions:
        tables += [quality(comparison, condition, protocol) for protocol in PROTOCOLS]
        tables.append(cost(comparison, condition))
        tables += [ranks(comparison, condition, ranking) for ranking in condition.rankings]
        tables.append(audits(condition))
    tables += [tuning(comparison)] if comparison.tuning else []
    tables += [failures(comparison)] if comparison.failures else []
    return [table for table in tables if table.rows]


def quality(comparison: Comparison, condition: Condition, protocol: str) -> Table:
    """How good each arm is, and how sure that is."""
    metric = comparison.metric
    others = [m for m in comparison.metrics if m != metric]
    shown = [(arm, score) for arm in condition.arms if (score := arm.score(protocol, metric))]
    rows = [
        [
            arm.name,
            arm.kind,
            f"{_number(score.mean)}{_interval(score.interval or score.bootstrap)}",
            *_difference(score),
            _number(score.worst),
            _number(score.spread),
            *(_number(other.mean if (other := arm.score(protocol, m)) else None) for m in others),
        ]
        for arm, score in shown
    ]
    gap = f"minus {comparison.baseline}"
    columns = ["arm", "model", _words(metric), gap, "p", "p (Holm)", "p (flips)", "worst client"]
    columns += ["spread", *map(_words, others)]
    seeds = len(comparison.seeds)
    title = f"{PROTOCOLS[protocol]}; {seeds} seed{'s' if seeds > 1 else ''}, 95 % intervals"
    means = [score.mean for arm, score in shown if arm.role == "strategy"]
    best = (max if comparison.direction == "higher" else min)(means, default=None)
    bold = [n for n, (arm, s) in enumerate(shown) if arm.role == "strategy" and s.mean == best]
    return Table(_titled(condition, title), columns, rows, tuple(bold))


def cost(comparison: Comparison, condition: Condition) -> Table:
    """What each arm took, and what its rounds showed."""
    names = [n for n in SHOWN if any(n in arm.aggregation for arm in condition.arms)]
    columns = ["arm", "rounds", "up", "down", "time"]
    if comparison.target is not None:
        sign = ">=" if comparison.direction == "higher" else "<="
        target = f"{_words(comparison.metric)} {sign} {comparison.target:g}"
        columns += [f"rounds to {target}", "bytes to it", "time to it"]
    rows = [
        [*_cost(arm, comparison.target), *(_number(arm.aggregation.get(n)) for n in names)]
        for arm in condition.arms
    ]
    title = _titled(condition, "cost of a seed, mean over seeds")
    return Table(title, [*columns, *map(_words, names)], rows)


def ranks(comparison: Comparison, condition: Condition, ranking: Ranking) -> Table:
    """Where strategies stand, and how sure that is."""
    rows = [
        [r.arm, f"{r.mean:.2f}", f"{r.low:g} to {r.high:g}", f"{r.best:.0%}"] for r in ranking.ranks
    ]
    title = f"ranks by {_words(ranking.metric)}, {PROTOCOLS[ranking.protocol]}; {ranking.method}"
    return Table(_titled(condition, title), ["arm", "mean rank", "95 % interval", "best in"], rows)


def audits(condition: Condition) -> Table:
    """What audits of each arm's cells measured, and what they say of its claims."""
    rows = [
        [
            arm.name,
            f"{audit.audit}{': ' if audit.measure else ''}{audit.measure}",
            f"{_number(audit.mean)}{_interval(audit.interval)}",
            _number(audit.allowed),
            ", ".join(f"{verdict} {count}" for verdict, count in audit.verdicts.items()),
        ]
        for arm in condition.arms
        for audit in arm.audits
    ]
    columns = ["arm", "audit", "mean over seeds", "allowed", "verdicts"]
    return Table(_titled(condition, "audits, 95 % intervals"), columns, rows)


def tuning(comparison: Comparison) -> Table:
    """What was tried for each arm, and what was chosen."""
    rows = []
    for tuned in comparison.tuning:
        tried = ", ".join(f"{_leaf(t.value)}: {_number(t.score)}" for t in tuned.trials)
        rows.append([tuned.arm, tuned.condition or NONE, _leaf(tuned.chosen), tried])
    first = comparison.tuning[0]
    title = (
        f"Tuned on validation rows ({first.validation_fraction:.0%} of the training rows), "
        f"{len(first.trials)} trials of {first.rounds} rounds each, by {_words(first.metric)}"
    )
    return Table(title, ["arm", "condition", first.key, "trials"], rows)


def failures(comparison: Comparison) -> Table:
    """Cells without a result."""
    rows = [[f.arm, f.condition or NONE, str(f.seed), f.reason] for f in comparison.failures]
    return Table("Cells that failed", ["arm", "condition", "seed", "reason"], rows)


def markdown(comparison: Comparison) -> str:
    """The whole comparison for a README or a pull request."""
    lines = [f"# {_plain(comparison.study)}", ""]
    lines += [_plain(comparison.question), ""] if comparison.question else []
    for table in all_of(comparison):
        lines += [f"**{_plain(table.title)}**", ""]
        lines.append(_row(table.columns))
        lines.append("|---|" + "---:|" * (len(table.columns) - 1))
        for number, row in enumerate(table.rows):
            texts = [_plain(text) for text in row]
            if number in table.bold:
                texts[0] = f"**{texts[0]}**"
            lines.append("| " + " | ".join(texts) + " |")
        lines.append("")
    lines += [f"- {_plain(note)}" for note in comparison.notes]
    return "\n".join(lines) + "\n"


def latex(comparison: Comparison) -> str:
    """Every table as a float; the document needs `booktabs` and `graphicx`."""
    lines = [r"% \usepackage{booktabs,graphicx} and \usepackage[T1]{fontenc} in the preamble."]
    for table in all_of(comparison):
        lines += [
            "",
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{_tex(table.title)}}}",
        ]
        lines.append(r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%")
        lines += [f"\\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}", r"\toprule"]
        lines += [" & ".join(map(_tex, table.columns)) + r" \\", r"\midrule"]
        for number, row in enumerate(table.rows):
            texts = [_tex(text) for text in row]
            if number in table.bold:
                texts[0] = f"\\textbf{{{texts[0]}}}"
            lines.append(" & ".join(texts) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def terminal(comparison: Comparison) -> list[tuple[str, RichTable]]:
    """(title, table) of what fits eighty columns; the files have the rest."""
    kept = ["arm", _words(comparison.metric), f"minus {comparison.baseline}", "p (Holm)"]
    shown = []
    for condition in comparison.conditions:
        for protocol in PROTOCOLS:
            table = quality(comparison, condition, protocol)
            if table.rows:
                shown.append((table.title, _rich(table, kept)))
        if (table := audits(condition)).rows:
            shown.append(
                (table.title, _rich(table, ["arm", "audit", "mean over seeds", "verdicts"]))
            )
    if comparison.tuning:
        table = tuning(comparison)
        shown.append((table.title, _rich(table, table.columns)))
    return shown


def _rich(table: Table, kept: Sequence[str]) -> RichTable:
    places = [n for n, name in enumerate(table.columns) if name in kept]
    made = RichTable(box=None, pad_edge=False)
    for place in places:
        made.add_column(table.columns[place], justify="right" if place else "left", no_wrap=True)
    for number, row in enumerate(table.rows):
        style = "bold" if number in table.bold else ""
        made.add_row(*(Text(row[place]) for place in places), style=style)
    return made


def _titled(condition: Condition, text: str) -> str:
    text = text[:1].upper() + text[1:]
    return f"{condition.name}: {text}" if condition.name else text


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def _leaf(value: Leaf | None) -> str:
    """A setting, a float with as many digits as tell it apart."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return NONE if value is None else str(value)


def _interval(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return ""
    # Adding 0 takes the sign off a zero.
    low, high = (round(end, 3) + 0.0 for end in (interval.low, interval.high))
    return f" [{low:{sign}.3f}, {high:{sign}.3f}]"


def _p(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.3f}" if value >= 1e-3 else "<0.001"


def _difference(score: Score) -> list[str]:
    """Difference with its t interval, p, Holm's and the permutation test's."""
    gap = score.difference
    if gap is None:
        return [NONE] * 4
    shown = f"{round(gap.mean, 3) + 0.0:+.3f}{_interval(gap.interval or gap.bootstrap, '+')}"
    return [shown, _p(gap.p), _p(gap.p_holm), _p(gap.p_permutation)]


def _cost(arm: Arm, target: float | None) -> list[str]:
    c = arm.cost
    up, down = (human_bytes(_mean(b)) if b else NONE for b in (c.bytes_up, c.bytes_down))
    row = [arm.name, f"{_mean(c.rounds):g}", up, down, human_time(_mean(c.seconds))]
    if target is None:
        return row
    reached = [n for n in c.rounds_to_target if n is not None]
    seeds = len(c.rounds_to_target)
    if not reached:
        return [*row, f"0 of {seeds} seeds", NONE, NONE]
    share = "" if len(reached) == seeds else f" ({len(reached)} of {seeds} seeds)"
    moved = [b for b in c.bytes_to_target if b is not None]
    seconds = [s for s in c.seconds_to_target if s is not None]
    moved_text = human_bytes(_mean(moved)) if moved else NONE
    return [*row, f"{_mean(reached):.1f}{share}", moved_text, human_time(_mean(seconds))]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(map(_plain, texts)) + " |"


def _plain(text: str) -> str:
    """Text in Markdown that no reader takes for markup or for a cell's end."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|`*\[\]])", r"\\\1", text)


def _tex(text: str) -> str:
    escaped = "".join(LATEX.get(character, character) for character in " ".join(text.split()))
    # A bracket at the start of a row would be taken for an argument of the line break before it.
    escaped = re.sub(r"([\[\]])", r"{\1}", escaped)
    return re.sub(r"(?<![\w.])-(?=[\d.])", "$-$", escaped)
