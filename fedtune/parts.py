"""A recipe's parts: its component texts looked up, built, and checked against each other.

This is the one place where an experiment meets every registry. Whatever has no meaning is refused
here, before a row is read or a model is loaded.
"""

from collections.abc import Mapping
from pathlib import Path

from fedtune import composition
from fedtune.attacks import ATTACKS
from fedtune.cohorts import COHORTS
from fedtune.combine import COMBINES
from fedtune.components import build, nearest
from fedtune.composition import Parts
from fedtune.config import Experiment
from fedtune.data import SOURCES
from fedtune.errors import RecipeError
from fedtune.optimizers import OPTIMIZERS
from fedtune.partitions import PARTITIONS
from fedtune.privacy.secure import AGGREGATIONS
from fedtune.strategies import STRATEGIES
from fedtune.tasks import TASKS

__all__ = ["REGISTRIES", "Parts", "folder_of", "reference", "reference_names", "resolve"]

REGISTRIES: dict[str, Mapping[str, type]] = {
    "strategy": STRATEGIES,
    "task": TASKS,
    "data.source": SOURCES,
    "data.partition": PARTITIONS,
    "cohort": COHORTS,
    "combine": COMBINES,
    "server_optimizer": OPTIMIZERS,
    "attack": ATTACKS,
    "secure_aggregation": AGGREGATIONS,
}


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
        server_optimizer=build(experiment.server_optimizer, OPTIMIZERS, "server_optimizer"),
        attack=build(experiment.attack, ATTACKS, "attack"),
        cohort=build(experiment.cohort, COHORTS, "cohort"),
        secure=build(experiment.secure_aggregation, AGGREGATIONS, "secure_aggregation"),
    )
    composition.check(experiment, parts)
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


def reference_names(experiment: Experiment) -> list[str]:
    """The strategies that run beside the recipe's own, [] for none."""
    if experiment.references == "none":
        return []
    return [name.strip() for name in experiment.references.split(",") if name.strip()]


def reference(experiment: Experiment, name: str) -> Experiment:
    """The same experiment with another strategy and everybody in every round.

    Its run folder lies inside the experiment's own: `references/<name>`. Where it pools the rows
    there is one client, however many the recipe needs; where nothing is joined, nothing is there
    to attack or to defend.
    """
    if name in STRATEGIES and not STRATEGIES[name].joins:
        experiment = experiment.replace(combine="mean", server_optimizer="none", attack="none")
    if name in STRATEGIES and STRATEGIES[name].pools:
        experiment = experiment.replace(
            coordinator__minimum_clients=1,
            coordinator__minimum_replies=1,
            secure_aggregation="none",
        )
    # A reference that joins nothing has every client at work; one that joins has the recipe's own
    # cohorts, so that it differs in how it joins alone.
    apart = name in STRATEGIES and not STRATEGIES[name].joins
    # What a reference shows is that it has no noise; the ledger says that it is not covered.
    return experiment.replace(
        privacy__mode="none",
        privacy__unit="",
        privacy__clip_quantile=0.0,
        strategy=name,
        references="none",
        cohort="all" if apart else experiment.cohort,
        output=str(folder_of(experiment) / "references"),
        name=name,
        evaluation__samples=0,
    )


def folder_of(experiment: Experiment) -> Path:
    """Where a run writes everything it writes."""
    return Path(experiment.output, experiment.name)
