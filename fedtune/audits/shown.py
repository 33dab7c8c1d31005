"""Findings for a terminal of eighty columns or more."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedtune.audits.finding import BROKEN, HOLDS, Finding, Measure
from fedtune.tables import MOST_ROWS, titled

STYLES = {HOLDS: "green", BROKEN: "bold red"}


def number(measure: Measure) -> str:
    """A measured value with its interval, "0.62 [0.58, 0.66]"."""
    ends = ["-" if end is None else f"{end:.3g}" for end in (measure.low, measure.high)]
    interval = "" if ends == ["-", "-"] else f" [{ends[0]}, {ends[1]}]"
    return f"{measure.value:.3g}{interval}"


def tables(findings: Sequence[Finding], most: int = MOST_ROWS) -> list[Group]:
    """A table of the measures, then each audit in words."""
    table = Table(box=None, pad_edge=False)
    table.add_column("audit", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("measure")
    table.add_column("value [95 %]", justify="right", no_wrap=True)
    for finding in findings:
        head = [finding.audit, Text(finding.verdict, STYLES.get(finding.verdict, ""))]
        for measure in finding.measures[:most]:
            table.add_row(*head, Text(measure.title), number(measure))
            head = ["", Text()]
        if head[0]:
            table.add_row(*head, "", "-")
        if len(finding.measures) > most:
            table.add_row("", "", f"{len(finding.measures) - most} more in audit.json", "")
    return [titled("Audits", table), *map(_in_words, findings)]


def _in_words(finding: Finding) -> Group:
    lines = Table(box=None, pad_edge=False, show_header=False)
    lines.add_column(no_wrap=True, style="dim")
    lines.add_column()
    for name in ("question", "adversary", "claim", "reason", "validity"):
        if text := getattr(finding, name):
            lines.add_row(name, Text(text))
    return titled(f"{finding.audit}: {finding.verdict}", lines)
