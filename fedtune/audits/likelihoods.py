"""How a tuned model and its base take each row: the statistics of membership inference.

A row that a model was tuned on has a smaller loss; how small it would have been anyway, the base
model tells. All statistics are larger for members, and none looks at other rows.

loss        -l_tuned
loss ratio  -l_tuned / l_base
gain        log-odds of the label under the tuned model less those under the untuned one
            (Carlini et al. 2022, https://arxiv.org/abs/2112.03570, equation 4, for the odds)
min-k%++    mean of the lowest 20 % of (log p_t - mu_t) / sigma_t, mean and deviation being those of
            log p over the vocabulary (Zhang et al. 2024, https://arxiv.org/abs/2404.02936)
EZ          P / (P + N) over tokens that the tuned model gets wrong: P is the sum of what rose of
            d_t = log p_tuned - log p_base, N of what fell (2026, https://arxiv.org/abs/2601.12104,
            whose P / N has no value where nothing fell, in the surest members)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune import models
from fedtune.audits.ranking import Scores
from fedtune.models import Model
from fedtune.resident import Base
from fedtune.tasks.causal_lm import IGNORED
from fedtune.tasks.task import Batch, Example, Task

LOGITS = 2**24  # that exist at once
BATCH = 64
LOWEST = 0.2  # of a row's tokens
SMALL = 1e-12


def losses(model: Model, task: Task, examples: Sequence[Example]) -> Tensor:
    """Each example's loss under the model as it is, float64, in their order."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    found = torch.empty(len(examples), dtype=torch.float64)
    base = Base.of(model, task, None)
    model.module.eval()
    with torch.no_grad(), base.opened():
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            scores = base.scores([examples[i] for i in chosen])
            found[chosen] = scores["loss"].double().cpu()
    return found


def of_classes(model: Model, task: Task, examples: Sequence[Example]) -> dict[str, Scores]:
    """The statistics of rows with a label: two forward passes each. The first decides."""
    tuned = losses(model, task, examples)
    with models.untuned(model):
        base = losses(model, task, examples)
    found = {
        "loss ratio": -tuned / base.clamp(min=SMALL),
        "log-odds gained": odds(tuned) - odds(base),
        "loss": -tuned,
    }
    return {name: values.numpy() for name, values in found.items()}


def odds(loss: Tensor) -> Tensor:
    """Log-odds log(p / (1 - p)) of a label with loss -log p."""
    loss = loss.clamp(min=SMALL)
    return -loss - torch.log(-torch.expm1(-loss))


@dataclass(frozen=True)
class Tokens:
    """What the models make of the learnt tokens of some rows, one entry a token.

    Attributes:
        row: whose.
        tuned: log p of the token under the tuned model.
        base: the same under the base.
        wrong: whether another token is the tuned model's first choice.
        z: (log p - mu) / sigma under the tuned model.
    """

    row: NDArray[np.int64]
    tuned: Scores
    base: Scores
    wrong: NDArray[np.bool_]
    z: Scores


def of_tokens(tokens: Tokens, rows: int) -> dict[str, Scores]:
    """The statistics of rows of text. The first decides."""
    tuned = -np.bincount(tokens.row, tokens.tuned, rows)
    base = -np.bincount(tokens.row, tokens.base, rows)
    counts = np.maximum(1, np.bincount(tokens.row, minlength=rows))
    return {
        "EZ": ez(tokens, rows),
        "loss ratio": -tuned / np.maximum(base, SMALL),
        "min-k%++": min_k(tokens, rows),
        "loss": -tuned / counts,
    }


def ez(tokens: Tokens, rows: int) -> Scores:
    """P / (P + N) of each row; 1 for a row without a wrong token, which is known by heart."""
    change = np.where(tokens.wrong, tokens.tuned - tokens.base, 0.0)
    rose = np.bincount(tokens.row, np.maximum(change, 0.0), rows)
    moved = np.bincount(tokens.row, np.abs(change), rows)
    return np.where(moved > 0, rose / np.where(moved > 0, moved, 1.0), 1.0)


def min_k(tokens: Tokens, rows: int) -> Scores:
    """The mean of the lowest values of z of each row, at least one."""
    found = np.zeros(rows)
    order = np.lexsort((tokens.z, tokens.row))
    bounds = np.searchsorted(tokens.row[order], np.arange(rows + 1))
    for row in range(rows):
        own = tokens.z[order[bounds[row] : bounds[row + 1]]]
        if len(own):
            found[row] = own[: max(1, round(LOWEST * len(own)))].mean()
    return found


def tokens_of(model: Model, task: Task, examples: Sequence[Example], rows: Sequence[int]) -> Tokens:
    """Two forward passes over each example; `rows` says which row it is a part of."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    parts: list[Tokens] = []
    model.module.eval()
    while order:
        count = _fitting(model, [len(examples[i]["input_ids"]) for i in order[:BATCH]])
        chosen, order = order[:count], order[count:]
        batch = task.collate([examples[i] for i in chosen], model.pad)
        on_device = {name: values.to(model.device) for name, values in batch.items()}
        parts.append(_batch(model, on_device, np.array([rows[i] for i in chosen])))
    return Tokens(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0]))
    )


def _fitting(model: Model, lengths: Sequence[int]) -> int:
    """How many of some rows, of ascending length, have few enough logits; at least one."""
    vocabulary = model.module.get_base_model().config.vocab_size
    fits = [n for n, longest in enumerate(lengths, 1) if n * longest * vocabulary <= LOGITS]
    return max(fits, default=1)


def _batch(model: Model, batch: Batch, rows: NDArray[np.int64]) -> Tokens:
    place, position = (batch["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
    targets = batch["labels"][place, position + 1].unsqueeze(1)

    def log_p() -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits: Tensor = model.module(**inputs).logits[place, position]
        return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)

    with torch.no_grad(), model.autocast():
        whole = log_p()
        tuned, p = whole.gather(1, targets).squeeze(1), whole.exp()
        mean = (p * whole).sum(1)
        deviation = ((p * whole.square()).sum(1) - mean.square()).clamp(min=SMALL).sqrt()
        wrong = whole.argmax(1) != targets.squeeze(1)
        with models.untuned(model):
            base = log_p().gather(1, targets).squeeze(1)
    return Tokens(
        rows[place.cpu().numpy()],
        tuned.double().cpu().numpy(),
        base.double().cpu().numpy(),
        wrong.cpu().numpy(),
        ((tuned - mean) / deviation).double().cpu().numpy(),
    )
