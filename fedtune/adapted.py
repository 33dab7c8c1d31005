"""One LoRA adapter on a base: which modules get it, and what its tensors are called.

Names are those of a folder that PEFT saves, which every other file of FedTune uses without knowing
where they come from.
"""

from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune import bases
from fedtune.config import AdapterSettings, ModelSettings
from fedtune.errors import RecipeError
from fedtune.tasks.task import Base

INIT: dict[str, bool | str] = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}


def adapted(base: Base, model: ModelSettings, adapter: AdapterSettings) -> PeftModel:
    """The base with one adapter, everything else frozen.

    Raises:
        RecipeError: the base has no such target modules or layers.
    """
    everything = adapter.target_modules == "all-linear"
    targets = [name.strip() for name in adapter.target_modules.split(",")]
    if not everything:
        _require_targets(base, targets, model.name)
    if adapter.layers != "all":
        targets = _targets_in_layers(base, [] if everything else targets, adapter.layers)
        everything = False
    config = LoraConfig(
        base_model_name_or_path=model.name,
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules="all-linear" if everything else targets,
        exclude_modules=list(base.heads) or None,
        modules_to_save=list(base.heads) or None,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        init_lora_weights=INIT[adapter.init],
    )
    module = get_peft_model(base.module, config)
    module.name_or_path = model.name
    for parameter in module.parameters():
        # Heads and adapters are the model's small, trained part: never in half precision.
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return module


def _targets_in_layers(base: Base, targets: Sequence[str], layers: str) -> list[str]:
    """The full names of the target modules ([] for all linear ones) in the chosen layers."""
    paths = bases.layer_paths(base.module)
    chosen = [paths[number] for number in bases.chosen_layers(layers, len(paths))]
    return [
        key
        for key, part in base.module.named_modules()
        if isinstance(part, nn.Linear | Conv1D)
        and any(key.startswith(f"{path}.") for path in chosen)
        and (not targets or any(key == t or key.endswith(f".{t}") for t in targets))
    ]


def _require_targets(base: Base, targets: Sequence[str], name: str) -> None:
    linear = [
        key
        for key, part in base.module.named_modules()
        if isinstance(part, nn.Linear | Conv1D) and key.rsplit(".", 1)[-1] not in base.heads
    ]
    ends = sorted({key.rsplit(".", 1)[-1] for key in linear})
    for target in targets:
        if not any(key == target or key.endswith(f".{target}") for key in linear):
            raise RecipeError(
                f"adapter.target_modules: '{name}' has no linear module '{target}'. "
                f"It has {', '.join(ends)}; 'all-linear' takes them all."
            )


def require_untied(module: PeftModel, strategy: str) -> None:
    """Refuse a strategy that changes frozen weights of which one is an embedding too.

    Raises:
        RecipeError: an adapted layer shares its weight with another part, which would change too.
    """
    users: dict[int, set[str]] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        weight = getattr(part, "weight", None)
        if isinstance(weight, nn.Parameter):
            users.setdefault(id(weight), set()).add(path)
    for path, part in module.named_modules():
        if isinstance(part, LoraLayer) and "default" in part.r:
            own = part.get_base_layer().weight
            if others := users[id(own)] - {path, f"{path}.base_layer"}:
                raise RecipeError(
                    f"strategy = '{strategy}' changes the frozen weights, but '{path}', which "
                    f"adapter.target_modules names, shares its weight with '{min(others)}'. Leave "
                    "it out of adapter.target_modules, or choose a strategy such as 'fedit'."
                )


def tensors_of(module: PeftModel) -> dict[str, dict[str, nn.Parameter]]:
    """The live parameters under PEFT's names in a saved folder, adapter and head apart."""
    adapter: dict[str, nn.Parameter] = {}
    head: dict[str, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".modules_to_save.default." in name:
            head[name.replace(".modules_to_save.default.", ".")] = parameter
        else:
            name = name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
            adapter[name.replace(".default.", ".")] = parameter
    groups = {"adapter": adapter, "head": head}
    return {group: tensors for group, tensors in groups.items() if tensors}
