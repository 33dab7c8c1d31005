"""FedTune: federated fine-tuning of language models with LoRA across private text.

from fedtune import Experiment, run

result = run(Experiment.load("experiments/quickstart.toml"))
"""

import importlib
from typing import TYPE_CHECKING, Any

from fedtune.config import Experiment
from fedtune.errors import FedTuneError, RecipeError, RunError

if TYPE_CHECKING:
    from fedtune.launch import run

__all__ = ["Experiment", "FedTuneError", "RecipeError", "RunError", "run"]


def __getattr__(name: str) -> Any:
    # Reading a recipe must not wait for torch and transformers.
    if name == "run":
        return importlib.import_module("fedtune.launch").run
    raise AttributeError(f"module 'fedtune' has no attribute '{name}'")
