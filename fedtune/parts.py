"""A recipe's parts: its component texts looked up, built, and checked against each other.

This is the one place where an experiment meets every registry. Whatever has no meaning is refused
here, before a row is read or a model is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedtune.cohorts import COHORTS, Cohort
from fedtune.combine import COMBINES, Combine, Mean
from fedtune.components import build, nearest
from fedtune.config import Experiment
from fedtune.data import SOURCES
from fedtune.errors import RecipeError
from fedtune.partitions import PARTITIONS
from fedtune.privacy.aggregation import AGGREGATIONS, Aggregation
from fedtune.strategies import STRATEGIES, Strategy
from fedtune.tasks import TASKS, Task

REGISTRIES: dict[str, Mapping[str, type]] = {
    "strategy": STRATEGIES,
    "task": TASKS,
    "data.source": SOURCES,
    "data.partition": PARTITIONS,
    "cohort": COHORTS,
    "combine": COMBINES,
    "secure_aggregation": AGGREGATIONS,
}


@dataclass(frozen=True)
class Parts:
    """What an experiment's component texts stand for."""

    task: Task
    strategy: Strategy
    combine: Combine
    cohort: Cohort
    aggregation: Aggregation


def resolve(experiment: Experiment) -> Parts:
    """The experiment's parts.

    Raises:
        RecipeError: a text that names nothing, or a combination without meaning.
    """
    for key in ("data.source", "data.partition"):
        build(str(experiment.flat()[key]), REGISTRIES[key], key)
    parts = Parts(
        task=build(experiment.task, TASKS, "task"),
        strategy=build(experiment.strategy, STRATEGIES, "strategy"),
        combine=build(experiment.combine, COMBINES, "combine"),
        cohort=build(experiment.cohort, COHORTS, "cohort"),
        aggregation=build(experiment.secure_aggregation, AGGREGATIONS, "secure_aggregation"),
    )
    parts.strategy.check(experiment)
    if parts.aggregation.masks:
        _check_masked(experiment, parts)
    if experiment.adapter.ranks and not parts.strategy.mixed_ranks:
        able = ", ".join(sorted(name for name, kind in STRATEGIES.items() if kind.mixed_ranks))
        raise RecipeError(
            f"adapter.ranks = '{experiment.adapter.ranks}' gives clients adapters of different "
            f"ranks, whose factors strategy = '{experiment.strategy}' cannot join. Set it to '', "
            f"or take one of {able}."
        )
    if experiment.evaluation.samples and not parts.task.generates:
        raise RecipeError(
            f"evaluation.samples = {experiment.evaluation.samples} needs a task that generates "
            f"text, but task = '{experiment.task}'. Set it to 0, or task = 'instruction'."
        )
    if experiment.adapter.init == "orthogonal" and experiment.adapter.rank % 2:
        raise RecipeError(
            "adapter.init = 'orthogonal' needs an even adapter.rank, not "
            f"{experiment.adapter.rank}."
        )
    names = reference_names(experiment)
    for name in names:
        if names.count(name) > 1 or name == experiment.strategy:
            again = "twice" if names.count(name) > 1 else "which is the recipe's own strategy"
            raise RecipeError(f"references: it names '{name}' {again}. Name others, each once.")
        if name not in STRATEGIES:
            raise RecipeError(
                f"references: strategy '{name}' is unknown.{nearest(name, STRATEGIES)} "
                f"Known: {', '.join(sorted(STRATEGIES))}."
            )
        resolve(reference(experiment, name))
    return parts


def _check_masked(experiment: Experiment, parts: Parts) -> None:
    """Refuse what needs more than the sum of updates."""
    masked = f"secure_aggregation = '{experiment.secure_aggregation}' shows the sum of updates only"
    if not parts.strategy.sums_only or parts.strategy.pools:
        able = ", ".join(
            sorted(name for name, kind in STRATEGIES.items() if kind.sums_only and not kind.pools)
        )
        raise RecipeError(
            f"{masked}, but strategy = '{experiment.strategy}' needs each client's. Set it to "
            f"'none', or take one of {able}."
        )
    if not isinstance(parts.combine, Mean):
        raise RecipeError(
            f"{masked}, but combine = '{experiment.combine}' compares clients. Set combine = "
            "'mean', or secure_aggregation = 'none'."
        )


def reference_names(experiment: Experiment) -> list[str]:
    """The strategies that run beside the recipe's own, [] for none."""
    if experiment.references == "none":
        return []
    return [name.strip() for name in experiment.references.split(",") if name.strip()]


def reference(experiment: Experiment, name: str) -> Experiment:
    """The same experiment with another strategy and everybody in every round.

    Its run folder lies inside the experiment's own: `references/<name>`. Where it pools the rows
    there is one client, however many the recipe needs.
    """
    if name in STRATEGIES and STRATEGIES[name].pools:
        experiment = experiment.replace(
            coordinator__minimum_clients=1,
            coordinator__minimum_replies=1,
            secure_aggregation="none",
        )
    return experiment.replace(
        strategy=name,
        references="none",
        cohort="all",
        output=str(folder_of(experiment) / "references"),
        name=name,
        evaluation__samples=0,
    )


def folder_of(experiment: Experiment) -> Path:
    """Where a run writes everything it writes."""
    return Path(experiment.output, experiment.name)
