"""The tables of one condition: quality under each protocol, cost, aggregation."""

from collections.abc import Iterable, Sequence

from fedtune.audits.finding import BROKEN
from fedtune.report import human_bytes, human_time
from fedtune.studies.comparison import Arm, Audit, Comparison, Condition, Interval, Score
from fedtune.studies.page_tables import (
    ABSENT,
    Cell,
    Column,
    Row,
    Table,
    averaged,
    brackets,
    fixed,
    number,
    p_value,
    signed,
)
from fedtune.studies.verdict import BETTER, WORSE, reading

MAIN = {
    "relative_error": "Distance of the aggregate from the weighted mean of the clients' products, "
    "over that mean's norm. An exact method has rounding error only.",
    "effective_rank": "How many directions the mean of the clients' products really uses.",
    "drift": "How far clients are from their mean, over how far the mean has moved.",
    "update_cosine": "Whether clients pull in the same direction (1) or against each other (-1).",
}


def quality(comparison: Comparison, condition: Condition, protocol: str) -> Table | None:
    """The deciding metric of every arm under one protocol, None where no strategy has it."""
    metric = comparison.metric
    scored = [(arm, s) for arm in condition.arms if (s := arm.score(protocol, metric))]
    if not any(arm.role == "strategy" for arm, _ in scored):
        return None
    scored.sort(key=lambda pair: pair[1].mean, reverse=comparison.direction == "higher")
    rows = {id(arm): _quality(comparison, arm, score) for arm, score in scored}
    return Table(
        f"{metric.replace('_', ' ').capitalize()} by arm",
        f"{comparison.direction.capitalize()} is better. References do not compete.",
        _quality_columns(comparison, [score for _, score in scored]),
        _grouped([arm for arm, _ in scored], rows, comparison.baseline),
    )


def _quality_columns(comparison: Comparison, scores: Sequence[Score]) -> list[Column]:
    first = "descending" if comparison.direction == "higher" else "ascending"
    gaps = [score.difference for score in scores if score.difference]
    mean, paired = _method(s.interval for s in scores), _method(gap.interval for gap in gaps)
    name = comparison.metric.replace("_", " ")
    return [
        Column("arm", text=True, first="ascending"),
        Column(f"{name} [95 %]", f"mean over seeds; {mean}", first=first, now=first),
        Column(f"minus {comparison.baseline} [95 %]", f"paired by seed; {paired}", first=first),
        Column("bootstrap", _method(gap.bootstrap for gap in gaps), first=first),
        Column("p (Holm)", "paired t test, corrected by Holm over its family", first="ascending"),
        Column(
            "reading", "better or worse only where p (Holm) < 0.05", text=True, first="ascending"
        ),
        Column("worst client", "its value, mean over seeds", first=first),
        Column("spread", "standard deviation across clients", first="ascending"),
    ]


def others(comparison: Comparison, condition: Condition, protocol: str) -> Table | None:
    """The metrics that do not decide, None without any."""
    metrics = [m for m in comparison.metrics if m != comparison.metric]
    arms = [arm for arm in condition.arms if any(arm.score(protocol, m) for m in metrics)]
    if not arms:
        return None
    rows = {
        id(arm): [Cell(arm.name), *(_mean(arm.score(protocol, metric)) for metric in metrics)]
        for arm in arms
    }
    columns = [Column("arm", text=True, first="ascending")]
    columns += [Column(m.replace("_", " ")) for m in metrics]
    note = "Mean over seeds and 95 % interval. These did not decide anything."
    return Table("Other metrics", note, columns, _grouped(arms, rows, comparison.baseline))


def costs(comparison: Comparison, condition: Condition) -> Table:
    """Bytes and time of every arm, and what the target took."""
    columns = [
        Column("arm", text=True, first="ascending"),
        Column("rounds", "trained"),
        Column("bytes up", "of all clients and rounds, as serialised", first="ascending"),
        Column("bytes down", "the same, catch-up included", first="ascending"),
        Column("time", "wall clock of a cell, evaluation included", first="ascending"),
    ]
    note = "Mean over seeds. Other cells ran on the machine at the same time, so time is rough."
    if comparison.target is not None:
        named = f"{comparison.metric.replace('_', ' ')} {comparison.target:g}"
        columns += [
            Column(f"{what} to target", f"until {named}", first="ascending")
            for what in ("rounds", "bytes", "time")
        ]
        note += f" The target is {named}; the mean is of the seeds that reached it."
    rows = {id(arm): _costs(arm, comparison.target is not None) for arm in condition.arms}
    return Table(
        "What it costs", note, columns, _grouped(condition.arms, rows, comparison.baseline)
    )


def aggregation(comparison: Comparison, condition: Condition, *, main: bool) -> Table | None:
    """The main diagnostics of the aggregation or all others, None where no arm has any."""
    keys = [key for key in diagnostics(condition) if (key in MAIN) == main]
    arms = [arm for arm in condition.arms if any(key in arm.aggregation for key in keys)]
    if not arms:
        return None
    columns = [Column("arm", text=True, first="ascending")]
    columns += [Column(key.replace("_", " "), MAIN.get(key, ""), first="ascending") for key in keys]
    rows = {
        id(arm): [Cell(arm.name), *(number(arm.aggregation.get(key), "{:.3g}") for key in keys)]
        for arm in arms
    }
    title = "Aggregation" if main else "More about the aggregation"
    groups = _grouped(arms, rows, comparison.baseline)
    return Table(title, "Mean over rounds and seeds.", columns, groups)


