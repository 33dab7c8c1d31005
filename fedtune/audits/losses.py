"""What a model loses on single rows, and which runs have a model that all clients share."""

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from fedtune.audits import likelihoods
from fedtune.audits.audited import Audited
from fedtune.audits.finding import NotApplicableError
from fedtune.models import Model
from fedtune.tasks.task import Task


def require_common(audited: Audited) -> None:
    """Refuse a run whose one adapter nobody has trained.

    Raises:
        NotApplicableError: its clients share nothing.
    """
    strategy = audited.parts.strategy
    if not (strategy.joins or strategy.pools):
        raise NotApplicableError(
            f"strategy = '{audited.experiment.strategy}' trains no common model, so nobody outside "
            "a client has one to attack."
        )


def of_rows(model: Model, task: Task, rows: Dataset, max_length: int) -> NDArray[np.float64]:
    """Each row's loss, (rows,) in nats; that of a row in several windows is their mean.

    Raises:
        RecipeError: a row does not fit the task.
    """
    examples = task.encode(rows, model.tokenizer, model.labels, max_length)
    owners = np.array([e.get("row", [number])[0] for number, e in enumerate(examples)])
    found = likelihoods.losses(model, task, examples).numpy()
    windows = np.bincount(owners, minlength=len(rows))
    return np.bincount(owners, weights=found, minlength=len(rows)) / windows
