"""A study: a recipe with [vary], whose keys are recipe keys with lists of values.

Its grid is cut into cells, each one strategy with one seed, so an ordinary experiment. Cells of one
seed differ in what is varied alone: shards, initial adapter, cohorts and batches are drawn from
seeds that no strategy is part of, so every difference between two arms is a paired one. A cell's
key is the hash of what decides its result, the recipe and the sources; two places of the grid with
one key are one cell.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune import parts, report
from fedtune.components import nearest
from fedtune.config import FREE, Experiment, Leaf, PrivacySettings, flatten
from fedtune.errors import RecipeError
from fedtune.strategies import STRATEGIES
from fedtune.studies.identity import key_of

EPSILON = "privacy.epsilon"
# Keys that mean something beside a promise only.
UNPROMISED: dict[str, Leaf] = {
    "privacy.mode": "none",
    "privacy.unit": "",
    "privacy.unit_rows": 0,
    "privacy.clip_quantile": 0.0,
}


@dataclass(frozen=True)
class Tune:
    """How a setting is chosen for each arm in each condition, on validation rows.

    Attributes:
        key: of the recipe.
        values: to choose from, () for a range.
        low: of a range, which is searched on a logarithmic scale.
        high: of the range.
        trials: the budget of a range, for each arm in each condition.
        rounds: of a trial, 0 for the recipe's own.
        seeds: of a trial, () for the study's first.
        validation_fraction: of each shard's training rows.
    """

    key: str = "train.learning_rate"
    values: tuple[Leaf, ...] = ()
    low: float = 0.0
    high: float = 0.0
    trials: int = 0
    rounds: int = 0
    seeds: tuple[int, ...] = ()
    validation_fraction: float = 0.2


@dataclass(frozen=True)
class Cell:
    """A place of the grid.

    Attributes:
        condition: its name.
        arm: a strategy's text.
        role: "strategy" or "reference".
        seed: of the experiment.
        experiment: what runs; its name is the cell's key.
    """

    condition: str
    arm: str
    role: str
    seed: int
    experiment: Experiment


@dataclass(frozen=True)
class Study:
    """What is compared with what.

    Attributes:
        base: the recipe without what is varied.
        strategies: that are compared.
        seeds: of every arm.
        axes: other varied keys -> their values.
        question: that the study answers.
        baseline: the arm that others are compared with.
        references: arms beside the strategies.
        metric: that decides, "" for the task's first.
        target: of the metric, None without.
        tune: None where nothing is tuned.
        audits: of every finished cell, by their names.
    """

    base: Experiment
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    axes: dict[str, tuple[Leaf, ...]] = field(default_factory=dict)
    question: str = ""
    baseline: str = ""
    references: tuple[str, ...] = ()
    metric: str = ""
    target: float | None = None
    tune: Tune | None = None
    audits: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the study's folder."""
        return self.base.name

    @property
    def folder(self) -> Path:
        """Where everything of it lies."""
        return parts.folder_of(self.base)

    @property
    def arms(self) -> tuple[tuple[str, str], ...]:
        """(name, role) of each: references first."""
        named = [(name, "reference") for name in self.references]
        return (*named, *((name, "strategy") for name in self.strategies))

    def conditions(self) -> list[tuple[str, dict[str, Leaf]]]:
        """Name and changed keys of each; one without either where nothing else is varied."""
        changes = [
            dict(zip(self.axes, values, strict=True))
            for values in itertools.product(*self.axes.values())
        ]
        return [self._condition(each) for each in changes]

    def _condition(self, changes: dict[str, Leaf]) -> tuple[str, dict[str, Leaf]]:
        """Its name and all that it changes: an epsilon of 0 without noise is no promise at all."""
        shown = dict(changes)
        if changes.get(EPSILON) == 0 and not {**self.base.flat(), **changes}["privacy.noise"]:
            shown[EPSILON] = "none"
            changes = changes | UNPROMISED
        return ", ".join(f"{key}={value}" for key, value in shown.items()), changes

    def metrics(self) -> tuple[str, ...]:
        """What the task measures, the deciding one first."""
        counts: dict[str, int] = {}
        for _, changes in self.conditions():
            found = parts.resolve(Experiment.from_flat({**self.base.flat(), **changes}))
            counts |= found.task.metrics(("a", "b")) | found.attack.metrics
        sums = {name: [1.0] * count for name, count in counts.items()}
        shown = [*report.metrics_of(sums), *report.summarise(sums)]
        first = self.metric or shown[0]
        if first not in shown:
            raise RecipeError(
                f"study.metric = '{first}' is not measured.{nearest(first, shown)} "
                f"Measured: {', '.join(dict.fromkeys(shown))}."
            )
        return tuple(dict.fromkeys([first, *shown]))

    def cells(self, chosen: Mapping[tuple[str, str], Leaf] | None = None) -> list[Cell]:
        """The whole grid, seed by seed within each condition.

        Args:
            chosen: (condition, arm) -> value of the tuned key.
        """
        cells = []
        for condition, changes in self.conditions():
            for seed, (arm, role) in itertools.product(self.seeds, self.arms):
                settings = dict(changes)
                if self.tune and chosen and (condition, arm) in chosen:
                    settings[self.tune.key] = chosen[condition, arm]
                experiment = self.experiment(settings, arm, role, seed)
                cells.append(Cell(condition, arm, role, seed, experiment))
        return cells

    def experiment(
        self, settings: Mapping[str, Leaf], arm: str, role: str, seed: int
    ) -> Experiment:
        """One cell's experiment, named by its key.

        How updates are joined, and what is promised, is no part of a reference: one is shared by
        all combiners and every epsilon.
        """
        flat = {**self.base.flat(), **settings, "seed": seed}
        experiment = Experiment.from_flat(flat if role == "reference" else flat | {"strategy": arm})
        if role == "reference":
            experiment = parts.reference(
                experiment.replace(combine="mean", server_optimizer="none"), arm
            )
            unpromised = flatten({"privacy": dataclasses.asdict(PrivacySettings())})
            experiment = Experiment.from_flat({**experiment.flat(), **unpromised})
        return experiment.replace(name=key_of(experiment), output=str(self.folder / "cells"))

    def check(self) -> None:
        """Refuse what could only fail later.

        Raises:
            RecipeError: an arm or a combination of keys has no meaning.
        """
        names = [name for name, _ in self.arms]
        for name in self.references:
            if name not in STRATEGIES:
                raise RecipeError(
                    f"study.references: strategy '{name}' is unknown."
                    f"{nearest(name, STRATEGIES)} Known: {', '.join(sorted(STRATEGIES))}."
                )
        if self.baseline not in names:
            raise RecipeError(
                f"study.baseline = '{self.baseline}' is no arm of the study."
                f"{nearest(self.baseline, names)} Arms: {', '.join(names)}."
            )
        if self.tune:
            _check_tune(self.tune, self.axes)
        for cell in self.cells():
            try:
                parts.resolve(cell.experiment)
            except RecipeError as error:
                where = f"{cell.arm}{', ' if cell.condition else ''}{cell.condition}"
                raise RecipeError(f"{where}: {error}") from error
        self.metrics()

    def text(self) -> str:
        """The study as TOML, every key written out."""
        vary = {"strategy": self.strategies, "seed": self.seeds, **self.axes}
        told: dict[str, Any] = {
            "question": self.question,
            "baseline": self.baseline,
            "references": self.references,
            "metric": self.metrics()[0],
        }
        if self.audits:
            told["audits"] = ",".join(self.audits)
        if self.target is not None:
            told["target"] = self.target
        lines = [self.base.text(), "[vary]", *_lines(vary), "", "[study]", *_lines(told)]
        if self.tune:
            lines += ["", "[study.tune]", *_lines(vars(self.tune))]
        return "\n".join(lines) + "\n"


