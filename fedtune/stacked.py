"""Every client's own tensors on its own rows: adapters and heads of a cohort over one frozen base.

All tensors of all clients are views of one (clients, parameters) tensor, as their gradients are, so
that clipping, AdamW and the mean are a few operations. `applied` lets the base's adapted layers and
heads use them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedtune import cores, models
from fedtune.adapter import Adapter, State, fitted
from fedtune.models import Model
from fedtune.privacy.steps import ClippedSum
from fedtune.products import Layout, own_product
from fedtune.seeds import seed_of
from fedtune.strategies.strategy import Plan


@dataclass
class Place:
    """Where a tensor is used: a LoRA factor of a layer, or weight or bias of a linear head.

    Attributes:
        module: the layer or the head.
        role: "A", "B", "blocks" or "scales" of its core, "weight" or "bias".
        number: of the layer among the adapted ones.
    """

    module: nn.Module
    role: str
    number: int = 0


def places(model: Model) -> dict[str, Place]:
    """Names and places: of cores, and of what the model trains as far as it can be stacked."""
    found = {}
    for number, (path, part) in enumerate(models.lora_layers(model)):
        found[f"{path}.lora_A.weight"] = Place(part, "A", number)
        found[f"{path}.lora_B.weight"] = Place(part, "B", number)
        found[path + cores.BLOCKS] = Place(part, "blocks", number)
        found[path + cores.SCALES] = Place(part, "scales", number)
    live = {id(p): name for name, p in model.tensors.get("head", {}).items()}
    for part in model.module.modules():
        if isinstance(part, nn.Linear):
            for role, parameter in part.named_parameters(recurse=False):
                if id(parameter) in live:
                    found[live[id(parameter)]] = Place(part, role)
    return found


@dataclass
class Stack:
    """The tensors of all clients in one (clients, parameters) tensor, and views of it.

    A client of lower rank has zeros in the ranks that it lacks; they stay zero, as their gradients
    are.

    Attributes:
        flat: the parameters; `grad` their gradients, `mask` which of them each client trains.
        scales: of each client's adapter beside the model's own scaling.
    """

    plans: Sequence[Plan]
    model: Model
    flat: Tensor = field(init=False)
    grad: Tensor = field(init=False)
    mask: Tensor = field(init=False)
    scales: list[float] = field(init=False)

    def __post_init__(self) -> None:
        """Lay every plan's start into its row."""
        live = {name: p for tensors in self.model.tensors.values() for name, p in tensors.items()}
        starts = [
            {name: t for group in plan.start.values() for name, t in group.items()}
            for plan in self.plans
        ]
        self.names = list(starts[0])
        # Clients differ in ranks at most, so that the largest of each length holds them all.
        self.shapes = {
            name: torch.Size(map(max, zip(*(start[name].shape for start in starts), strict=True)))
            for name in self.names
        }
        self.bounds, end = {}, 0
        for name in self.names:
            self.bounds[name] = (end, end := end + self.shapes[name].numel())
        dtype, device = next(iter(live.values())).dtype, self.model.device
        self.flat = torch.stack([self.row(plan.start) for plan in self.plans]).to(device, dtype)
        self.grad = torch.zeros_like(self.flat)
        self.mask = torch.zeros_like(self.flat, dtype=torch.bool)
        for number, plan in enumerate(self.plans):
            for name in plan.trainable:
                place = self.mask[number, slice(*self.bounds[name])]
                place.fill_(True)
                if name in plan.mask:
                    own = plan.mask[name].expand(starts[number][name].shape)
                    place.copy_(fitted(name, own, self.shapes[name]).reshape(-1) != 0)
        self.trained = {name for plan in self.plans for name in plan.trainable}
        self.scales = [plan.scale for plan in self.plans]

    def row(self, state: State) -> Tensor:
        """A state's tensors as one row; what it lacks is zero."""
        named = {name: t for group in state.values() for name, t in group.items()}
        return torch.cat(
            [
                fitted(name, named[name], self.shapes[name]).reshape(-1)
                if name in named
                else torch.zeros(self.shapes[name].numel())
                for name in self.names
            ]
        )

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

    def add(self, leaves: dict[str, Tensor]) -> None:
        """Add the leaves' gradients to `grad`."""
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                place = self.grad[: len(leaf), slice(*self.bounds[name])]
                place += leaf.grad.reshape(len(leaf), -1)
                leaf.grad = None

    def clipped_sum(self, client: int, clip: float) -> ClippedSum:
        """An empty sum over the tensors that a client trains, in their order in every engine."""
        names = sorted(self.plans[client].trainable)
        return ClippedSum({name: self.shapes[name] for name in names}, clip)

    def rows(self, client: int, layout: Layout) -> dict[str, Tensor]:
        """Each row's own gradient of what a client trains, (rows, parameters) by tensor."""
        assert layout.examples is not None
        plan = self.plans[client]
        begin = sum(layout.rows[:client])
        own: dict[str, Tensor] = {}
        for name, gradients in layout.examples.items():
            cut = gradients[begin : begin + layout.rows[client]]
            own |= {n: g.flatten(1) for n, g in self._of_leaves(client, name, cut)}
        for name in own.keys() & plan.mask.keys():
            own[name] = own[name] * self.mask[client, slice(*self.bounds[name])]
        return {name: own[name] for name in sorted(own.keys() & plan.trainable)}

    def cropped(self, client: int, tensors: Adapter) -> Adapter:
        """A client's tensors in the shapes of its plan."""
        start = {n: t for group in self.plans[client].start.values() for n, t in group.items()}
        return {name: fitted(name, t, start[name].shape) for name, t in tensors.items()}

    def lay(self, client: int, gradients: Adapter) -> None:
        """Put a client's gradients into its row of `grad`, what it lacks as zeros."""
        self.grad[client] = self.row({"": gradients}).to(self.grad)

    def _of_leaves(self, client: int, name: str, gradients: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A tensor's rows of gradients, a core's as those of its blocks and scales."""
        if name in self.bounds:
            yield name, gradients
            return
        leaves = [name + cores.BLOCKS, name + cores.SCALES]
        values = [self._tensor(client, leaf) if leaf in self.bounds else None for leaf in leaves]
        rank = math.isqrt(gradients.shape[1])
        parts = cores.gradients(gradients.view(-1, rank, rank), *values)
        yield from (
            (leaf, part) for leaf, part in zip(leaves, parts, strict=True) if part is not None
        )

    def _tensor(self, client: int, name: str) -> Tensor:
        return self.flat[client, slice(*self.bounds[name])].view(self.shapes[name])

    def state(self, client: int) -> State:
        """One client's tensors, on the CPU, in the shapes of its plan."""
        row = self.flat[client].to("cpu", copy=True)
        cut: Adapter = {
            name: row[slice(*bounds)].view(self.shapes[name])
            for name, bounds in self.bounds.items()
        }
        return {
            group: {n: fitted(n, cut[n], t.shape).clone() for n, t in tensors.items()}
            for group, tensors in self.plans[client].start.items()
        }


@contextmanager
def applied(
    found: dict[str, Place],
    leaves: dict[str, Tensor],
    scales: Sequence[float],
    layout: Layout,
) -> Iterator[None]:
    """Let every adapted layer and head use its client's own tensors on its client's own rows."""
    used: dict[nn.Module, dict[str, tuple[str, Tensor]]] = {}
    for name, leaf in leaves.items():
        used.setdefault(found[name].module, {})[found[name].role] = (name, leaf)
    for part, tensors in used.items():
        number = found[next(iter(tensors.values()))[0]].number
        part.forward = _bound(part, tensors, scales, layout, number)
    try:
        yield
    finally:
        for part in used:
            del part.forward


def _bound(
    part: nn.Module,
    tensors: dict[str, tuple[str, Tensor]],
    scales: Sequence[float],
    layout: Layout,
    number: int,
) -> Callable[..., Tensor]:
    if "A" in tensors:
        return lambda x, *_, **__: _lora(part, tensors, scales, layout, number, x)
    return lambda x, *_, **__: _linear(tensors, layout, x)


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that torch would multiply in: autocast's, else the weights'."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _lora(
    part: Any,
    tensors: dict[str, tuple[str, Tensor]],
    scales: Sequence[float],
    layout: Layout,
    number: int,
    x: Tensor,
) -> Tensor:
    """W x + s B (A x), with each client's A and B on its own rows."""
    (name_a, a), (name_b, b) = tensors["A"], tensors["B"]
    rows = x.reshape(-1, x.shape[-1])
    result: Tensor = part.base_layer(rows)
    dtype = _compute_dtype(x, a)
    own = rows.to(dtype)
    p = getattr(part.lora_dropout["default"], "p", 0.0)
    if p and part.training:
        own = own * _kept(own, layout, p, number)
    inner = own_product(own, a.to(dtype), layout, name_a)
    core = [tensors[role][1] if role in tensors else None for role in ("blocks", "scales")]
    if any(part is not None for part in core):
        between = cores.between(core[0], core[1], a.shape[1]).to(dtype)
        inner = own_product(inner, between, layout, name_a.removesuffix(".lora_A.weight"))
    scaling = [scale * part.scaling["default"] for scale in scales[: len(a)]]
    if min(scaling) == max(scaling):
        inner = inner * scaling[0]
    else:
        sizes, _ = layout.sizes(x)
        factors = torch.tensor(scaling, dtype=dtype, device=x.device)
        inner = inner * factors.repeat_interleave(torch.tensor(sizes, device=x.device))[:, None]
    if result.dtype == dtype and not result._is_view():  # a view cannot be added to in place
        result = own_product(inner, b.to(dtype), layout, name_b, onto=result)
    else:
        result = result + own_product(inner, b.to(dtype), layout, name_b).to(result.dtype)
    return result.view(*x.shape[:-1], result.shape[-1])


