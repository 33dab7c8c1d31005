"""The plots of a study that varies epsilon: what a promise costs in quality, and what leaks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from fedtune.audits.finding import INVALID
from fedtune.pages import blank, plain, words
from fedtune.studies.comparison import PROTOCOLS, Arm, Comparison, Condition, Interval
from fedtune.studies.marks import LEGEND, Look, Plan
from fedtune.studies.study import EPSILON, UNPROMISED
from fedtune.studies.verdict import MODELS

STEP = 0.04  # between arms at one epsilon, so that their intervals do not hide each other


@dataclass(frozen=True)
class Value:
    """A mean, the ends of its interval, and whether all that it is made of was valid."""

    mean: float
    low: float
    high: float
    valid: bool = True


def _value(mean: float, ends: Interval | None, *, valid: bool = True) -> Value:
    return Value(mean, ends.low, ends.high, valid) if ends else Value(mean, mean, mean, valid)


def plans(comparison: Comparison, look: Mapping[str, Look]) -> list[Plan]:
    """Quality and every audit's leading measures against epsilon; [] where it is not varied."""
    made: list[Plan] = []
    for name, conditions in _families(comparison.conditions):
        suffix = f", {name}" if name else ""
        for protocol in PROTOCOLS:
            title = f"{words(comparison.metric).capitalize()} of the {MODELS[protocol]}{suffix}"
            figure = _lines(
                conditions, words(comparison.metric), _quality(comparison.metric, protocol), look
            )
            made.append((title, f"On test rows: {PROTOCOLS[protocol]}.", figure, True))
        for audit, measure in _measured(conditions):
            figure = _lines(conditions, measure, _leak(audit, measure), look)
            if figure:
                _add_allowed(figure, conditions, audit, measure, look)
            made.append((f"{audit.capitalize()}: {measure}{suffix}", "Of audits.", figure, True))
    return made


def _families(conditions: Iterable[Condition]) -> list[tuple[str, list[Condition]]]:
    """Conditions that differ in epsilon alone, by what else is changed; no promise comes last."""
    found: dict[str, list[Condition]] = {}
    for condition in conditions:
        if EPSILON in condition.changes:
            rest = {k: v for k, v in condition.changes.items() if k not in (EPSILON, *UNPROMISED)}
            name = ", ".join(f"{key}={value}" for key, value in rest.items())
            found.setdefault(name, []).append(condition)
    return [
        (name, sorted(own, key=lambda c: float(c.changes[EPSILON]) or float("inf")))
        for name, own in found.items()
        if len(own) > 1
    ]


def _quality(metric: str, protocol: str) -> Callable[[Arm], Value | None]:
    def value(arm: Arm) -> Value | None:
        score = arm.score(protocol, metric)
        return _value(score.mean, score.interval or score.bootstrap) if score else None

    return value


def _leak(name: str, measure: str) -> Callable[[Arm], Value | None]:
    def value(arm: Arm) -> Value | None:
        found = (a for a in arm.audits if (a.audit, a.measure) == (name, measure))
        audit = next(found, None)
        if audit is None or audit.mean is None:
            return None
        return _value(audit.mean, audit.interval, valid=INVALID not in audit.verdicts)

    return value


def _measured(conditions: Iterable[Condition]) -> list[tuple[str, str]]:
    """(audit, measure) of whatever any strategy has, once each."""
    return list(
        dict.fromkeys(
            (audit.audit, audit.measure)
            for condition in conditions
            for arm in condition.arms
            if arm.role == "strategy"
            for audit in arm.audits
            if audit.measure
        )
    )


def _lines(
    conditions: Sequence[Condition],
    title: str,
    value: Callable[[Arm], Value | None],
    look: Mapping[str, Look],
) -> go.Figure | None:
    """A line a strategy over the epsilons, None where none has a value."""
    paths = _paths(conditions, value)
    if not paths:
        return None
    short = title.split(",")[0].split(" of ")[0]  # the whole title stands above the plot
    figure = blank("epsilon", plain(short), 340 + LEGEND * len(paths))
    for number, (arm, points) in enumerate(paths.items()):
        style = look[arm]
        shift = STEP * (number - (len(paths) - 1) / 2)
        figure.add_scatter(
            x=[place + shift for place, _ in points],
            y=[found.mean for _, found in points],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [found.high - found.mean for _, found in points],
                "arrayminus": [found.mean - found.low for _, found in points],
                "color": style.colour,
                "thickness": 1.6,
                "width": 5,
            },
            mode="lines+markers",
            name=plain(arm),
            line={"color": style.colour, "dash": style.dash, "width": 2},
            marker=style.marker(9)
            | {"symbol": [style.symbol + ("" if f.valid else "-open") for _, f in points]},
            hovertemplate="%{fullData.name}<br>%{y:.4f}<extra></extra>",
        )
    texts = [f"{c.changes[EPSILON]:g}" if c.changes[EPSILON] else "none" for c in conditions]
    figure.update_xaxes(
        tickvals=list(range(len(texts))), ticktext=texts, range=[-0.4, len(texts) - 0.6]
    )
    return figure


def _paths(
    conditions: Sequence[Condition], value: Callable[[Arm], Value | None]
) -> dict[str, list[tuple[int, Value]]]:
    """Strategy -> place of the epsilon and value there."""
    paths: dict[str, list[tuple[int, Value]]] = {}
    for place, condition in enumerate(conditions):
        for arm in condition.arms:
            if arm.role == "strategy" and (found := value(arm)):
                paths.setdefault(arm.name, []).append((place, found))
    return paths


def _add_allowed(
    figure: go.Figure,
    conditions: Sequence[Condition],
    audit: str,
    measure: str,
    look: Mapping[str, Look],
) -> None:
    """What claims allow, a dotted line a strategy."""

    def allowed(arm: Arm) -> Value | None:
        found = (a.allowed for a in arm.audits if (a.audit, a.measure) == (audit, measure))
        limit = next(found, None)
        return None if limit is None else _value(limit, None)

    for arm, points in _paths(conditions, allowed).items():
        figure.add_scatter(
            x=[place for place, _ in points],
            y=[limit.mean for _, limit in points],
            mode="lines",
            name=f"{plain(arm)}, allowed",
            line={"color": look[arm].colour, "dash": "dot", "width": 1.2},
            showlegend=False,
            hovertemplate="%{fullData.name}<br>%{y:.4f}<extra></extra>",
        )
