"""What a model loses on single rows, as tuned and as it was before."""

import contextlib

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

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


def untuned(model: Model) -> contextlib.AbstractContextManager[None]:
    """The model without what the run taught it; a head that began at random begins so again."""
    without: contextlib.AbstractContextManager[None] = model.module.disable_adapter()
    return without


def of_rows(
    model: Model, task: Task, rows: Dataset, max_length: int, batch_size: int
) -> NDArray[np.float64]:
    """Each row's loss, (rows,) in nats; that of a row in several windows is their mean.

    Raises:
        RecipeError: a row does not fit the task.
    """
    examples = task.encode(rows, model.tokenizer, model.labels, max_length)
    owners = np.array([e.get("row", [number])[0] for number, e in enumerate(examples)])
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    found = np.zeros(len(examples))
    model.module.eval()
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = task.collate([examples[i] for i in chosen], model.pad)
            with model.autocast():
                scores = task.scores(
                    model.module, {k: v.to(model.device) for k, v in batch.items()}
                )
            found[chosen] = scores["loss"].double().cpu().numpy()
    windows = np.bincount(owners, minlength=len(rows))
    return np.bincount(owners, weights=found, minlength=len(rows)) / windows
