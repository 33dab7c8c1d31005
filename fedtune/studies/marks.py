"""The marks that the plots of a comparison are made of, and the numbers under them.

An arm has one colour, symbol and dash throughout the page; references are grey.
"""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from fedtune.pages import COLOURS, blank, plain, words
from fedtune.report import human_bytes
from fedtune.studies.comparison import Arm, Comparison, Curve

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "x")
DASHES = ("solid", "dash", "dot", "dashdot")
GREY = COLOURS[-1]
TALL = 34  # pixels an arm in a horizontal chart
LEGEND = 9  # pixels an arm that a legend adds
LONG = 22  # characters of a label before it is broken
# Ticks of a decade on a log axis, by how many times its end is its beginning.
STEPS = (
    (4, (1, 1.5, 2, 3, 4, 5, 6, 8)),
    (15, (1, 2, 5)),
    (150, (1, 3)),
    (math.inf, (1,)),
)
# Title, note and figure of a plot, and whether two of its kind may stand side by side.
Plan = tuple[str, str, go.Figure | None, bool]


@dataclass(frozen=True)
class Look:
    """How an arm is drawn everywhere."""

    colour: str
    symbol: str
    dash: str

    @property
    def band(self) -> str:
        """The colour, nearly transparent."""
        red, green, blue = (int(self.colour[k : k + 2], 16) for k in (1, 3, 5))
        return f"rgba({red},{green},{blue},0.14)"

    def marker(self, size: int) -> dict[str, Any]:
        """The symbol as plotly wants it."""
        return {"color": self.colour, "symbol": self.symbol, "size": size}


@dataclass(frozen=True)
class Point:
    """One round over seeds: the mean, the lowest and the highest."""

    round: int
    mean: float
    low: float
    high: float


def looks(comparison: Comparison) -> dict[str, Look]:
    """Arm -> look, in the order in which the study names the arms."""
    roles = {arm.name: arm.role for c in comparison.conditions for arm in c.arms}
    for tuning in comparison.tuning:  # an arm whose trials all failed is in no condition
        roles.setdefault(tuning.arm, "strategy")
    strategies = [name for name, role in roles.items() if role == "strategy"]
    references = [name for name, role in roles.items() if role != "strategy"]
    hues = COLOURS[:-1]
    found = {
        name: Look(
            hues[k % len(hues)],
            SYMBOLS[k % len(SYMBOLS)],
            DASHES[k // len(hues) % len(DASHES)],
        )
        for k, name in enumerate(strategies)
    }
    for k, name in enumerate(references):
        found[name] = Look(GREY, f"{SYMBOLS[k % len(SYMBOLS)]}-open", DASHES[1 + k % 3])
    return found


def label(name: str) -> str:
    """An arm's name on an axis, a long one on several lines."""
    lines = [""]
    for part in re.split(r"(?<=[(,]) ?", name):
        if lines[-1] and len(lines[-1]) + len(part) >= LONG:
            lines.append("")
        lines[-1] += (" " if lines[-1].endswith(",") else "") + part
    return "<br>".join(map(plain, lines))


def lying(title: str, names: Sequence[str]) -> go.Figure:
    """A blank with an arm a line, the first on top."""
    figure = blank(title, "", 80 + TALL * len(names))
    labels = [label(name) for name in names]
    figure.update_yaxes(
        type="category",
        categoryorder="array",
        categoryarray=labels[::-1],
        range=[-0.6, len(labels) - 0.4],
        automargin=True,
    )
    figure.update_layout(showlegend=False, margin={"l": 10})
    return figure


def whisker(
    figure: go.Figure,
    name: str,
    mean: float,
    ends: Sequence[float],
    look: Look,
    form: str,
) -> None:
    """A point on the arm's line with its interval, or alone where `ends` are one."""
    low, high = min(ends), max(ends)
    figure.add_scatter(
        x=[mean],
        y=[label(name)],
        error_x=_bar(mean, low, high, look) if len(ends) > 1 else None,
        mode="markers",
        name=plain(name),
        marker=look.marker(10),
        hovertemplate=f"%{{y}}: {form} [{low:.3f}, {high:.3f}]<extra></extra>",
    )


def thick_bar(figure: go.Figure, name: str, ends: Sequence[float], look: Look) -> None:
    """A second, half transparent interval on the arm's line."""
    figure.add_scatter(
        x=list(ends),
        y=[label(name)] * len(ends),
        mode="lines",
        line={"color": look.colour, "width": 9},
        opacity=0.35,
        hoverinfo="skip",
    )


def final(figure: go.Figure, arm: Arm, protocol: str, metric: str, look: Look) -> None:
    """Where an arm ends: quality, with its interval, for the bytes that it moved."""
    score, bytes_moved = arm.score(protocol, metric), moved(arm)
    assert score is not None
    interval = score.interval
    figure.add_scatter(
        x=[bytes_moved],
        y=[score.mean],
        error_y=_bar(score.mean, interval.low, interval.high, look) if interval else None,
        mode="markers",
        name=plain(arm.name),
        legendgroup=arm.name,
        marker=look.marker(11),
        text=[human_bytes(bytes_moved)],
        hovertemplate="%{fullData.name}<br>%{y:.4f} for %{text}<extra></extra>",
    )


def way(arm: Arm, metric: str) -> list[tuple[float, float]]:
    """Bytes so far and quality of an arm's rounds, mean over seeds."""
    spent = defaultdict(list)
    for curve in arm.curves:
        for round, count in zip(curve.rounds, curve.bytes, strict=True):
            spent[round].append(count)
    path = over_seeds(curve_values(arm.curves, metric))
    return [(statistics.fmean(spent[p.round]), p.mean) for p in path if min(spent[p.round]) > 0]


def thin_line(
    figure: go.Figure, name: str, points: Sequence[tuple[float, float]], look: Look
) -> None:
    """An arm's way."""
    figure.add_scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        mode="lines",
        line={"color": look.colour, "dash": look.dash, "width": 1.2},
        opacity=0.6,
        legendgroup=name,
        showlegend=False,
        hoverinfo="skip",
    )


