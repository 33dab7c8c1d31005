"""FedSA-LoRA: share A, keep B.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025,
https://arxiv.org/abs/2410.01463. A holds what clients have in common, B what is their own. The
classifier's head stays with B, as in the paper.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedtune.adapter import State, pick
from fedtune.combine import EVERY, Family
from fedtune.strategies.strategy import Plan, Strategy, Turn


@dataclass(frozen=True)
class FedSALoRA(Strategy):
    """Both factors are trained; only A leaves. A client that is new begins from the common B."""

    combines: ClassVar[frozenset[Family]] = EVERY
    personal: ClassVar[bool] = True

    def shares(self, name: str, round: int) -> bool:
        return "lora_A" in name

    def plan(self, turn: Turn) -> Plan:
        start = {**turn.received["adapter"], **turn.personal.get("adapter", {})}
        return Plan({"adapter": start}, frozenset(start))

    def reply(self, turn: Turn, plan: Plan, trained: State) -> tuple[State, State]:
        sent, _ = super().reply(turn, plan, trained)
        own = [name for name in trained["adapter"] if not self.shares(name, turn.round)]
        return sent, {"adapter": pick(trained["adapter"], own)}
