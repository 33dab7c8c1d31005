"""One client's local steps, and evaluation: the slow, obvious definition.

Every other engine is tested against this file. A client begins from its plan's tensors, takes one
AdamW step a batch on the mean of the batch's per-example losses, and ends with its trained tensors;
nothing of the optimizer outlives the round.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedtune import models
from fedtune.adapter import State
from fedtune.config import TrainSettings
from fedtune.models import Model
from fedtune.records import Sums, merge
from fedtune.seeds import generator, seed_of
from fedtune.strategies.strategy import Plan
from fedtune.tasks.task import Example, Task

WINDOW = 32  # batches whose rows are grouped by length together: enough to find rows alike


@dataclass(frozen=True)
class Work:
    """What one client does in one round, beside its plan.

    Attributes:
        batches: the examples of each optimizer step.
        rates: the learning rate of each step.
        seed: of the adapters' dropout.
    """

    batches: Sequence[Sequence[Example]]
    rates: Sequence[float]
    seed: int


def batches_of(
    examples: Sequence[Example], settings: TrainSettings, *seed: int | str
) -> list[list[Example]]:
    """The batches of one round: the examples shuffled once an epoch, one batch short at most.

    With `train.steps` above 0 there are exactly so many batches, however many epochs they take.
    With `train.group_by_length` the rows of a batch have similar lengths, and the batches come in
    random order.
    """
    if not examples:
        return []
    draws = generator(*seed)
    per_epoch = math.ceil(len(examples) / settings.batch_size)
    wanted = settings.steps or per_epoch * settings.epochs
    batches: list[list[Example]] = []
    while len(batches) < wanted:
        order = torch.randperm(len(examples), generator=draws).tolist()
        if settings.group_by_length:
            window = WINDOW * settings.batch_size
            order = [
                row
                for start in range(0, len(order), window)
                for row in sorted(
                    order[start : start + window], key=lambda i: len(examples[i]["input_ids"])
                )
            ]
        epoch = [
            [examples[i] for i in order[start : start + settings.batch_size]]
            for start in range(0, len(order), settings.batch_size)
        ]
        if settings.group_by_length:
            epoch = [epoch[i] for i in torch.randperm(len(epoch), generator=draws).tolist()]
        batches += epoch
    return batches[:wanted]


def rates_of(steps: int, round: int, rounds: int, settings: TrainSettings) -> list[float]:
    """The learning rate of each step of `round`; a schedule runs over all rounds of the run.

    linear: eta (1 - t); cosine: eta (1 + cos(pi t)) / 2, with t from 0 at the first step of round 1
    to 1 after the last step of the last round.
    """
    rates = []
    for step in range(steps):
        t = (round - 1 + step / steps) / rounds
        factor = {
            "constant": 1.0,
            "linear": 1.0 - t,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * t)),
        }[settings.schedule]
        rates.append(settings.learning_rate * factor)
    return rates


def train(
    model: Model, task: Task, plan: Plan, work: Work, settings: TrainSettings
) -> tuple[State, Sums]:
    """The plan's tensors after the work's steps, and the metrics of the training batches.

    Raises:
        FloatingPointError: a loss was not finite; the client's round is void.
    """
    models.write(model, plan.start)
    live = {name: p for group in model.tensors.values() for name, p in group.items()}
    for name, parameter in live.items():
        parameter.requires_grad_(name in plan.trainable)
        parameter.grad = None
    trained = [live[name] for name in sorted(plan.trainable)]
    anchors = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(
        trained, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    if settings.gradient_checkpointing:
        model.module.get_base_model().config.use_cache = False
        model.module.activation_checkpointing_enable({"use_reentrant": False})
    model.module.train()
    sums: list[Sums] = []
    with torch.random.fork_rng(devices=_cuda(model)):
        torch.manual_seed(work.seed)
        for batch, rate in zip(work.batches, work.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            on_device = {k: v.to(model.device) for k, v in task.collate(batch, model.pad).items()}
            with model.autocast():
                scores = task.scores(model.module, on_device)
            loss = scores["loss"].mean()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the training loss became {loss.item()}")
            loss.backward()  # type: ignore[no-untyped-call]
            if settings.proximal:
                for parameter, anchor in zip(trained, anchors, strict=True):
                    if parameter.grad is not None:
                        parameter.grad.add_(parameter.detach() - anchor, alpha=settings.proximal)
            if settings.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            sums.append(task.sums(scores, model.labels))
    return models.read(model), merge(sums)


def _cuda(model: Model) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


def evaluate(
    model: Model, task: Task, state: State, examples: Sequence[Example], batch_size: int
) -> Sums:
    """The metrics of `state` over `examples`, batched by length; {} for no examples."""
    models.write(model, state)
    model.module.eval()
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    sums = []
    with torch.no_grad():
        for start in range(0, len(ordered), batch_size):
            batch = task.collate(ordered[start : start + batch_size], model.pad)
            with model.autocast():
                scores = task.scores(
                    model.module, {k: v.to(model.device) for k, v in batch.items()}
                )
            sums.append(task.sums(scores, model.labels))
    return merge(sums)


def dropout_seed(*parts: int | str) -> int:
    """The seed of a client's dropout in one round."""
    return seed_of(*parts, "dropout")
