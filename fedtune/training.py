"""One client's local steps, and evaluation: the slow, obvious definition.

Every other engine is tested against this file. A client begins from its plan's tensors, takes one
AdamW step a batch on the mean of the batch's per-example losses, and ends with its trained tensors;
nothing of the optimizer outlives the round. Under record-level privacy a step's gradient is a noisy
mean instead (DP-SGD, see privacy/steps.py), and nothing else of the rows is told.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from fedtune import models, per_example
from fedtune.adapter import State, rank_axis
from fedtune.config import TrainSettings
from fedtune.lowrank import moved_most
from fedtune.models import Model
from fedtune.privacy.steps import ClippedSum, Steps
from fedtune.records import Sums, merge
from fedtune.seeds import generator, seed_of
from fedtune.strategies.strategy import Plan
from fedtune.tasks.task import Example, Scores, Task

log = logging.getLogger("fedtune")
WINDOW = 32  # batches whose rows are grouped by length together: enough to find rows alike


@dataclass(frozen=True)
class Work:
    """What one client does in one round, beside its plan.

    Attributes:
        batches: the examples of each optimizer step; a private one may be empty.
        rates: the learning rate of each step.
        seed: of the adapters' dropout.
        private: how the steps keep what they learn from private; None where nothing is promised.
    """

    batches: Sequence[Sequence[Example]]
    rates: Sequence[float]
    seed: int
    private: Steps | None = None


@dataclass(frozen=True)
class Trained:
    """What a client's round gives.

    Attributes:
        state: the plan's tensors after the last step.
        sums: the metrics of the training batches, {} for private ones.
        tokens: real tokens that were learnt from.
        computed: tokens that went through the base for it, padding among them.
    """

    state: State
    sums: Sums
    tokens: int
    computed: int


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


def train(model: Model, task: Task, plan: Plan, work: Work, settings: TrainSettings) -> Trained:
    """The plan's tensors after the work's steps, and the metrics of the training batches.

    Raises:
        FloatingPointError: a loss was not finite, or a tensor after private steps; the client's
            round is void.
    """
    if plan.keep < 1:
        require_one_pass(work)
        trial = train(model, task, replace(plan, keep=1.0), work, settings)
        done = train(model, task, chosen(plan, trial), work, settings)
        return replace(done, computed=done.computed + trial.computed)
    model.module.train()
    with (
        torch.random.fork_rng(devices=_cuda(model)),
        opened(model, plan) as live,
        models.checkpointed(model, settings.gradient_checkpointing),
    ):
        torch.manual_seed(work.seed)
        sums = _steps(model, task, plan, work, settings, live)
        state = {
            group: {name: live[name].detach().to("cpu", copy=True) for name in tensors}
            for group, tensors in plan.start.items()
        }
    if work.private:
        require_finite(state)
    lengths = [[len(example["input_ids"]) for example in batch] for batch in work.batches if batch]
    computed = sum(len(own) * max(own) for own in lengths)
    return Trained(state, merge(sums), sum(map(sum, lengths)), computed)


def require_one_pass(work: Work) -> None:
    """Refuse private work before a provisional pass, which would learn from the rows unpaid.

    Raises:
        ValueError: the work is private.
    """
    if work.private:
        raise ValueError("a plan that keeps a share of its ranks does not go with private steps")


def require_finite(state: State) -> None:
    """Refuse tensors that noisy steps have driven out of all bounds.

    Raises:
        FloatingPointError: with a tensor's name. It tells no more than the tensors themselves.
    """
    for tensors in state.values():
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise FloatingPointError(f"'{name}' is not finite after noisy steps")


def _steps(
    model: Model,
    task: Task,
    plan: Plan,
    work: Work,
    settings: TrainSettings,
    live: Mapping[str, Parameter],
) -> list[Sums]:
    """Move the live parameters; the metrics of every batch."""
    for name, parameter in live.items():
        parameter.requires_grad_(name in plan.trainable)
        parameter.grad = None
    trained = {name: live[name] for name in sorted(plan.trainable)}
    masks = {n: (plan.mask[n] != 0).to(p.device) for n, p in trained.items() if n in plan.mask}
    anchors = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.AdamW(
        list(trained.values()), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    sums: list[Sums] = []
    penalty = _penalty(plan, live)
    for step, (batch, rate) in enumerate(zip(work.batches, work.rates, strict=True)):
        optimizer.param_groups[0]["lr"] = rate
        if work.private:
            total = _clipped(model, task, batch, trained, masks, work.private, step)
            _noised(trained, work.private.noised(total, step), penalty)
        else:
            sums.append(_gradients(model, task, batch, penalty))
        _adjust(trained, anchors, plan, settings.proximal)
        _masked(trained, masks)
        if settings.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained.values(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # what is masked does not decay either
            for name, mask in masks.items():
                trained[name].copy_(torch.where(mask, trained[name], anchors[name]))
    return sums


def chosen(plan: Plan, trial: Trained) -> Plan:
    """The plan that trains what moved most in its provisional pass, see `Plan.keep`."""
    masks = moved_most(plan.start["adapter"], trial.state["adapter"], plan.keep)
    return replace(plan, mask={**plan.mask, **masks}, keep=1.0)


def _adjust(
    trained: Mapping[str, Parameter], anchors: Mapping[str, Tensor], plan: Plan, proximal: float
) -> None:
    """Add to the gradients what the plan and the proximal term add."""
    for name, parameter in trained.items():
        if parameter.grad is None:
            continue
        if proximal:
            parameter.grad.add_(parameter.detach() - anchors[name], alpha=proximal)
        if name in plan.correction:
            parameter.grad.add_(plan.correction[name].to(parameter))


def _masked(trained: Mapping[str, Parameter], masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        gradient = trained[name].grad
        if gradient is not None:
            gradient.mul_(mask)


@contextlib.contextmanager
def opened(model: Model, plan: Plan) -> Iterator[dict[str, Parameter]]:
    """The model as the plan begins: its ranks, tensors and cores, its frozen weights, its scale.

    Yields:
        The live parameters by name.
    """
    start = dict(plan.start)
    core = start.pop("core", {})
    with (
        models.ranked(model, start.get("adapter", {})),
        models.cored(model, core) as between,
        models.shifted(model, plan.base),
        models.scaled(model, plan.scale),
    ):
        models.write(model, start)
        live = {name: p for group in model.tensors.values() for name, p in group.items()}
        yield {**live, **between}


def _scores(model: Model, task: Task, batch: Sequence[Example]) -> Scores:
    on_device = {k: v.to(model.device) for k, v in task.collate(batch, model.pad).items()}
    with model.autocast():
        return task.scores(model.module, on_device)


def _gradients(
    model: Model, task: Task, batch: Sequence[Example], penalty: Callable[[], Tensor | float]
) -> Sums:
    """Leave the gradient of a batch's mean loss in the parameters; its metrics."""
    scores = _scores(model, task, batch)
    loss = scores["loss"].mean()
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the training loss became {loss.item()}")
    (loss + penalty()).backward()  # type: ignore[no-untyped-call]
    return task.sums(scores, model.labels)


