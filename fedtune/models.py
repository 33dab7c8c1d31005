"""A frozen base model with one adapter: load it, read and write its adapter.

Only this file, bases.py, exporting.py and tasks/ know transformers and PEFT. Everyone else sees a
`State`: group "adapter" holds the LoRA tensors under PEFT's names, group "head" a classifier's. A
model is loaded once a process and every client in it writes its own adapter into it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedtune import bases, cores, lowrank
from fedtune.adapted import adapted, tensors_of
from fedtune.adapter import Adapter, State, rank_axis
from fedtune.config import AdapterSettings, ModelSettings
from fedtune.seeds import seed_of
from fedtune.tasks.classification import SentenceClassifier
from fedtune.tasks.task import Base, Task

__all__ = ["Model", "SentenceClassifier", "initial", "load", "read", "skeleton", "write"]


@dataclass(frozen=True, eq=False)
class Model:
    """One resident model.

    Attributes:
        module: the PEFT model, base frozen.
        tokenizer: its tokenizer, with a pad token.
        labels: the classes of its head, () without one.
        tensors: group -> PEFT's name -> the live parameter.
        device: where it lives.
        fresh: whether the head is newly made.
    """

    module: PeftModel
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    tensors: dict[str, dict[str, nn.Parameter]]
    device: torch.device
    fresh: bool

    @property
    def pad(self) -> int:
        """The pad token's id."""
        return int(self.tokenizer.pad_token_id)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision where the base is bfloat16: adapters and head stay float32."""
        mixed = next(self.module.parameters()).dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=mixed)


@functools.lru_cache(maxsize=1)
def load(
    task: Task, model: ModelSettings, adapter: AdapterSettings, labels: tuple[str, ...], seed: int
) -> Model:
    """The base model with an adapter; the last one loaded stays resident.

    Args:
        task: decides the kind of model and its head.
        model: which base.
        adapter: which LoRA tensors.
        labels: the classes of a head.
        seed: fills weights that the checkpoint lacks, equally on every client.

    Raises:
        RecipeError: the model cannot be found, or has no such target modules.
    """
    path, config = bases.config_of(task, model, labels)
    device = bases.device_of(model.device)
    options = bases.quantized(task, config, model, device)
    with bases.quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "missing weights"))
        with bases.found(model):
            dtype = getattr(torch, model.dtype)
            base = task.load(path, config, revision=model.revision, dtype=dtype, **options)
        words = bases.tokenizer(model)
        base.module.config.pad_token_id = words.pad_token_id
        module = adapted(base, model, adapter)
    if not options:
        module.to(device)
    return Model(module, words, labels, tensors_of(module), device, base.fresh)


def skeleton(
    task: Task, model: ModelSettings, adapter: AdapterSettings, labels: tuple[str, ...]
) -> tuple[dict[str, dict[str, nn.Parameter]], int, int]:
    """What `load` would make, without loading weights.

    Returns:
        The tensors by group, on the meta device; the base's parameters; and their bytes.
    """
    _, config = bases.config_of(task, model, labels)
    config.dtype = getattr(torch, model.dtype)
    with bases.quiet(), torch.device("meta"):
        base = task.skeleton(config)
        base.module.to(config.dtype)
        numbers = sum(p.numel() for p in base.module.parameters())
        nbytes = _frozen_bytes(base, model.quantization)
        module = adapted(base, model, adapter)
    return tensors_of(module), numbers, nbytes


QUANTIZED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}  # bytes a weight; nf4 has a float32 for each 64


def _frozen_bytes(base: Base, quantization: str) -> int:
    """Bytes of a base's parameters: linear layers quantized, but for heads and the last one."""
    kept, seen = {id(base.module.get_output_embeddings())}, set()
    total = 0.0
    for name, part in base.module.named_modules():
        linear = isinstance(part, nn.Linear) and id(part) not in kept
        small = linear and quantization in QUANTIZED and name.split(".")[0] not in base.heads
        for key, p in part.named_parameters(recurse=False):
            if id(p) in seen:  # embeddings may be tied to the output's
                continue
            seen.add(id(p))
            each = QUANTIZED[quantization] if small and key == "weight" else p.element_size()
            total += p.numel() * each
    return int(total)


