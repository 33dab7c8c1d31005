"""FFA-LoRA: freeze A, average B.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024,
https://arxiv.org/abs/2403.12313. With one random A shared by all and never trained, sum_i p_i B_i A
= B-bar A: averaging is exact and half as much is sent.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedtune.combine import EVERY, Family
from fedtune.strategies.strategy import Strategy


@dataclass(frozen=True)
class FFALoRA(Strategy):
    """Only B is trained and shared. A is broadcast with it, so that a client needs no memory."""

    combines: ClassVar[frozenset[Family]] = EVERY
    admits_dora: ClassVar[bool] = False

    def trains(self, name: str, round: int) -> bool:
        return "lora_A" not in name
