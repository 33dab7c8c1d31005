"""Each row's own gradient from one backward pass, for what is trained inside linear layers.

A linear layer y = W x gives W the gradient sum_t g_t x_t^T of a row with inputs x and gradients g
by its outputs. Summed within each row instead of over the batch, it is the row's own:

    G = einsum('bti,btj->bij', g, x)

LoRA's factors are linear layers whatever they adapt (Conv1D too), a classifier's head is one, and
of a core between the factors each row gets a copy. The rows must not be coupled: what a row's loss
is must not depend on the others.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from fedtune.errors import RecipeError
from fedtune.models import Model


def require(model: Model) -> None:
    """Refuse a model of whose rows nobody can tell each one's part in the gradient.

    Raises:
        RecipeError: with the part of the model that is at fault.
    """
    for path, part in model.module.named_modules():
        if isinstance(part, _BatchNorm):
            raise RecipeError(
                f"privacy.mode = 'record' does not go with this model: its layer '{path}' "
                "normalises a batch, so that one record changes what another one gives. Choose "
                "another model.name."
            )
    if getattr(model.module.get_base_model().config, "expert_capacity", 0):
        raise RecipeError(
            "privacy.mode = 'record' does not go with this model: its experts take so many tokens "
            "of a batch and drop others, so that one record changes what another one gives. "
            "Choose another model.name."
        )
    held = {id(p) for _, part in _linears(model.module) for p in part.parameters(recurse=False)}
    for tensors in model.tensors.values():
        for name, parameter in tensors.items():
            if id(parameter) not in held:
                raise RecipeError(
                    f"privacy.mode = 'record' cannot bound what a record does to '{name}', which "
                    "is no linear layer's. Set adapter.target_modules to linear layers, "
                    "adapter.dora = false, or another model.name."
                )


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for path, part in module.named_modules():
        if isinstance(part, nn.Linear):
            yield path, part


@dataclass
class Rows:
    """What a backward pass left: name -> (rows, parameters)."""

    count: int
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, own: Tensor) -> None:
        """Add a layer's; one that is used twice adds up."""
        flat = own.flatten(1)
        before = self.gradients.get(name)
        self.gradients[name] = flat if before is None else before + flat


@contextmanager
def kept(model: Model, trained: Mapping[str, Parameter], count: int) -> Iterator[Rows]:
    """Within it, a backward pass leaves each row's own gradients, and none in the parameters.

    Args:
        model: whose linear layers.
        trained: the parameters by name.
        count: rows of the batch.
    """
    names, rows = {id(p): name for name, p in trained.items()}, Rows(count)
    cores = {name: p for name, p in trained.items() if ".core." in name}
    originals = {name: p.data for name, p in cores.items()}
    lent: list[nn.Module] = []
    try:
        for _, part in _linears(model.module):
            if any(id(p) in names for p in part.parameters(recurse=False)):
                lent.append(part)
                lent[-1].forward = _linear(part, rows, names)
        for name, parameter in cores.items():
            parameter.data = originals[name].expand(count, *originals[name].shape).contiguous()
        yield rows
        for name, parameter in cores.items():
            if parameter.grad is not None:
                rows.take(name, parameter.grad)
    finally:
        for module in lent:
            del module.forward
        for name, parameter in cores.items():
            parameter.data, parameter.grad = originals[name], None


def _linear(part: nn.Linear, rows: Rows, names: Mapping[int, str]) -> Callable[[Tensor], Tensor]:
    weight = names.get(id(part.weight), "")
    bias = names.get(id(part.bias), "")

    def forward(x: Tensor) -> Tensor:
        if len(x) != rows.count or x.dim() < 2:
            raise RecipeError(
                f"privacy.mode = 'record' cannot tell rows apart in this model: a layer that is "
                f"trained ({weight or bias}) sees {len(x)} parts of a batch of {rows.count} rows. "
                "Set adapter.target_modules to other layers."
            )
        kind = x.device.type
        mixed = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if mixed else part.weight.dtype
        own = [None if p is None else p.to(dtype) for p in (part.weight, part.bias)]
        result: Tensor = _Linear.apply(x.to(dtype), *own, rows, weight, bias)  # type: ignore[no-untyped-call]
        return result

    return forward


class _Linear(torch.autograd.Function):
    """W x + b, which hands out each row's own gradients by W and b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Rows,
        weight_name: str,
        bias_name: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows, ctx.names = rows, (weight_name, bias_name)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight_name, bias_name = ctx.names
        g = gradient.reshape(len(x), -1, gradient.shape[-1])
        if weight_name:
            own = torch.bmm(g.transpose(1, 2), x.reshape(len(x), -1, x.shape[-1]))
            ctx.rows.take(weight_name, own)
        if bias_name:
            ctx.rows.take(bias_name, g.sum(1))
        dx = gradient @ weight if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, None
