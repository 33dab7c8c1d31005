"""The layers of a base model, run over real tokens only.

A batch of rows of unequal length is mostly padding, and a frozen base multiplies padding as it
multiplies text. Inside `unpadded`, the hidden states between the first layer and the last one are
one row of all real tokens, (1, tokens, hidden); attention alone sees the rows apart, in buckets of
like length. Before the first layer and after the last one everything has its usual shape, so that
neither embeddings, heads nor tasks know of it.

It uses two interfaces that transformers offers: layers that derive from GradientCheckpointingLayer,
and attention functions registered by name. Whether a model keeps to them is tried, not assumed:
`agrees` compares the two computations once.
"""

import hashlib
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fedtune import bases
from fedtune.models import Model
from fedtune.packing import Packing, bucketed, in_order

NAME = "fedtune_unpadded"
HARMLESS = {"position_ids", "use_cache", "output_attentions", "is_causal", "cache_position"}


class UnsupportedError(Exception):
    """The model asks of its layers or its attention what unpadded rows cannot give."""


class _Now:
    """The packing of the batch that is being computed.

    Attention functions are chosen by name and get tensors only. A backward pass that computes
    layers again asks for it too, on a GPU from another thread: so no context variable.
    """

    packing: Packing | None = None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """Attention over (1, heads, tokens, width), each row to itself; (1, tokens, heads, width)."""
    packing = _Now.packing
    window = asked.pop("sliding_window", None)
    odd = [k for k, v in asked.items() if k not in HARMLESS and v is not None and v is not False]
    if packing is None or odd or (window is not None and window < packing.longest):
        raise UnsupportedError(f"attention with {', '.join(odd) or 'a sliding window'}")
    # (tokens, heads, width), then as the buckets have them.
    flat = [bucketed(part.transpose(1, 2)[0], packing) for part in (query, key, value)]
    joined, begin = [], 0
    for bucket in packing.buckets:
        end = begin + bucket.rows * bucket.longest
        shape = (bucket.rows, bucket.longest)
        q, k, v = (p[begin:end].view(*shape, *p.shape[1:]).transpose(1, 2) for p in flat)
        causal = asked.get("is_causal", getattr(module, "is_causal", True))
        # On the right of a causal row, padding is never looked at.
        mask = None if causal or bucket.real is None else bucket.real[:, None, None, :]
        result, _ = sdpa_attention_forward(
            module, q, k, v, mask, dropout=dropout, scaling=scaling, is_causal=causal
        )
        joined.append(result.reshape(-1, *result.shape[2:]))
        begin = end
    whole = torch.cat(joined) if len(joined) > 1 else joined[0]
    return in_order(whole, packing).unsqueeze(0), None


AttentionInterface.register(NAME, _attention)


_stacks: "weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Module]]]"
_stacks = weakref.WeakKeyDictionary()


def layers(model: Model) -> list[nn.Module]:
    """The base's layers in order; [] where it has no single stack of them."""
    if model.module not in _stacks:
        paths = bases.layer_paths(model.module)
        _stacks[model.module] = [weakref.ref(model.module.get_submodule(p)) for p in paths]
    return [layer for layer in (ref() for ref in _stacks[model.module]) if layer is not None]


def frozen_layers(model: Model) -> int:
    """How many of the lowest layers are the same in every round: those below the first adapter."""
    paths = bases.layer_paths(model.module)
    names = list(model.tensors["adapter"])
    if any("lora_embedding" in name for name in names):
        return 0
    return next((i for i, p in enumerate(paths) if any(n.startswith(f"{p}.") for n in names)), 0)


@contextmanager
def unpadded(model: Model) -> Iterator[None]:
    """Choose the attention for `packed` batches; other batches must not run inside."""
    base: PreTrainedModel = model.module.get_base_model()
    backbone = base.base_model
    before = backbone.config._attn_implementation
    backbone.set_attn_implementation(NAME)
    try:
        yield
    finally:
        backbone.set_attn_implementation(before)
        _Now.packing = None


