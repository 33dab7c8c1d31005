"""The plots of a comparison.

Those of a protocol hold the arms that have a score under it, and no others.
"""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from fedtune.pages import blank, plain, words
from fedtune.studies.comparison import UNTUNED, Arm, Comparison, Condition, Interval, Ranking
from fedtune.studies.marks import (
    GREY,
    LEGEND,
    Look,
    bands,
    by_client,
    bytes_axis,
    curve_values,
    diagnostic_values,
    final,
    label,
    lying,
    moved,
    over_seeds,
    thick_bar,
    thin_line,
    way,
    whisker,
    yardstick,
)

MOST_POINTS = 100  # clients that are drawn one by one
MOST_TICKS = 12  # ranks with a tick each
WIDE_RANGE = 100  # from the lowest to the highest value before an axis is logarithmic


def differences(
    comparison: Comparison, arms: Sequence[Arm], protocol: str, look: Mapping[str, Look]
) -> go.Figure | None:
    """Each strategy minus the baseline; the thick bar is the bootstrap's interval."""
    shown = []
    for arm in arms:
        score = arm.score(protocol, comparison.metric)
        if arm.role == "strategy" and score and score.difference:
            shown.append((arm, score.difference))
    if not shown:
        return None
    shown.sort(key=lambda pair: pair[1].mean, reverse=comparison.direction == "higher")
    title = f"{words(comparison.metric)} minus {plain(comparison.baseline)}"
    figure = lying(title, [arm.name for arm, _ in shown])
    figure.add_vline(x=0, line={"color": GREY, "dash": "dash", "width": 1.5})
    for arm, difference in shown:
        style = look[arm.name]
        bootstrap = _ends(difference.bootstrap)
        if bootstrap:
            thick_bar(figure, arm.name, bootstrap, style)
        ends = _ends(difference.interval) or [difference.mean]
        whisker(figure, arm.name, difference.mean, ends, style, "%{x:+.4f}")
    values = [0.0, *(d.mean for _, d in shown)]
    values += [e for _, d in shown for e in _ends(d.interval) + _ends(d.bootstrap)]
    room = 0.06 * (max(values) - min(values)) or 0.01
    figure.update_xaxes(range=[min(values) - room, max(values) + room])
    return figure


def _ends(interval: Interval | None) -> list[float]:
    return [interval.low, interval.high] if interval else []


def ranks(ranking: Ranking, look: Mapping[str, Look]) -> go.Figure:
    """Mean rank and its interval, with the share of draws in which a strategy is the best."""
    figure = lying("rank, 1 is best", [rank.arm for rank in ranking.ranks])
    for rank in ranking.ranks:
        whisker(figure, rank.arm, rank.mean, (rank.low, rank.high), look[rank.arm], "%{x:.2f}")
        figure.add_annotation(
            x=1.01,
            xref="paper",
            y=label(rank.arm),
            text=f"{100 * rank.best:.0f} %",
            showarrow=False,
            xanchor="left",
        )
    most = len(ranking.ranks)
    figure.update_layout(margin={"r": 56})
    figure.update_xaxes(
        range=[0.7, most + 0.3], dtick=1 if most <= MOST_TICKS else None, tickformat="d"
    )
    return figure


def tradeoff(
    comparison: Comparison, arms: Sequence[Arm], protocol: str, look: Mapping[str, Look]
) -> go.Figure | None:
    """Final quality against bytes; the thin lines are the way there, round by round."""
    federated = [arm for arm in arms if moved(arm) > 0]
    if not federated:
        return None
    metric = comparison.metric
    figure = blank("bytes moved, up and down", words(metric), 420 + LEGEND * len(arms))
    ways = {arm.name: way(arm, metric) for arm in federated}
    for name, points in ways.items():
        thin_line(figure, name, points, look[name])
    for arm in federated:
        final(figure, arm, protocol, metric, look[arm.name])
    bottom, top = _range(arms, federated, protocol, metric)
    figure.update_yaxes(range=[bottom, top])
    for number, arm in enumerate(arm for arm in arms if arm not in federated):
        if score := arm.score(protocol, metric):
            yardstick(figure, arm.name, score.mean, look[arm.name], number)
    spent = [moved(arm) for arm in federated]
    early = [x for points in ways.values() for x, y in points if bottom <= y <= top]
    bytes_axis(figure, min([*spent, *early]), max(spent))
    return figure


