"""A run's result as files that others can load: a PEFT folder, or a whole model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from fedtune import models, parts
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
        RecipeError: `target` exists already, or the run has no adapter.
    """
    if target.exists() and any(target.iterdir()):
        raise RecipeError(f"{target} is not empty; name a new folder.")
    model = load(folder, whole=merge)
    if merge:
        models.merge(model, models.read(model), target)
    else:
        shutil.copytree(folder / "adapter", target, dirs_exist_ok=True)
