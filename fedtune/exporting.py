"""A run's result as files that others can load: a PEFT folder, or a whole model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from fedtune import bases, lowrank, models, parts
from fedtune.adapter import Adapter, State, at_rank, fitted, rank_of
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.models import Model


def load(folder: Path, *, whole: bool = False) -> Model:
    """A finished run's model with its adapter, ready to predict.

    Args:
        folder: of the run.
        whole: load the base's own weights where the run quantized them.

    Raises:
        RecipeError: the folder holds no run with an adapter, or its base model cannot be found.
    """
    adapter = folder / "adapter"
    if not (adapter / "adapter_model.safetensors").exists():
        raise RecipeError(
            f"{folder} holds no adapter. A run writes it at its end: fedtune run RECIPE --resume."
        )
    experiment = Experiment.load(folder / "experiment.toml")
    if whole:
        experiment = experiment.replace(model__quantization="none")
    about = json.loads((adapter / "fedtune.json").read_text(encoding="utf-8"))
    task = parts.resolve(experiment).task
    labels = tuple(about["labels"])
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    # A run that changed the frozen weights has an adapter of higher rank than its recipe's.
    settings = replace(experiment.adapter, rank=config["r"], alpha=config["lora_alpha"])
    model = models.load(task, experiment.model, settings, labels, experiment.seed)
    tensors = load_file(adapter / "adapter_model.safetensors")
    state = {
        group: {name: tensors[name] for name in named} for group, named in model.tensors.items()
    }
    models.write(model, state)
    return model


def export(folder: Path, target: Path, *, merge: bool) -> None:
    """Copy the adapter to `target`, or write the full model with the adapter merged into it.

    Raises:
        RecipeError: `target` is not empty, or the run has no adapter.
    """
    if target.exists() and any(target.iterdir()):
        raise RecipeError(f"{target} is not empty; name a new folder.")
    model = load(folder, whole=merge)
    if merge:
        save_merged(model, models.read(model), target)
    else:
        shutil.copytree(folder / "adapter", target, dirs_exist_ok=True)


def save(model: Model, state: State, folder: Path) -> None:
    """Write a PEFT folder that `PeftModel.from_pretrained(base, folder)` loads.

    A group "base", the change of the frozen weights, becomes a part of the adapter, whose rank is
    then higher: the frozen weights themselves stay the checkpoint's. So is the rank of an adapter
    that has other ranks than the model's.

    Beside PEFT's own files, `fedtune.json` holds the base's name and the labels in order, which is
    what `load` needs to rebuild the base.
    """
    before = models.read(model)
    state, change = dict(state), state.get("base", {})
    state.pop("base", None)
    whole = state["adapter"]
    own = {n: fitted(n, t, model.tensors["adapter"][n].shape) for n, t in whole.items()}
    models.write(model, {**state, "adapter": own})
    with bases.quiet():
        tensors = get_peft_model_state_dict(model.module, save_embedding_layers=False)
        model.module.save_pretrained(
            str(folder), save_embedding_layers=False, safe_serialization=True
        )
    assert set(tensors) == {name for group in model.tensors.values() for name in group}
    if change or any(own[name].shape != tensor.shape for name, tensor in whole.items()):
        _raise_rank(folder, whole, change, model.module.peft_config["default"].r)
    config = model.module.get_base_model().config
    about = {
        "base": model.module.peft_config["default"].base_model_name_or_path,
        "pooling": getattr(config, "fedtune_pooling", ""),
        "labels": list(model.labels),
    }
    Path(folder, "fedtune.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    models.write(model, before)


def _raise_rank(folder: Path, adapter: Adapter, base: Adapter, before: int) -> None:
    """Write the sum of both products into a PEFT folder of rank `before`, on its scaling."""
    raised = lowrank.added(base, adapter)
    rank = rank_of(raised)
    file = folder / "adapter_model.safetensors"
    tensors = {**load_file(file), **at_rank(raised, rank)}
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"format": "pt"})
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    # PEFT divides alpha by the rank, or by its root, and must arrive at the same scaling.
    root = 0.5 if settings["use_rslora"] else 1.0
    settings |= {"r": rank, "lora_alpha": settings["lora_alpha"] * (rank / before) ** root}
    text = json.dumps(settings, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def save_merged(model: Model, state: State, folder: Path) -> None:
    """Write the full model with the adapter merged into its weights, and the tokenizer."""
    models.write(model, state)
    with bases.quiet():
        merged = model.module.merge_and_unload()
        merged.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
    models.load.cache_clear()  # the resident model has lost its adapter