def initial(model: Model, seed: int, *, principal: bool = False) -> State:
    """The state a run begins with: adapters drawn by PEFT's initialisation, a fresh head too.

    Deterministic in `seed`; it leaves the model as it was. The same head is drawn with `principal`,
    where the adapters are the principal factors of the frozen weights instead: scaling B A is the
    best approximation of the weights of that rank.
    """
    before = read(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed_of(seed, "initial adapter"))
        for part in model.module.modules():
            if isinstance(part, LoraLayer) and "default" in part.r:
                init = model.module.peft_config["default"].init_lora_weights
                with _on_cpu(part):
                    if init == "orthogonal":
                        _orthogonal(part)
                    else:
                        part.reset_lora_parameters("default", init)
                    if principal:
                        _principal(part)
        if model.fresh:
            for parameter in model.tensors.get("head", {}).values():
                fan_in = parameter.shape[-1] if parameter.dim() > 1 else 0
                values = torch.randn(parameter.shape) / fan_in**0.5 if fan_in else 0.0
                parameter.copy_(torch.as_tensor(values, dtype=parameter.dtype))
    state = read(model)
    write(model, before)
    return state


def _orthogonal(part: LoraLayer) -> None:
    """PEFT's orthogonal initialisation, which makes new parameters, copied into the live ones."""
    factors = (part.lora_A["default"], part.lora_B["default"])
    live = [factor.weight for factor in factors]
    part.orthogonal_init("default")
    for factor, parameter in zip(factors, live, strict=True):
        parameter.copy_(factor.weight)
        factor.weight = parameter


def _principal(part: LoraLayer) -> None:
    weight = part.get_base_layer().weight.detach().cpu()
    if getattr(part, "fan_in_fan_out", False):
        weight = weight.T
    scale = part.scaling["default"] ** 0.5
    factors = lowrank.principal(weight, part.r["default"])
    part.lora_A["default"].weight.copy_(factors.A / scale)
    part.lora_B["default"].weight.copy_(factors.B / scale)


@contextlib.contextmanager
def _on_cpu(part: LoraLayer) -> Iterator[None]:
    """Draw on the CPU whatever the device, so that every machine begins with the same numbers."""
    factors = [part.lora_A["default"], part.lora_B["default"]]
    devices = [factor.weight.device for factor in factors]
    for factor in factors:
        factor.to("cpu")
    yield
    for factor, device in zip(factors, devices, strict=True):
        factor.to(device)


def lora_layers(model: Model) -> list[tuple[str, LoraLayer]]:
    """The adapted layers with the part of their tensors' names before `.lora_A.weight`."""
    return [
        (path, part)
        for path, part in model.module.named_modules()
        if isinstance(part, LoraLayer) and "default" in part.r
    ]


def read(model: Model) -> State:
    """A copy of the adapter and head, on the CPU."""
    return {
        group: {name: p.detach().to("cpu", copy=True) for name, p in tensors.items()}
        for group, tensors in model.tensors.items()
    }


def write(model: Model, state: State) -> None:
    """Put every tensor of `state` into the model.

    Raises:
        ValueError: a group, name or shape that the model has not; nothing is broadcast.
    """
    with torch.no_grad():
        for group, tensors in state.items():
            live = model.tensors.get(group, {})
            for name, tensor in tensors.items():
                if name not in live or live[name].shape != tensor.shape:
                    raise ValueError(f"the model has no tensor '{name}' of {tuple(tensor.shape)}")
                live[name].copy_(tensor)


@contextlib.contextmanager
def shifted(model: Model, base: Adapter) -> Iterator[None]:
    """Add the product of stacked LoRA factors to the frozen weights, and take it away bit by bit.

    Args:
        model: whose adapted layers.
        base: lora_A (ranks, d_in) and lora_B (d_out, ranks) of some layers, on the model's scaling.

    Raises:
        ValueError: a layer is not there, or its weights are quantized.
    """
    originals: list[tuple[nn.Parameter, torch.Tensor]] = []
    layers = dict(lora_layers(model)) if base else {}
    try:
        for name, a in base.items():
            if "lora_A" not in name:
                continue
            path = name.removesuffix(".lora_A.weight")
            if path not in layers:
                raise ValueError(f"the model has no adapted layer '{path}' to change")
            layer, b = layers[path], base[name.replace("lora_A", "lora_B")]
            weight = layer.get_base_layer().weight
            if not weight.is_floating_point():
                raise ValueError(f"the weights of '{path}' are quantized and cannot be changed")
            change = layer.scaling["default"] * (b.double() @ a.double())
            if getattr(layer, "fan_in_fan_out", False):
                change = change.T
            originals.append((weight, weight.data))
            weight.data = (weight.data.double() + change.to(weight.device)).to(weight.dtype)
        yield
    finally:
        for weight, data in originals:
            weight.data = data


