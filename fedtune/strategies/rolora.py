"""RoLoRA: train B and A in turn.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", 2025,
https://arxiv.org/abs/2502.01755. In a round one factor is frozen and the same everywhere, so
averaging the other is exact: sum_i p_i B_i A = B-bar A. B comes first: while B = 0, A has no
gradient.
"""

from dataclasses import dataclass

from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.strategies.strategy import Strategy


@dataclass(frozen=True)
class RoLoRA(Strategy):
    """B in odd rounds, A in even ones; both are broadcast, for a client that missed a round."""

    def trains(self, name: str, round: int) -> bool:
        return ("lora_B" if round % 2 else "lora_A") in name

    def check(self, experiment: Experiment) -> None:
        if experiment.adapter.dora:
            raise RecipeError(
                f"strategy = '{experiment.strategy}' averages one factor at a time, but "
                "adapter.dora = true trains a norm that belongs to neither. Set adapter.dora = "
                "false."
            )
