"""What a model can be trained to do; a new task is one file and one line here."""

from fedtune.tasks.causal_lm import CausalLM, Instruction
from fedtune.tasks.classification import Classification
from fedtune.tasks.task import Task

__all__ = ["TASKS", "CausalLM", "Classification", "Instruction", "Task"]

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "causal_lm": CausalLM,
    "instruction": Instruction,
}