def _lines(table: Mapping[str, Any]) -> list[str]:
    return [f"{_quoted(k)} = {json.dumps(v, ensure_ascii=False)}" for k, v in table.items()]


def _quoted(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _check_tune(tune: Tune, axes: Mapping[str, object]) -> None:
    known = Experiment().flat()
    if tune.key not in known or tune.key in (*FREE, "seed", "strategy", "rounds"):
        raise RecipeError(
            f"study.tune.key = '{tune.key}' is no key that can be tuned.{nearest(tune.key, known)}"
        )
    if tune.key in axes:
        raise RecipeError(
            f"study.tune.key = '{tune.key}' is varied too. Leave it out of [vary], or do not tune."
        )
    ranged = tune.low or tune.high or tune.trials
    if bool(tune.values) == bool(ranged):
        raise RecipeError(
            "study.tune needs either values = [...], all of which are tried, or a range: low, high "
            "and trials."
        )
    if ranged and not (0 < tune.low < tune.high and tune.trials > 0):
        raise RecipeError("study.tune: a range needs 0 < low < high, and trials, its budget.")
    if tune.rounds < 0 or not 0 < tune.validation_fraction < 1:
        raise RecipeError(
            "study.tune: rounds must be at least 0, validation_fraction between 0 and 1."
        )
    for value in tune.values or (tune.low, tune.high):
        Experiment.from_flat({tune.key: value})
