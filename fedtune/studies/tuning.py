"""Choose a setting for each arm in each condition, on validation rows: test rows are not looked at.

A trial is a set of cells as any others, so none is run twice and all arms' trials share the
machine. Listed values are all tried. A range is searched by Optuna's tree-structured Parzen
estimator (Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization"), seeded, one trial
of each arm after another, so that the same budget gives the same trials.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedtune import report
from fedtune.config import Experiment, Leaf
from fedtune.errors import FedTuneError, RecipeError
from fedtune.studies import evidence
from fedtune.studies.cells import Runner
from fedtune.studies.comparison import Trial, Tuning
from fedtune.studies.study import Study, Tune


@dataclass
class Search:
    """The trials of one arm in one condition.

    Attributes:
        condition: its name.
        changes: its varied keys.
        arm: its name.
        role: "strategy" or "reference".
        sampler: Optuna's study, None for listed values.
        asked: Optuna's trials that are not yet told.
        trials: so far.
    """

    condition: str
    changes: dict[str, Leaf]
    arm: str
    role: str
    sampler: Any = None
    asked: list[Any] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)

    def ask(self, tune: Tune) -> list[Leaf]:
        """The values to try next, [] at the end of the budget."""
        if self.sampler is None:
            return [] if self.trials else list(tune.values)
        if len(self.trials) == tune.trials:
            return []
        self.asked = [self.sampler.ask()]
        return [self.asked[0].suggest_float(tune.key, tune.low, tune.high, log=True)]

    def tell(self, trial: Trial) -> None:
        """What a trial gave."""
        self.trials.append(trial)
        for asked in self.asked:
            failed = None if trial.score is not None else _states().FAIL
            self.sampler.tell(asked, trial.score, state=failed)
        self.asked = []

    def best(self, higher: bool) -> Trial | None:
        """The best trial, the first of equal ones; None where all failed."""
        scored = [(t.score, -n) for n, t in enumerate(self.trials) if t.score is not None]
        if not scored:
            return None
        _, place = max(scored if higher else [(-score, n) for score, n in scored])
        return self.trials[-place]


def tune(study: Study, runner: Runner) -> list[Tuning]:
    """One for each arm and condition.

    Raises:
        RecipeError: a range is to be searched and Optuna is not installed.
    """
    settings = study.tune
    assert settings is not None
    metric = study.metrics()[0]
    higher = metric not in report.LOWER_IS_BETTER
    searches = searches_of(study, settings, higher)
    while asked := [(search, value) for search in searches for value in search.ask(settings)]:
        cells = [cells_of(study, settings, search, value) for search, value in asked]
        failed = runner.run(itertools.chain(*cells))
        for (search, value), trial in zip(asked, cells, strict=True):
            search.tell(_trial(value, trial, metric, failed))
    return [
        Tuning(
            condition=search.condition,
            arm=search.arm,
            key=settings.key,
            chosen=best.value if (best := search.best(higher)) else None,
            metric=metric,
            sampler="grid" if search.sampler is None else "tpe",
            rounds=settings.rounds or study.base.rounds,
            seeds=list(settings.seeds or study.seeds[:1]),
            validation_fraction=settings.validation_fraction,
            trials=search.trials,
        )
        for search in searches
    ]


def searches_of(study: Study, settings: Tune, higher: bool) -> list[Search]:
    """An empty search for each arm in each condition."""
    searches = []
    for (condition, changes), (arm, role) in itertools.product(study.conditions(), study.arms):
        sampler = None if settings.values else _sampler(settings, higher)
        searches.append(Search(condition, changes, arm, role, sampler))
    return searches


def cells_of(study: Study, settings: Tune, search: Search, value: Leaf) -> list[Experiment]:
    """The cells of one trial, one a seed; evaluated at the end only."""
    rounds = settings.rounds or study.base.rounds
    changes: dict[str, Leaf] = {
        **search.changes,
        settings.key: value,
        "rounds": rounds,
        "evaluation.every": rounds,
        "data.validation_fraction": settings.validation_fraction,
    }
    seeds = settings.seeds or study.seeds[:1]
    return [study.experiment(changes, search.arm, search.role, seed) for seed in seeds]


def _trial(value: Leaf, cells: Sequence[Experiment], metric: str, failed: dict[str, str]) -> Trial:
    seconds, found = 0.0, []
    for cell in cells:
        try:
            if cell.name in failed:
                return Trial(value, None, seconds, failed[cell.name])
            run = evidence.read(cell)
        except FedTuneError as error:
            return Trial(value, None, seconds, str(error))
        seconds += sum(record.seconds for record in run.records)
        found.append(report.summarise(report.pooled(run.records[-1]))[metric])
    return Trial(value, sum(found) / len(found), seconds)


def _sampler(settings: Tune, higher: bool) -> Any:
    try:
        import optuna
    except ImportError as error:
        raise RecipeError(
            "study.tune: a range is searched by Optuna, which is not installed. "
            "pip install 'fedtune[sweep]', or list values = [...]."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # By its default the first ten trials are random, which most budgets here do not exceed.
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=max(2, settings.trials // 3))
    return optuna.create_study(direction="maximize" if higher else "minimize", sampler=sampler)


def _states() -> Any:
    from optuna.trial import TrialState

    return TrialState
