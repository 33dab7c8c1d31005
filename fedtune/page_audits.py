"""A run's audits for its page: the rows of their table, and their measures beside the claim."""

from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go

from fedtune.audits.finding import Finding, Measure
from fedtune.audits.shown import number
from fedtune.pages import COLOURS, Drawn, blank, plain

MOST = 40  # measures of an audit in a plot; the first are the most telling
TALL = 26  # pixels a measure


def of(findings: Iterable[Finding]) -> dict[str, Any]:
    """The template's "audits" and "audit_figures"; both empty without audits."""
    found = list(findings)
    return {
        "audits": [(finding, _rows(finding)) for finding in found],
        "audit_figures": {finding.audit: _figures(finding) for finding in found},
    }


def _rows(finding: Finding) -> list[tuple[str, str, str, str]]:
    """(measure, value, what the claim allows, how) of each measure; one line of dashes for none."""
    return [
        (m.title, number(m), "-" if m.allowed is None else f"{m.allowed:.3g}", m.method)
        for m in finding.measures
    ] or [("-", "-", "-", "")]


def _figures(finding: Finding) -> list[Drawn]:
    """One plot, or none where nothing was measured."""
    measures = finding.measures[:MOST]
    if not measures:
        return []
    figure = blank("value and 95 % interval", "", max(200, 120 + TALL * len(measures)))
    names = [plain(measure.title) for measure in measures]
    figure.add_scatter(
        x=[measure.value for measure in measures],
        y=names,
        mode="markers",
        name="measured",
        marker={"color": COLOURS[0], "size": 9},
        error_x=_intervals(measures),
    )
    _add_allowed(figure, measures)
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=names[::-1], automargin=True
    )
    note = "Dots: measured, with their intervals. Lines: the most that the claim allows."
    return [Drawn(f"audit-{finding.audit}", f"Audit: {finding.audit}", note, figure.to_json())]


def _intervals(measures: Iterable[Measure]) -> dict[str, Any]:
    pairs = [
        (
            0.0 if m.high is None else m.high - m.value,
            0.0 if m.low is None else m.value - m.low,
        )
        for m in measures
    ]
    return {
        "type": "data",
        "symmetric": False,
        "array": [up for up, _ in pairs],
        "arrayminus": [down for _, down in pairs],
        "color": COLOURS[0],
    }


def _add_allowed(figure: go.Figure, measures: Iterable[Measure]) -> None:
    limits = [(m.allowed, plain(m.title)) for m in measures if m.allowed is not None]
    if limits:
        figure.add_scatter(
            x=[value for value, _ in limits],
            y=[name for _, name in limits],
            mode="markers",
            name="allowed by the claim",
            marker={
                "color": COLOURS[1],
                "symbol": "line-ns-open",
                "size": 18,
                "line": {"width": 3},
            },
        )