def _clipped(
    model: Model,
    task: Task,
    batch: Sequence[Example],
    trained: Mapping[str, Parameter],
    masks: Mapping[str, Tensor],
    private: Steps,
    step: int,
) -> dict[str, Tensor]:
    """The sum of a batch's units, each clipped to one norm, before its noise."""
    total = ClippedSum({name: p.shape for name, p in trained.items()}, private.clip)
    for chunk in private.chunks(step, len(batch)):
        rows = _rows(model, task, batch[chunk.start : chunk.stop], trained)
        whole = {n: m.expand(trained[n].shape).flatten() for n, m in masks.items() if n in rows}
        total.add({**rows, **{n: rows[n] * mask for n, mask in whole.items()}}, chunk)
    say_left_out(total)
    return total.total


def _rows(
    model: Model, task: Task, batch: Sequence[Example], trained: Mapping[str, Parameter]
) -> dict[str, Tensor]:
    """Each row's own gradient of its own loss, (rows, parameters) by tensor."""
    with per_example.kept(model, trained, len(batch)) as rows:
        _scores(model, task, batch)["loss"].sum().backward()  # type: ignore[no-untyped-call]
    return rows.gradients


def _noised(
    trained: Mapping[str, Parameter],
    noisy: Mapping[str, Tensor],
    penalty: Callable[[], Tensor | float],
) -> None:
    """Leave a step's noisy mean in the parameters, and the gradient of the penalty on them."""
    for name, parameter in trained.items():
        parameter.grad = noisy[name].to(parameter)
    term = penalty()
    if isinstance(term, Tensor) and term.requires_grad:
        term.backward()  # type: ignore[no-untyped-call]


def say_left_out(total: ClippedSum) -> None:
    """Tell the client's own log, and nobody else, of rows that could not be learnt from."""
    if total.left_out:
        log.warning(
            "%d of this step's gradients were not finite and left out; is a row broken, or "
            "train.learning_rate too high?",
            total.left_out,
        )


def _penalty(plan: Plan, live: Mapping[str, Tensor]) -> Callable[[], Tensor | float]:
    """HetLoRA's term of the loss, see `Plan.penalty`."""

    def penalty() -> Tensor | float:
        total: Tensor | float = 0.0
        for name in plan.start.get("adapter", {}):
            if plan.penalty and rank_axis(name) == 0:
                a, b = live[name][plan.tail :], live[name.replace("lora_A", "lora_B")]
                norms = torch.linalg.vector_norm(a), torch.linalg.vector_norm(b[:, plan.tail :])
                total = total + plan.penalty * norms[0] * norms[1]
        return total

    return penalty


def _cuda(model: Model) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


def evaluate(
    model: Model, task: Task, plan: Plan, examples: Sequence[Example], batch_size: int
) -> Sums:
    """The metrics of a plan's start over `examples`, batched by length; {} for no examples."""
    model.module.eval()
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    sums = []
    with torch.no_grad(), opened(model, plan):
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
