"""A whole cohort's local steps at once on one resident base: the same computation as training.py.

The frozen base multiplies the rows of all clients together. Each adapter and head is stacked to
(clients, ...) and applied to its own client's rows by batched products. All trained tensors of all
clients lie in one (clients, parameters) tensor, as do their gradients and AdamW's moments, so that
clipping and a step are a few operations. Clients are sorted by their number of steps: those that
have finished drop off the end, and no row of theirs is computed again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedtune import models, training
from fedtune.adapter import Adapter, State
from fedtune.config import TrainSettings
from fedtune.models import Model
from fedtune.records import Sums, merge
from fedtune.strategies.strategy import Plan
from fedtune.tasks.task import Example, Scores, Task
from fedtune.training import Work

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch's AdamW
Job = tuple[Plan, Work]
Outcome = tuple[State, Sums] | FloatingPointError


def obstacle(model: Model, settings: TrainSettings, jobs: Sequence[Job]) -> str:
    """Why a cohort cannot be trained at once, "" where it can."""
    lora = model.module.peft_config["default"]
    if lora.lora_dropout:
        return "adapter.dropout draws in the order of one client's own modules"
    if lora.use_dora:
        return "adapter.dora needs the norm of each client's merged weights"
    if settings.gradient_checkpointing:
        return "train.gradient_checkpointing"
    if set(_places(model)) != {name for group in model.tensors.values() for name in group}:
        return "the model's head has parts that are not linear"
    shapes = [_shapes(plan.start) for plan, _ in jobs]
    if any(shape != shapes[0] for shape in shapes):
        return "the clients' tensors have different shapes"
    return ""


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for group in state.values() for name, t in group.items()}


@dataclass
class _Place:
    """Where a tensor is used: a LoRA factor of a layer, or weight or bias of a linear head."""

    module: nn.Module
    role: str


def _places(model: Model) -> dict[str, _Place]:
    """Every trained tensor's name and its place, as far as they can be stacked."""
    places = {}
    for path, part in models.lora_layers(model):
        places[f"{path}.lora_A.weight"] = _Place(part, "A")
        places[f"{path}.lora_B.weight"] = _Place(part, "B")
    live = {id(p): name for name, p in model.tensors.get("head", {}).items()}
    for part in model.module.modules():
        if isinstance(part, nn.Linear):
            for role, parameter in part.named_parameters(recurse=False):
                if id(parameter) in live:
                    places[live[id(parameter)]] = _Place(part, role)
    return places


class _Stack:
    """The tensors of all clients in one (clients, parameters) tensor, and views of it.

    Args:
        plans: of the clients, all with the same names and shapes.
        model: says where the tensors live and in which dtype.
    """

    def __init__(self, plans: Sequence[Plan], model: Model) -> None:
        first = {name: t for group in plans[0].start.values() for name, t in group.items()}
        self.groups = {group: list(tensors) for group, tensors in plans[0].start.items()}
        self.shapes = {name: tensor.shape for name, tensor in first.items()}
        bounds, end = {}, 0
        for name, tensor in first.items():
            bounds[name] = (end, end := end + tensor.numel())
        self.bounds = bounds
        live = {name: p for tensors in model.tensors.values() for name, p in tensors.items()}
        dtype = live[next(iter(first))].dtype
        rows = []
        for plan in plans:
            named = {name: t for group in plan.start.values() for name, t in group.items()}
            rows.append(torch.cat([named[name].reshape(-1).to(dtype) for name in first]))
        self.flat = torch.stack(rows).to(model.device)
        self.grad = torch.zeros_like(self.flat)
        self.mask = torch.zeros_like(self.flat, dtype=torch.bool)
        for number, plan in enumerate(plans):
            for name in plan.trainable:
                self.mask[number, slice(*bounds[name])] = True
        self.trained = {name for plan in plans for name in plan.trainable}

    def leaves(self, count: int) -> dict[str, Tensor]:
        """Stacked tensors of the first `count` clients, views of `flat`."""
        leaves = {}
        for name, bounds in self.bounds.items():
            shape = (count, *self.shapes[name])
            leaf = self.flat[:count, slice(*bounds)].view(shape).detach()
            leaves[name] = leaf.requires_grad_(name in self.trained)
        return leaves

    def gather(self, leaves: dict[str, Tensor]) -> None:
        """Move the leaves' gradients into `grad`; what had none gets zeros."""
        for name, leaf in leaves.items():
            place = self.grad[: len(leaf), slice(*self.bounds[name])]
            if leaf.grad is None:
                place.zero_()
            else:
                place.copy_(leaf.grad.reshape(len(leaf), -1))
                leaf.grad = None

    def state(self, client: int) -> State:
        """One client's tensors, on the CPU."""
        row = self.flat[client].to("cpu", copy=True)
        cut: Adapter = {
            name: row[slice(*bounds)].view(self.shapes[name]).clone()
            for name, bounds in self.bounds.items()
        }
        return {group: {name: cut[name] for name in names} for group, names in self.groups.items()}