def _range(
    arms: Sequence[Arm], federated: Sequence[Arm], protocol: str, metric: str
) -> tuple[float, float]:
    """The axis of quality: every mark, and what moves nothing where that is not far away."""
    ends = [end for arm in federated for end in _covered(arm, protocol, metric)]
    size = max(ends) - min(ends)
    for arm in arms:
        score = arm.score(protocol, metric)
        if score and min(ends) - size <= score.mean <= max(ends) + size:
            ends.append(score.mean)
    room = 0.08 * (max(ends) - min(ends)) or 0.01
    return min(ends) - room, max(ends) + room


def _covered(arm: Arm, protocol: str, metric: str) -> list[float]:
    """What an arm's mark covers on the axis of quality."""
    score = arm.score(protocol, metric)
    if score is None:
        return []
    return [score.mean, *_ends(score.interval)]


def curves(
    comparison: Comparison, arms: Sequence[Arm], look: Mapping[str, Look]
) -> go.Figure | None:
    """The deciding metric by round: mean over seeds, and from the lowest to the highest seed."""
    metric = comparison.metric
    moving = [arm for arm in arms if any(len(curve.rounds) > 1 for curve in arm.curves)]
    paths = [(arm, over_seeds(curve_values(arm.curves, metric))) for arm in moving]
    return bands(metric, paths, look)


def diagnostic(arms: Sequence[Arm], key: str, look: Mapping[str, Look]) -> go.Figure | None:
    """One diagnostic of the aggregation by round, as `curves`; a wide range on a log axis."""
    paths = [(arm, over_seeds(diagnostic_values(arm.curves, key))) for arm in arms]
    figure = bands(key, paths, look)
    values = [value for _, path in paths for point in path for value in (point.low, point.high)]
    positive = [value for value in values if value > 0]
    signed = any(value < 0 for value in values)
    if figure and positive and not signed and max(positive) > WIDE_RANGE * min(positive):
        figure.update_yaxes(type="log", exponentformat="power")
    return figure


def clients(
    comparison: Comparison, arms: Sequence[Arm], look: Mapping[str, Look]
) -> go.Figure | None:
    """How the clients of each arm are distributed, a point a client, mean over seeds."""
    metric = comparison.metric
    # The untuned model lies so far below that the others would have no room.
    held = {arm.name: by_client(arm, metric) for arm in arms if arm.name != UNTUNED}
    shown = [name for name, values in held.items() if values]
    if not shown:
        return None
    figure = lying(words(metric), shown)
    many = max(map(len, held.values())) > MOST_POINTS
    for name in shown:
        values = held[name]
        figure.add_box(
            x=list(values.values()),
            y=[label(name)] * len(values),
            text=[plain(client) for client in values],
            orientation="h",
            name=plain(name),
            boxpoints="outliers" if many else "all",
            jitter=0.5,
            pointpos=0,
            marker={"color": look[name].colour, "size": 5, "opacity": 0.75},
            line={"width": 1.5},
            fillcolor=look[name].band,
            hovertemplate="%{text}: %{x:.4f}<extra>%{fullData.name}</extra>",
        )
    return figure


def tuning(
    comparison: Comparison, condition: Condition, look: Mapping[str, Look]
) -> go.Figure | None:
    """Validation score against the tried value; the chosen one is larger."""
    found = [t for t in comparison.tuning if t.condition == condition.name]
    figure = blank("tried value", "validation score", 340 + LEGEND * len(found))
    for tuned in found:
        points = sorted(
            (float(trial.value), trial.score)
            for trial in tuned.trials
            if trial.score is not None and isinstance(trial.value, int | float)
        )
        style = look[tuned.arm]
        if points:
            figure.add_scatter(
                x=[value for value, _ in points],
                y=[score for _, score in points],
                mode="lines+markers",
                name=plain(tuned.arm),
                line={"color": style.colour, "dash": style.dash, "width": 1.5},
                marker=style.marker(7)
                | {"size": [14 if value == tuned.chosen else 7 for value, _ in points]},
            )
    values = {x for trace in figure.data for x in trace.x}
    if values and min(values) > 0:
        ticks = sorted(values)
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return figure if figure.data else None