@contextmanager
def packed(
    model: Model, packing: Packing, entry: Tensor | None = None, first: int = 0
) -> Iterator[None]:
    """Run the layers over the real tokens of a batch; inside `unpadded`.

    Args:
        model: whose layers.
        packing: of the batch that the model is called with.
        entry: (1, tokens, hidden), what layer `first` begins from, instead of what is below it.
        first: layers below it are not run.
    """
    stack = layers(model)
    _Now.packing = packing

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0]
        if layer is stack[first]:
            hidden = entry if entry is not None else packing.pack(hidden)
        kwargs = {key: _moved(key, value, packing) for key, value in kwargs.items()}
        return (hidden, *args[1:]), kwargs

    def leave(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        if not isinstance(output, Tensor):
            raise UnsupportedError("layers that give more than hidden states")
        return packing.unpack(output)

    with ExitStack() as hooks:
        for layer in stack[:first]:
            layer.forward = _unchanged
            hooks.callback(delattr, layer, "forward")
        for layer in stack[first:]:
            hooks.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
        hooks.callback(stack[-1].register_forward_hook(leave).remove)
        yield


def _unchanged(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


def _moved(key: str, value: Any, packing: Packing) -> Any:
    """A layer's argument for packed rows: what has a value a place is packed, masks are dropped."""
    if "mask" in key:
        return None
    if key == "position_embeddings" and value is not None:
        return tuple(packing.pack(_rows(part, packing)) for part in value)
    if key == "position_ids" and value is not None:
        return packing.pack(_rows(value, packing))
    return value


def _rows(value: Tensor, packing: Packing) -> Tensor:
    """A value a place, of one row for all or of each row, as (rows, longest, ...)."""
    return value.expand(len(packing.lengths), *value.shape[1:])


class _Reached(Exception):  # noqa: N818
    """Stops a forward pass at the layer whose input is wanted."""


def below(model: Model, batch: dict[str, Tensor], packing: Packing, first: int) -> Tensor:
    """(tokens, hidden), what layer `first` begins from for a batch; inside `unpadded`."""
    reached: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        reached.append(args[0][0])
        raise _Reached

    backbone = model.module.get_base_model().base_model
    handle = layers(model)[first].register_forward_pre_hook(stop)
    try:
        with torch.no_grad(), model.autocast(), packed(model, packing):
            backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    except _Reached:
        pass
    finally:
        handle.remove()
    return reached[0]


def probe(model: Model, first: int) -> Tensor:
    """What layer `first` begins from for one short row: its width and dtype are those of all."""
    ids = torch.ones(1, 2, dtype=torch.int64, device=model.device)
    packing = Packing.of([2], model.device)
    with unpadded(model):
        return below(model, {"input_ids": ids, "attention_mask": ids}, packing, first)


def fingerprint(model: Model, first: int) -> str:
    """A digest of everything below layer `first`: weights, their dtype and the configuration."""
    backbone = model.module.get_base_model().base_model
    stack = layers(model)
    above = {id(p) for layer in stack[first:] for p in layer.parameters()}
    sha = hashlib.sha256(backbone.config.to_json_string().encode())
    for name, parameter in backbone.named_parameters():
        if id(parameter) not in above:
            sha.update(f"{name}|{parameter.dtype}|{tuple(parameter.shape)}|".encode())
            data = parameter.detach().cpu().contiguous()
            sha.update(data.view(torch.uint8).numpy() if data.dim() else data.numpy())
            # Of quantized weights, what the codes are multiplied with.
            scales = getattr(getattr(parameter, "quant_state", None), "absmax", None)
            scales = getattr(parameter, "SCB", None) if scales is None else scales
            if scales is not None:
                sha.update(scales.detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()


_agreeing: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


def agrees(model: Model) -> bool:
    """Whether the model's layers give the same hidden states for real tokens without padding.

    Tried once a model, on two short rows.
    """
    if model.module not in _agreeing:
        _agreeing[model.module] = _tried(model)
    return _agreeing[model.module]


def _tried(model: Model) -> bool:
    backbone = model.module.get_base_model().base_model
    if not layers(model) or not backbone._can_set_attn_implementation():
        return False
    vocabulary = backbone.config.vocab_size
    ids = torch.arange(1, 15, device=model.device).view(2, 7) % vocabulary
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    training = model.module.training
    model.module.eval()
    try:
        with torch.no_grad(), model.autocast():
            usual = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
            packing = Packing.of([7, 4], model.device)
            with unpadded(model), packed(model, packing):
                own = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    except UnsupportedError:
        return False
    finally:
        model.module.train(training)
    bound = {torch.float64: 1e-9, torch.float32: 1e-3}.get(usual.dtype, 5e-2)
    real = mask.bool()
    return bool(torch.allclose(usual[real], own[real], rtol=bound, atol=bound))