def _kept(x: Tensor, layout: Layout, p: float, number: int) -> Tensor:
    """The factors of dropout: 0 with probability p, else 1 / (1 - p).

    Each client draws from its own stream, keyed by its step and layer: who is trained beside it
    does not matter, and what is computed twice (gradient checkpointing) is drawn alike.
    """
    sizes, _ = layout.sizes(x)
    draws, parts = torch.Generator(x.device), []
    for seed, size in zip(layout.seeds, sizes, strict=False):
        draws.manual_seed(seed_of(seed, layout.step, number))
        kept = torch.empty(size, x.shape[1], dtype=x.dtype, device=x.device)
        parts.append(kept.bernoulli_(1 - p, generator=draws))
    return torch.cat(parts).div_(1 - p)


def _linear(tensors: dict[str, tuple[str, Tensor]], layout: Layout, x: Tensor) -> Tensor:
    """Each client's own linear layer on its own rows; its bias is one more column."""
    name, weight = tensors["weight"]
    names: tuple[str, ...] = (name,)
    rows = x.reshape(-1, x.shape[-1])
    dtype = _compute_dtype(x, weight)
    rows = rows.to(dtype)
    if "bias" in tensors:
        bias_name, bias = tensors["bias"]
        weight = torch.cat([weight, bias.unsqueeze(2)], dim=2)
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        names = (name, bias_name)
    result = own_product(rows, weight.to(dtype), layout, *names)
    return result.view(*x.shape[:-1], weight.shape[1])
