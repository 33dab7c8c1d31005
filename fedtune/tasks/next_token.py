"""Log-likelihoods of next tokens, without the logits of tokens that nobody learns.

A vocabulary is a hundred times wider than a hidden state, so the logits of all positions are by far
the largest tensor of a step. Here the frozen output layer is applied to the learnt positions alone,
some at a time. The loss of a position depends on its own hidden state h and on nothing else:

    nll = -log softmax(W h + b)[target],        d nll / d h = W' (softmax(W h + b) - onehot(target))

so that the derivative is computed while the logits are there, and the logits are let go: exact, no
second computation, and memory for (learnt tokens, hidden) numbers instead of the vocabulary's.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F  # noqa: N812
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from fedtune.tasks.task import Batch

LOGITS = 2**24  # that exist at once
AMPLIFIED = 2.0**14  # logits at which a soft cap shows
_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def likelihoods(
    model: nn.Module, batch: Batch, rows: Tensor, positions: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Of each of some positions: the target's negative log-likelihood, and whether it is the top.

    Args:
        model: a causal language model, with an adapter or without.
        batch: "input_ids" and "attention_mask".
        rows: of the positions, (learnt,).
        positions: whose next tokens are the targets, (learnt,).
        targets: token ids, (learnt,).

    Returns:
        (learnt,) in nats, float32 or float64, with its gradient; (learnt,) booleans.
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    head = _output_layer(inner, inputs)
    if head is None:
        logits = model(**inputs).logits[rows, positions]
        nll = F.cross_entropy(_precise(logits), targets, reduction="none")
        return nll, logits.detach().argmax(-1) == targets
    backbone: Any = inner.base_model
    hidden = backbone(**inputs).last_hidden_state
    learnt = hidden.flatten(0, 1).index_select(0, rows * hidden.shape[1] + positions)
    nll, right = _FrozenHead.apply(learnt, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
    return nll, right


def _precise(logits: Tensor) -> Tensor:
    """Half precision is too coarse for a log-softmax; float64 stays itself."""
    return logits if logits.dtype == torch.float64 else logits.float()


class _FrozenHead(torch.autograd.Function):
    """Negative log-likelihoods under a frozen linear layer, and whether the target is the top."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        chunk = max(1, LOGITS // len(weight))
        parts = [
            _part(h, weight, bias, t, slopes=ctx.needs_input_grad[0])
            for h, t in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
        ]
        nll, right, slopes = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        ctx.save_for_backward(slopes)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(right)
        return nll, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, nll: Tensor, right: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (nll.unsqueeze(1) * slopes).to(ctx.dtype), None, None, None


def _part(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, slopes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(nll, right, d nll / d hidden) of some positions, the last one empty unless asked for."""
    logits = F.linear(hidden, weight, bias)
    dtype, logits = logits.dtype, _precise(logits)
    right = logits.argmax(-1) == targets
    column = targets.unsqueeze(1)
    logits = F.log_softmax(logits, -1)
    nll = -logits.gather(1, column).squeeze(1)
    if not slopes:
        return nll, right, nll.new_empty(0)
    difference = logits.exp_()
    difference.scatter_add_(1, column, difference.new_full(column.shape, -1.0))
    return nll, right, difference.to(dtype) @ weight.to(dtype)


def _output_layer(model: nn.Module, inputs: Batch) -> nn.Linear | None:
    """The frozen linear layer that is all that follows the model's backbone, else None."""
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return None
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head):
        return None  # adapted, quantized, or lent to an engine
    if any(parameter.requires_grad for parameter in head.parameters()):
        return None
    if model not in _plain:
        _plain[model] = _probed(model, head, inputs)
    return head if _plain[model] else None


def _probed(model: PreTrainedModel, head: nn.Linear, inputs: Batch) -> bool:
    """Look once what a model does before and after its output layer.

    Its configuration would not tell: every family has its own names for scales and caps. The output
    layer is given one position, as in generation, and its output is amplified.
    """
    seen: dict[str, Any] = {}

    def after_backbone(module: nn.Module, args: Any, output: Any) -> None:
        seen["hidden"] = getattr(output, "last_hidden_state", None)

    def before_head(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen["given"] = args[0]
        return (args[0][:, :1], *args[1:])

    def after_head(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        amplified = output * AMPLIFIED
        seen["logits"] = amplified.clone()
        return amplified

    hooks = [
        model.base_model.register_forward_hook(after_backbone),
        head.register_forward_pre_hook(before_head),
        head.register_forward_hook(after_head),
    ]
    try:
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        # The dropout of the batch itself is drawn as if nobody had looked.
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices, key=str)):
            logits = model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    pairs = ((seen.get("hidden"), seen.get("given")), (seen.get("logits"), logits))
    return all(
        a is not None and b is not None and a.shape == b.shape and bool((a == b).all())
        for a, b in pairs
    )