def yardstick(figure: go.Figure, name: str, value: float, look: Look, number: int) -> None:
    """A dashed line across the plot for an arm that moves nothing."""
    figure.add_hline(
        y=value,
        line={"color": look.colour, "dash": look.dash, "width": 1.5},
        annotation={"text": f"{plain(name)} {value:.3f}", "font": {"size": 12}},
        annotation_position=("top left", "bottom right", "top right", "bottom left")[number % 4],
    )


def bytes_axis(figure: go.Figure, low: float, high: float) -> None:
    """A log axis from `low` to `high` with ticks in bytes."""
    steps = next(steps for most, steps in STEPS if high <= most * low)
    ticks = [step * 10**power for power in range(16) for step in steps]
    near = [tick for tick in ticks if low / 2 <= tick <= high * 2]
    texts = [human_bytes(tick).replace(".0 ", " ") for tick in near]
    ends = [math.log10(low / 1.15), math.log10(high * 1.15)]
    figure.update_xaxes(type="log", tickvals=near, ticktext=texts, tickangle=0, range=ends)


def bands(
    name: str, paths: Sequence[tuple[Arm, list[Point]]], look: Mapping[str, Look]
) -> go.Figure | None:
    """Lines by round, each over a band from the lowest seed to the highest."""
    drawn = [(arm, path) for arm, path in paths if path]
    if not drawn:
        return None
    rounds = max(point.round for _, path in drawn for point in path)
    figure = blank("round", words(name), 380 + LEGEND * len(drawn), rounds)
    figure.update_xaxes(range=[-0.02 * rounds, 1.02 * rounds])
    for arm, path in drawn:
        style, xs = look[arm.name], [point.round for point in path]
        if any(point.low < point.high for point in path):
            figure.add_scatter(
                x=xs + xs[::-1],
                y=[point.high for point in path] + [point.low for point in path[::-1]],
                fill="toself",
                fillcolor=style.band,
                line={"width": 0},
                mode="lines",
                legendgroup=arm.name,
                showlegend=False,
                hoverinfo="skip",
            )
    for arm, path in drawn:
        style = look[arm.name]
        figure.add_scatter(
            x=[point.round for point in path],
            y=[point.mean for point in path],
            mode="lines+markers" if len(path) <= 30 else "lines",
            name=plain(arm.name),
            legendgroup=arm.name,
            line={"color": style.colour, "dash": style.dash, "width": 2},
            marker=style.marker(6),
            hovertemplate="%{y:.4g}",
        )
    return figure


def curve_values(curves: Iterable[Curve], metric: str) -> list[list[tuple[int, float]]]:
    """Round and value of a metric, a list a seed."""
    return [_known(curve.rounds, curve.values.get(metric, [])) for curve in curves]


def diagnostic_values(curves: Iterable[Curve], key: str) -> list[list[tuple[int, float]]]:
    """The same of a diagnostic of the aggregation."""
    return [_known(curve.rounds, curve.aggregation.get(key, [])) for curve in curves]


def over_seeds(seeds: Iterable[list[tuple[int, float]]]) -> list[Point]:
    """Each round that any seed measured."""
    found = defaultdict(list)
    for path in seeds:
        for round, value in path:
            found[round].append(value)
    return [Point(r, statistics.fmean(v), min(v), max(v)) for r, v in sorted(found.items())]


def by_client(arm: Arm, metric: str) -> dict[str, float]:
    """Client -> value on its own test rows, mean over seeds."""
    found = defaultdict(list)
    for client in arm.clients:
        if metric in client.values:
            found[client.client].append(client.values[metric])
    return {name: statistics.fmean(values) for name, values in found.items()}


def moved(arm: Arm) -> float:
    """Bytes up and down, mean over seeds; 0 where nothing is federated."""
    up, down = arm.cost.bytes_up or [0], arm.cost.bytes_down or [0]
    return statistics.fmean(up) + statistics.fmean(down)


def _known(rounds: Sequence[int], values: Sequence[float | None]) -> list[tuple[int, float]]:
    return [(r, v) for r, v in zip(rounds, values, strict=False) if v is not None]


def _bar(mean: float, low: float, high: float, look: Look) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, high - mean)],
        "arrayminus": [max(0.0, mean - low)],
        "color": look.colour,
        "thickness": 1.6,
        "width": 5,
    }
