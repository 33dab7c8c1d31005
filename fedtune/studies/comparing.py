"""Run a study and put its comparison together.

The grid is run cell by cell, after the settings of each arm were tuned where the study asks for
that. Cells that fail are told and left out; all else is compared.
"""

from collections.abc import Sequence
from dataclasses import replace

from filelock import FileLock, Timeout

from fedtune import launch
from fedtune.config import Leaf
from fedtune.errors import FedTuneError, RecipeError, RunError
from fedtune.report import LOWER_IS_BETTER
from fedtune.studies import audits, evidence, scores, tuning
from fedtune.studies.cells import Runner, View
from fedtune.studies.comparison import (
    GLOBAL,
    PROTOCOLS,
    UNTUNED,
    Arm,
    Comparison,
    Condition,
    Failure,
    Score,
    Tuning,
)
from fedtune.studies.evidence import Evidence
from fedtune.studies.identity import code
from fedtune.studies.study import Cell, Study

Arms = dict[str, Evidence]


def compare(study: Study, view: View, workers: int = 0) -> Comparison:
    """Run every cell that is not finished, then compare.

    Args:
        study: what to compare.
        view: is told what happens.
        workers: cells at a time, 0 for as many as there are cores or GPUs. It changes no result.

    Raises:
        RecipeError: the study's folder is used by another process or for something else.
        RunError: no strategy has a finished cell.
    """
    _claim(study)
    count = launch.processes_for(study.base, workers, threads=1)
    gpus = launch.gpus_for(study.base)
    try:
        with FileLock(study.folder / ".lock", timeout=3.0):
            with Runner(view, count, gpus if count > 1 else ()) as runner:
                tuned = _tuned(study, runner, view)
                chosen = {(t.condition, t.arm): t.chosen for t in tuned if t.chosen is not None}
                cells = study.cells(chosen)
                view.title = "cells"
                view.labels = {cell.experiment.name: _label(cell) for cell in reversed(cells)}
                lost = {(t.condition, t.arm): _why(t) for t in tuned if t.chosen is None}
                ready = [cell for cell in cells if (cell.condition, cell.arm) not in lost]
                failed = runner.run((cell.experiment for cell in ready), study.audits)
            reasons = {
                (c.condition, c.arm, c.seed): lost.get((c.condition, c.arm))
                or failed.get(c.experiment.name, "")
                for c in cells
            }
            return compared(study, cells, reasons, tuned)
    except Timeout as error:
        raise RecipeError(f"{study.folder} is in use by another process.") from error


def compared(
    study: Study,
    cells: Sequence[Cell],
    reasons: dict[tuple[str, str, int], str],
    tuned: Sequence[Tuning] = (),
) -> Comparison:
    """The comparison of cells that have run.

    Args:
        study: they belong to.
        cells: the whole grid.
        reasons: (condition, arm, seed) -> why the cell failed, "" if it did not.
        tuned: how settings were chosen.

    Raises:
        RunError: no strategy has a finished cell.
    """
    metrics = study.metrics()
    shown, failures, seconds = {}, [], {}
    for name, _ in study.conditions():
        own = [cell for cell in cells if cell.condition == name]
        shown[name], lost = _gathered(own, reasons)
        failures += lost
    for arms in shown.values():
        for arm in arms.values():
            for run in arm.runs.values():
                seconds[run.folder] = sum(record.seconds for record in run.records)
    if not any(arm.role == "strategy" for arms in shown.values() for arm in arms.values()):
        first = failures[0].reason if failures else "the study has no cells"
        raise RunError(f"No strategy has a finished cell. {first}")
    made = [
        _condition(study, name, changes, shown[name], metrics, tuned)
        for name, changes in study.conditions()
    ]
    return Comparison(
        study=study.name,
        question=study.question,
        metric=metrics[0],
        direction="lower" if metrics[0] in LOWER_IS_BETTER else "higher",
        metrics=[m for m in metrics if any(s.metric == m for c in made for s in _scores(c))],
        baseline=study.baseline,
        seeds=list(study.seeds),
        target=study.target,
        conditions=_corrected(made),
        tuning=list(tuned),
        failures=failures,
        cells=len({cell.experiment.name for cell in cells}),
        seconds=sum(seconds.values()),
        notes=_notes(study, shown),
        recipe=study.text(),
        code=code(),
    )