@contextlib.contextmanager
def untuned(model: Model) -> Iterator[None]:
    """The base as it was loaded: without adapter, and with the head that it had then."""
    with model.module.disable_adapter():
        yield


@contextlib.contextmanager
def scaled(model: Model, factor: float) -> Iterator[None]:
    """Multiply the adapters' scaling by `factor`."""
    layers = [layer for _, layer in lora_layers(model)] if factor != 1.0 else []
    before = [layer.scaling["default"] for layer in layers]
    for layer, scaling in zip(layers, before, strict=True):
        layer.scaling["default"] = factor * scaling
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling["default"] = scaling


@contextlib.contextmanager
def ranked(model: Model, adapter: Adapter) -> Iterator[None]:
    """Give the LoRA factors the ranks of `adapter`'s; the scaling stays the recipe's."""
    live = model.tensors["adapter"]
    before: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        for name, tensor in adapter.items():
            if rank_axis(name) is None or name not in live or live[name].shape == tensor.shape:
                continue
            before.append((live[name], live[name].data))
            live[name].data = torch.zeros(tensor.shape).to(live[name])
        yield
    finally:
        for parameter, data in before:
            parameter.data, parameter.grad = data, None


@contextlib.contextmanager
def cored(model: Model, core: Adapter) -> Iterator[dict[str, nn.Parameter]]:
    """Multiply by each module's core between its factors.

    Yields:
        The core's live parameters by name.

    Raises:
        ValueError: a layer is not there.
    """
    layers = dict(lora_layers(model)) if core else {}
    live: dict[str, nn.Parameter] = {}
    hooks = []
    try:
        for module in cores.modules_of(core):
            if module not in layers:
                raise ValueError(f"the model has no adapted layer '{module}' for a core")
            first = layers[module].lora_A["default"]
            own = [module + cores.BLOCKS, module + cores.SCALES]
            for name in (name for name in own if name in core):
                live[name] = nn.Parameter(core[name].to(first.weight, copy=True))
            hooks.append(first.register_forward_hook(_between(live, module)))
        yield live
    finally:
        for hook in hooks:
            hook.remove()


def _between(live: dict[str, nn.Parameter], module: str) -> Callable[..., torch.Tensor]:
    def through(part: nn.Module, args: tuple[Any, ...], inner: torch.Tensor) -> torch.Tensor:
        matrix = cores.matrix(live, module, inner.shape[-1]).to(inner.dtype)
        if matrix.dim() > 2:  # one for each row, see per_example.py
            return torch.einsum("b...j,bij->b...i", inner, matrix)
        return inner @ matrix.T

    return through


@contextlib.contextmanager
def checkpointed(model: Model, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing of the base's layers: less memory, each layer computed twice."""
    base = model.module.get_base_model()
    if wanted:
        base.config.use_cache = False
        base.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if wanted:
            base.activation_checkpointing_disable()


def generate(model: Model, prompts: Sequence[Sequence[int]], limit: int) -> list[str]:
    """Greedy continuations of at most `limit` tokens."""
    answers = []
    model.module.eval()
    with torch.no_grad(), model.autocast(), bases.quiet():
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=model.device)
            output = model.module.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=limit,
                do_sample=False,
                use_cache=True,
                pad_token_id=model.pad,
            )
            text = model.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
            answers.append(str(text).strip())
    return answers


def activation_bytes(model: Model, tokens: int, longest: int, layers: int | None = None) -> int:
    """Bytes that a backward pass over `tokens` tokens in rows of `longest` keeps: an estimate.

    About 17 hidden-sized numbers a token and layer, and 2.5 a pair of tokens and head: Korthikanti
    et al. 2022, https://arxiv.org/abs/2205.05198, equation 1, in the base's precision.
    """
    config = model.module.get_base_model().config
    layers = layers or config.num_hidden_layers
    numbers = 17 * config.hidden_size + 2.5 * config.num_attention_heads * longest
    return int(tokens * layers * numbers * next(model.module.parameters()).element_size())


def parameters(tensors: dict[str, dict[str, nn.Parameter]]) -> dict[str, int]:
    """Group -> number of trainable parameters."""
    return {group: sum(p.numel() for p in named.values()) for group, named in tensors.items()}