def audits(condition: Condition) -> Table | None:
    """What audits of each arm's cells measured, None where none were asked for."""
    if not any(arm.audits for arm in condition.arms):
        return None
    columns = [
        Column("arm", text=True, first="ascending"),
        Column("audit", text=True, first="ascending"),
        Column("measure", text=True, first="ascending"),
        Column("value [95 %]", "mean over seeds"),
        Column("allowed", "the most that the run's ledger allows, mean over seeds"),
        Column("verdicts", "of how many cells", text=True, first="ascending"),
    ]
    groups = [
        (
            title,
            [
                Row(_audit(arm, audit))
                for arm in condition.arms
                if arm.role == role
                for audit in arm.audits
            ],
        )
        for title, role in (("Strategies", "strategy"), ("References", "reference"))
    ]
    note = "Attacks on every cell; an attack that finds nothing proves nothing."
    return Table("Audits", note, columns, [group for group in groups if group[1]])


def _audit(arm: Arm, audit: Audit) -> list[Cell]:
    verdicts = ", ".join(f"{name} {count}" for name, count in audit.verdicts.items())
    value = ABSENT
    if audit.mean is not None:
        value = Cell(fixed(audit.mean), audit.mean, brackets(audit.interval, fixed))
    return [
        Cell(arm.name),
        Cell(audit.audit),
        Cell(audit.measure or audit.reason),
        value,
        number(audit.allowed, "{:.3f}"),
        Cell(verdicts, mark="worse" if audit.verdicts.get(BROKEN) else ""),
    ]


def diagnostics(condition: Condition) -> list[str]:
    """Names of what was measured of the aggregation, the main ones first."""
    found = dict.fromkeys(key for arm in condition.arms for key in arm.aggregation)
    return [key for key in MAIN if key in found] + [key for key in found if key not in MAIN]


def _grouped(
    arms: Sequence[Arm], rows: dict[int, list[Cell]], baseline: str
) -> list[tuple[str, list[Row]]]:
    """Strategies, then references, set apart."""

    def of(role: str) -> list[Row]:
        return [
            Row(rows[id(arm)], "baseline" if arm.name == baseline else f"{role}s")
            for arm in arms
            if arm.role == role
        ]

    groups = [("Strategies", of("strategy")), ("References", of("reference"))]
    return [(title, found) for title, found in groups if found]


def _settings(arm: Arm) -> str:
    return ", ".join(f"{key} = {value}" for key, value in arm.settings.items())


def _quality(comparison: Comparison, arm: Arm, score: Score) -> list[Cell]:
    name = Cell(arm.name, small=_settings(arm))
    missing = len(comparison.seeds) - len(score.seeds)
    mean = _mean(
        score, f" ({len(score.seeds)} of {len(comparison.seeds)} seeds)" if missing else ""
    )
    ends = [number(score.worst, "{:.3f}"), number(score.spread, "{:.3f}")]
    difference = score.difference
    if difference is None:
        told = "baseline" if arm.name == comparison.baseline else "no seed in common"
        return [name, mean, ABSENT, ABSENT, ABSENT, Cell(told), *ends]
    gap = Cell(signed(difference.mean), difference.mean, brackets(difference.interval, signed))
    drawn, boot = ABSENT, difference.bootstrap
    if boot:
        drawn = Cell("", (boot.low + boot.high) / 2, brackets(boot, signed))
    if arm.role == "reference":
        return [name, mean, gap, drawn, ABSENT, ABSENT, *ends]
    word = reading(score, comparison.direction)
    sign = {BETTER: "▲ ", WORSE: "▼ "}.get(word, "")
    mark = word if word in (BETTER, WORSE) else ""
    read = Cell(sign + word, mark=mark)
    return [name, mean, gap, drawn, p_value(difference.p_holm), read, *ends]


def _method(intervals: Iterable[Interval | None]) -> str:
    """How the first interval there is was made."""
    return next((interval.method for interval in intervals if interval), "no interval")


def _mean(score: Score | None, more: str = "") -> Cell:
    if score is None:
        return ABSENT
    return Cell(fixed(score.mean), score.mean, brackets(score.interval, fixed) + more)


def _costs(arm: Arm, target: bool) -> list[Cell]:
    cost = arm.cost
    cells = [
        Cell(arm.name),
        averaged(cost.rounds, "{:.4g}".format),
        averaged(cost.bytes_up or [], human_bytes),
        averaged(cost.bytes_down or [], human_bytes),
        averaged(cost.seconds, human_time),
    ]
    if target:
        cells += [
            averaged(cost.rounds_to_target, "{:.3g}".format),
            averaged(cost.bytes_to_target if cost.bytes_up else [], human_bytes),
            averaged(cost.seconds_to_target, human_time),
        ]
    return cells