def _claim(study: Study) -> None:
    """Make the study's folder, or refuse one that holds something else."""
    folder = study.folder
    if (folder / "experiment.toml").exists():
        raise RecipeError(f"{folder} holds a run. Give the study another name (name=second).")
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        (folder / "study.toml").write_text(study.text(), encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{folder} cannot be written to: {error}.") from error


def _tuned(study: Study, runner: Runner, view: View) -> list[Tuning]:
    if study.tune is None:
        return []
    view.title = f"tuning {study.tune.key}"
    return tuning.tune(study, runner)


def _why(tuned: Tuning) -> str:
    return f"every trial of {tuned.key} failed: {tuned.trials[0].reason}"


def _label(cell: Cell) -> str:
    return ", ".join(filter(None, [cell.arm, f"seed {cell.seed}", cell.condition]))


def _gathered(
    cells: Sequence[Cell], reasons: dict[tuple[str, str, int], str]
) -> tuple[Arms, list[Failure]]:
    """The evidence of a condition's arms, the untuned model first, and what failed."""
    arms: Arms = {}
    failures = []
    for cell in sorted(cells, key=lambda cell: cell.seed):
        try:
            if reason := reasons[cell.condition, cell.arm, cell.seed]:
                raise RunError(reason)
            run = evidence.read(cell.experiment)
        except FedTuneError as error:
            failures.append(Failure(cell.condition, cell.arm, cell.seed, str(error)))
            continue
        if cell.arm not in arms:
            kind = evidence.kind_of(cell.experiment)
            arms[cell.arm] = Evidence(cell.arm, cell.role, kind, {})
        arms[cell.arm].runs[cell.seed] = run
    before = evidence.untuned(arms)
    places = {cell.arm: place for place, cell in reversed(list(enumerate(cells)))}
    ordered = {name: arms[name] for name in sorted(arms, key=places.__getitem__)}
    return ({UNTUNED: before} if before else {}) | ordered, failures


def _condition(
    study: Study,
    name: str,
    changes: dict[str, Leaf],
    arms: Arms,
    metrics: Sequence[str],
    tuned: Sequence[Tuning],
) -> Condition:
    settings: dict[str, dict[str, Leaf]] = {
        t.arm: {t.key: t.chosen} for t in tuned if t.condition == name and t.chosen is not None
    }
    rankings = [
        scores.ranking(
            [
                arm
                for arm in arms.values()
                if arm.role == "strategy" and evidence.has(arm, protocol, study.baseline)
            ],
            protocol,
            metrics[0],
        )
        for protocol in PROTOCOLS
    ]
    return Condition(
        name=name,
        changes=changes,
        arms=[_arm(study, arm, arms, metrics, settings.get(arm.name, {})) for arm in arms.values()],
        rankings=[ranking for ranking in rankings if ranking],
    )


def _arm(
    study: Study, arm: Evidence, arms: Arms, metrics: Sequence[str], settings: dict[str, Leaf]
) -> Arm:
    baseline = arms.get(study.baseline)
    found = []
    for protocol in PROTOCOLS:
        if evidence.has(arm, protocol, study.baseline):
            stands = baseline and evidence.has(baseline, protocol, study.baseline)
            against = baseline if stands else None
            found += [scores.score(arm, protocol, m, against) for m in metrics if arm.measures(m)]
    curves = [scores.curve(arm, seed, metrics) for seed in arm.runs]
    return Arm(
        name=arm.name,
        role=arm.role,
        kind=arm.kind,
        scores=found,
        cost=scores.cost(arm, curves, metrics[0], study.target),
        clients=scores.clients_of(arm),
        curves=curves,
        aggregation=scores.aggregation(curves),
        settings=settings,
        audits=audits.of(arm, study.audits),
    )


def _scores(condition: Condition) -> list[Score]:
    return [score for arm in condition.arms for score in arm.scores]


def _corrected(conditions: list[Condition]) -> list[Condition]:
    """The conditions with Holm's correction over all of them, by protocol and metric."""
    places: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    for i, condition in enumerate(conditions):
        for j, arm in enumerate(condition.arms):
            for k, score in enumerate(arm.scores):
                places.setdefault((score.protocol, score.metric), []).append((i, j, k))
    fresh: dict[tuple[int, int, int], Score] = {}
    for found in places.values():
        told = [(conditions[i].arms[j].role, conditions[i].arms[j].scores[k]) for i, j, k in found]
        fresh |= dict(zip(found, scores.corrected(told), strict=True))
    return [
        replace(
            condition,
            arms=[
                replace(arm, scores=[fresh[i, j, k] for k in range(len(arm.scores))])
                for j, arm in enumerate(condition.arms)
            ],
        )
        for i, condition in enumerate(conditions)
    ]


def _notes(study: Study, shown: dict[str, Arms]) -> list[str]:
    """How the numbers were made."""
    seeds = len(study.seeds)
    notes = [
        f"{protocol.capitalize()} protocol: {what}. The two are never mixed."
        if protocol == GLOBAL
        else f"{protocol.capitalize()} protocol: {what}; one-model arms stand there as yardsticks."
        for protocol, what in PROTOCOLS.items()
    ]
    notes += [
        "Arms of one seed share shards, initial adapter (but for methods that define their own), "
        "cohorts and batches, so differences are paired by seed; local_only and centralized take "
        "part in every round, and references have neither attack nor server optimizer.",
        "Intervals are 95 %: Student's t over seeds, of a mean and of a paired difference. The "
        "percentile bootstrap beside it, 2,000 draws of seeds and of the clients in them, is too "
        "narrow with few seeds; the t interval is not, if seeds are normal.",
        "p is of the two-sided paired t test over seeds; Holm's correction is over the strategies "
        "of one protocol and metric in the whole study. The sign-flip permutation test (exact up "
        "to 16 seeds) is "
        f"given beside it: with {seeds} seed{'s' if seeds > 1 else ''} it cannot be below "
        f"{max(2.0 ** (1 - seeds), 2.0**-16):.3g}.",
        "Worst client and spread (standard deviation across clients) are of each client's own test "
        "rows, mean over seeds; clients with few test rows make both noisy.",
        "Bytes are of all arrays as serialised for training, catch-up included; seconds are wall "
        "clock of a cell with one process, while others ran beside it.",
    ]
    if study.audits:
        notes.append(audits.NOTE)
    rejected = sum(
        len(record.rejected)
        for arms in shown.values()
        for arm in arms.values()
        if arm.name != UNTUNED
        for run in arm.runs.values()
        for record in run.records
    )
    if rejected:
        notes.append(f"{rejected} replies of clients were set aside; the cells' reports say why.")
    return notes
