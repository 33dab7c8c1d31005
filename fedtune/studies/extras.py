"""The tables of a whole study: what was tuned, and which cells failed."""

from fedtune.report import human_time
from fedtune.studies.comparison import Comparison, Tuning
from fedtune.studies.page_tables import NONE, Cell, Column, Row, Table, leaf, number


def tuned(comparison: Comparison) -> Table | None:
    """What was chosen for each arm on validation rows, None where nothing was tuned."""
    if not comparison.tuning:
        return None
    columns = [
        Column("arm", text=True, first="ascending"),
        Column("condition", text=True, first="ascending"),
        Column("chosen"),
        Column("validation score"),
        Column("trials"),
        Column("remark", text=True),
    ]
    rows = [Row(_tuned(tuning)) for tuning in comparison.tuning]
    keys = ", ".join(dict.fromkeys(tuning.key for tuning in comparison.tuning))
    return Table(
        f"{keys}, chosen on validation rows", _how(comparison.tuning[0]), columns, [("", rows)]
    )


def trials(comparison: Comparison) -> Table:
    """Every value that was tried."""
    columns = [
        Column("arm", text=True, first="ascending"),
        Column("condition", text=True, first="ascending"),
        Column("value"),
        Column("validation score"),
        Column("time", first="ascending"),
        Column("failed", text=True, first="ascending"),
    ]
    rows = [
        Row(
            [
                Cell(tuning.arm),
                Cell(tuning.condition or NONE),
                leaf(trial.value),
                number(trial.score, "{:.4f}"),
                Cell(human_time(trial.seconds), trial.seconds),
                Cell(trial.reason),
            ]
        )
        for tuning in comparison.tuning
        for trial in tuning.trials
    ]
    return Table("Every trial", "In the order in which they were tried.", columns, [("", rows)])


def failures(comparison: Comparison) -> Table | None:
    """Cells without a result, None where all have one."""
    if not comparison.failures:
        return None
    columns = [
        Column("arm", text=True, first="ascending"),
        Column("condition", text=True, first="ascending"),
        Column("seed", first="ascending"),
        Column("reason", text=True, first="ascending"),
    ]
    rows = [
        Row([Cell(f.arm), Cell(f.condition or NONE), Cell(str(f.seed), f.seed), Cell(f.reason)])
        for f in comparison.failures
    ]
    note = "They are missing from every mean above; nothing stands in for them."
    return Table("Failed cells", note, columns, [("", rows)])


def _how(tuning: Tuning) -> str:
    seeds = ", ".join(map(str, tuning.seeds))
    name, share = tuning.metric.replace("_", " ").capitalize(), 100 * tuning.validation_fraction
    return (
        f"{name} on {share:.0f} % of each client's training rows after {tuning.rounds} rounds, "
        f"seeds {seeds}, sampler {tuning.sampler}. No test row was seen."
    )


def _tuned(tuning: Tuning) -> list[Cell]:
    """A row of `tuned`; a choice at the edge of what was tried may not be the best there is."""
    tried = [t.value for t in tuning.trials if isinstance(t.value, int | float)]
    edge = len(tried) > 1 and tuning.chosen in (min(tried), max(tried))
    told = "at the edge of what was tried" if edge else ""
    if tuning.chosen is None:
        told = "every trial failed, so no cell ran"
    best = next((t.score for t in tuning.trials if t.value == tuning.chosen), None)
    return [
        Cell(tuning.arm),
        Cell(tuning.condition or NONE),
        leaf(tuning.chosen),
        number(best, "{:.4f}"),
        Cell(str(len(tuning.trials)), len(tuning.trials)),
        Cell(told),
    ]
