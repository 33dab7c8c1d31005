"""RoLoRA: train B and A in turn.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", 2025,
https://arxiv.org/abs/2502.01755. In a round one factor is frozen and the same everywhere, so
averaging the other is exact: sum_i p_i B_i A = B-bar A. B comes first: while B = 0, A has no
gradient.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedtune.combine import EVERY, Family
from fedtune.strategies.strategy import Strategy


@dataclass(frozen=True)
class RoLoRA(Strategy):
    """B in odd rounds, A in even ones; both are broadcast, for a client that missed a round."""

    combines: ClassVar[frozenset[Family]] = EVERY
    admits_dora: ClassVar[bool] = False

    def trains(self, name: str, round: int) -> bool:
        return ("lora_B" if round % 2 else "lora_A") in name
