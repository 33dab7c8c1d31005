"""comparison.html: a study's result in one self-contained file, for whoever has to judge it.

The words first, then for each condition the global model and, apart from it, the personal models:
tables that say everything without a script, and plots beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.pages import Drawn, rendered, words
from fedtune.studies import extras as study
from fedtune.studies import figures as plots
from fedtune.studies import promises
from fedtune.studies import rows as tables
from fedtune.studies.comparison import PROTOCOLS, Comparison, Condition
from fedtune.studies.marks import Look, Plan, looks
from fedtune.studies.page_tables import Table
from fedtune.studies.template import TEMPLATE
from fedtune.studies.verdict import MODELS, verdict


@dataclass(frozen=True)
class Part:
    """One protocol in one condition.

    Attributes:
        title: of it.
        note: what was measured.
        said: its sentences.
        tables: main ones.
        more: tables that are folded away.
        figures: its plots.
    """

    title: str
    note: str
    said: list[str]
    tables: list[Table]
    more: list[Table]
    figures: list[Drawn]


@dataclass(frozen=True)
class Section:
    """One condition: its title, its protocols, then cost and aggregation."""

    id: str
    title: str
    parts: list[Part]


def write(comparison: Comparison, path: Path) -> None:
    """Write the page of a finished comparison."""
    said = verdict(comparison)
    look = looks(comparison)
    sections = [
        _section(comparison, number, sentences, look)
        for number, sentences in enumerate(said.conditions)
    ]
    tuning = [
        Drawn(f"tuning-{number}", f"Trials{_in(condition)}", note, figure.to_json(), half=True)
        for number, condition in enumerate(comparison.conditions)
        if (figure := plots.tuning(comparison, condition, look))
        for note in ["Validation score of each value; the chosen one is larger."]
    ]
    page = rendered(
        TEMPLATE,
        comparison=comparison,
        said=said.overall,
        sections=sections,
        promises=_drawn("promises", promises.plans(comparison, look)),
        tuned=study.tuned(comparison),
        trials=study.trials(comparison),
        tuning=tuning,
        failures=study.failures(comparison),
        strategies=sorted(
            {a.name for c in comparison.conditions for a in c.arms if a.role == "strategy"}
        ),
    )
    path.write_text(page, encoding="utf-8")


def _in(condition: Condition) -> str:
    return f", {condition.name}" if condition.name else ""


def _section(
    comparison: Comparison, number: int, said: dict[str, list[str]], look: dict[str, Look]
) -> Section:
    condition = comparison.conditions[number]
    parts = [
        _protocol(comparison, number, protocol, said.get(protocol, []), look)
        for protocol in PROTOCOLS
    ]
    main, more = (tables.aggregation(comparison, condition, main=main) for main in (True, False))
    cost = Part(
        "Cost and aggregation",
        "",
        [],
        [table for table in (tables.costs(comparison, condition), main) if table],
        [more] if more else [],
        _drawn(f"c{number}-aggregation", _diagnostics(condition, look)),
    )
    shown = [part for part in parts if part is not None]
    if audits := tables.audits(condition):
        shown.append(Part("Audits", "", [], [audits], [], []))
    return Section(f"condition-{number}", condition.name or "Results", [*shown, cost])


def _protocol(
    comparison: Comparison, number: int, protocol: str, said: list[str], look: dict[str, Look]
) -> Part | None:
    """Tables and plots of a protocol, None where no strategy has a score under it."""
    condition = comparison.conditions[number]
    main = tables.quality(comparison, condition, protocol)
    if main is None:
        return None
    other = tables.others(comparison, condition, protocol)
    return Part(
        MODELS[protocol].capitalize(),
        f"Measured: {PROTOCOLS[protocol]}.",
        said,
        [main],
        [other] if other else [],
        _drawn(f"c{number}-{protocol}", _plans(comparison, condition, protocol, look)),
    )


def _plans(
    comparison: Comparison, condition: Condition, protocol: str, look: dict[str, Look]
) -> list[Plan]:
    metric = words(comparison.metric)
    arms = [arm for arm in condition.arms if arm.score(protocol, comparison.metric)]
    ranking = next((r for r in condition.rankings if r.protocol == protocol), None)
    method = ranking.method if ranking else ""
    return [
        (
            "Differences to the baseline",
            f"{metric.capitalize()} minus that of {comparison.baseline}, paired by seed. 95 % "
            "intervals of one difference, before any correction: thin, Student t over seeds; "
            "thick, bootstrap, which few seeds make too short.",
            plots.differences(comparison, arms, protocol, look),
            True,
        ),
        (
            "Ranking and its uncertainty",
            f"Mean rank and 95 % interval; at the right how often it is the best. By {method}.",
            plots.ranks(ranking, look) if ranking and ranking.ranks else None,
            True,
        ),
        (
            "Quality against bytes",
            "Marks: after the last round, with 95 % intervals. Thin lines: the way there. Dashed: "
            "references that move nothing. Double-click to see all of it.",
            plots.tradeoff(comparison, arms, protocol, look),
            False,
        ),
        (
            f"{metric.capitalize()} by round",
            "Mean over seeds; the bands reach from the lowest seed to the highest. A click on a "
            "name hides it, a double click leaves it alone.",
            plots.curves(comparison, arms, look),
            False,
        ),
        (
            "Client by client",
            "Each point is a client on its own test rows, mean over seeds; boxes hold the middle "
            f"half. Of more than {plots.MOST_POINTS} clients only those far from the rest are "
            "drawn.",
            plots.clients(comparison, arms, look),
            False,
        ),
    ]


def _diagnostics(condition: Condition, look: dict[str, Look]) -> list[Plan]:
    return [
        (
            f"{words(key).capitalize()} by round",
            f"{note} Mean over seeds, bands from lowest to highest.",
            plots.diagnostic(condition.arms, key, look),
            True,
        )
        for key, note in tables.MAIN.items()
    ]


def _drawn(prefix: str, planned: Sequence[Plan]) -> list[Drawn]:
    return [
        Drawn(f"{prefix}-{number}", title, note, figure.to_json(), half)
        for number, (title, note, figure, half) in enumerate(planned)
        if figure is not None
    ]