@contextmanager
def _stacked(places: dict[str, _Place], leaves: dict[str, Tensor]) -> Iterator[None]:
    """Let every adapted layer and head use its client's own tensors on its client's own rows."""
    used: dict[nn.Module, dict[str, Tensor]] = {}
    for name, leaf in leaves.items():
        used.setdefault(places[name].module, {})[places[name].role] = leaf
    for part, tensors in used.items():
        forward = _lora if "A" in tensors else _linear
        part.forward = _bound(forward, part, tensors)
    try:
        yield
    finally:
        for part in used:
            del part.forward


def _bound(forward, part: nn.Module, tensors: dict[str, Tensor]):  # type: ignore[no-untyped-def]
    return lambda x, *args, **kwargs: forward(part, tensors, x)


def _by_client(x: Tensor, clients: int) -> Tensor:
    """(rows, ..., features) as (clients, rows of a client, features)."""
    return x.reshape(clients, -1, x.shape[-1])


def _lora(part: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """W x + s B (A x), with each client's A and B on its own rows."""
    a, b = tensors["A"], tensors["B"]
    result: Tensor = part.base_layer(x)  # type: ignore[operator]
    own = _by_client(x.to(a.dtype), len(a))
    update = torch.bmm(torch.bmm(own, a.transpose(1, 2)), b.transpose(1, 2))
    scaling = part.scaling["default"]  # type: ignore[index]
    return result + (update * scaling).view(result.shape).to(result.dtype)


def _linear(part: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """Each client's own linear layer on its own rows."""
    weight = tensors["weight"]
    result = torch.bmm(_by_client(x.to(weight.dtype), len(weight)), weight.transpose(1, 2))
    if "bias" in tensors:
        result = result + tensors["bias"].unsqueeze(1)
    return result.view(*x.shape[:-1], weight.shape[1])


def train(model: Model, task: Task, jobs: Sequence[Job], settings: TrainSettings) -> list[Outcome]:
    """What `training.train` gives for each job, computed together.

    Where `obstacle` names a reason, the jobs run one after another.

    Returns:
        For each job its tensors and metrics, or the error that voided its round.
    """
    if not jobs or obstacle(model, settings, jobs):
        return [_alone(model, task, job, settings) for job in jobs]
    order = sorted(range(len(jobs)), key=lambda i: -len(jobs[i][1].batches))
    sorted_outcomes = _together(model, task, [jobs[i] for i in order], settings)
    outcomes = dict(zip(order, sorted_outcomes, strict=True))
    return [outcomes[i] for i in range(len(jobs))]


def _alone(model: Model, task: Task, job: Job, settings: TrainSettings) -> Outcome:
    try:
        return training.train(model, task, *job, settings)
    except FloatingPointError as error:
        return error


def _together(
    model: Model, task: Task, jobs: Sequence[Job], settings: TrainSettings
) -> list[Outcome]:
    places, stack = _places(model), _Stack([plan for plan, _ in jobs], model)
    anchor = stack.flat.clone()
    moments = torch.zeros_like(stack.flat), torch.zeros_like(stack.flat)
    model.module.train()
    sums: list[list[Sums]] = [[] for _ in jobs]
    failures: dict[int, FloatingPointError] = {}
    leaves: dict[str, Tensor] = {}
    active = 0
    for step in range(len(jobs[0][1].batches)):
        count = sum(len(work.batches) > step for _, work in jobs)
        if count != active:
            active, leaves = count, stack.leaves(count)
        batches = [work.batches[step] for _, work in jobs[:count]]
        with _stacked(places, leaves):
            scores = _scores(model, task, batches)
            losses = _means(scores["loss"], batches)
            for number, loss in enumerate(losses.tolist()):
                if not torch.isfinite(torch.tensor(loss)):
                    failure = FloatingPointError(f"the training loss became {loss}")
                    failures.setdefault(number, failure)
            losses.sum().backward()  # type: ignore[no-untyped-call]
        stack.gather(leaves)
        for number, own in enumerate(_split(scores, batches)):
            sums[number].append(task.sums(own, model.labels))
        rates = torch.tensor([work.rates[step] for _, work in jobs[:count]], dtype=torch.float64)
        _step(stack, anchor, moments, rates.unsqueeze(1).to(stack.flat), step + 1, settings)
    return [
        failures[number] if number in failures else (stack.state(number), merge(sums[number]))
        for number in range(len(jobs))
    ]


def _scores(model: Model, task: Task, batches: Sequence[Sequence[Example]]) -> Scores:
    """The rows of all batches in one; short batches are filled up to the longest."""
    size = max(len(batch) for batch in batches)
    rows = [example for b in batches for example in [*b, *[b[0]] * (size - len(b))]]
    batch = {k: v.to(model.device) for k, v in task.collate(rows, model.pad).items()}
    with model.autocast():
        return task.scores(model.module, batch)


def _means(losses: Tensor, batches: Sequence[Sequence[Example]]) -> Tensor:
    """Each client's mean over its own rows, (clients,); filling rows weigh nothing."""
    table = losses.view(len(batches), -1)
    sizes = torch.tensor([len(batch) for batch in batches], device=losses.device)
    own = torch.arange(table.shape[1], device=losses.device) < sizes.unsqueeze(1)
    return torch.where(own, table, 0.0).sum(1) / sizes


def _split(scores: Scores, batches: Sequence[Sequence[Example]]) -> Iterator[Scores]:
    """Each client's own rows of the scores, without the filling ones."""
    size = max(len(batch) for batch in batches)
    on_cpu = {name: values.detach().cpu() for name, values in scores.items()}
    for number, batch in enumerate(batches):
        begin = number * size
        yield {name: values[begin : begin + len(batch)] for name, values in on_cpu.items()}


def _step(
    stack: _Stack,
    anchor: Tensor,
    moments: tuple[Tensor, Tensor],
    rates: Tensor,
    step: int,
    settings: TrainSettings,
) -> None:
    """One AdamW step of the first clients, as many as there are rates.

    Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2, with torch's epsilon.
    """
    count = len(rates)
    parameters, mask = stack.flat[:count], stack.mask[:count]
    gradients = stack.grad[:count].masked_fill_(~mask, 0.0)
    first, second = moments[0][:count], moments[1][:count]
    if settings.proximal:
        gradients += settings.proximal * (parameters - anchor[:count]) * mask
    if settings.max_grad_norm:
        norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
        gradients *= (settings.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
    beta1, beta2 = BETAS
    if settings.weight_decay:
        parameters -= parameters * (rates * settings.weight_decay) * mask
    first.lerp_(gradients, 1 - beta1)
    second.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    spread = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(EPSILON)
    parameters -= (rates / (1 - beta1**step)) * first / spread
