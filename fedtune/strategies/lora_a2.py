"""LoRA-A^2: alternate the factors, and let each client train the ranks that matter to it.

Koo, Jang and Ok, "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous
Clients", ACL 2025, https://arxiv.org/abs/2410.22815. B in odd rounds, A in even ones, as in
RoLoRA. In a provisional pass over its batches a client trains the whole factor; rank i of a module
scores |dB[:, i] A[i, :]| (even rounds: |B[:, i] dA[i, :]|), and of all ranks of all modules the
highest share trains again from the start. What a client did not train, it sends as zero; the mean
of the changes is exact, since the other factor is the same everywhere.

Departures. The provisional pass takes the round's own steps: one epoch where train.epochs = 1, as
in the paper, and then twice RoLoRA's work. Zeros are sent like other numbers, so that a client's
choice costs it no bytes less; the paper sends what is chosen, and counts that. Both factors have
one learning rate.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from fedtune.combine import DISTANCES, Family
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.strategies.rolora import RoLoRA
from fedtune.strategies.strategy import Plan, Turn


@dataclass(frozen=True)
class LoRAA2(RoLoRA):
    """RoLoRA, of which each client trains a share of the ranks.

    Attributes:
        share: of all modules' ranks, at least one of them; with 1 this is RoLoRA.
    """

    # A zero of a client that did not train an entry is no vote on it.
    combines: ClassVar[frozenset[Family]] = DISTANCES
    share: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 < self.share <= 1:
            raise RecipeError(f"strategy lora_a2: share = {self.share} must be in (0, 1].")

    def check(self, experiment: Experiment) -> None:
        if experiment.privacy.mode == "record" and self.share < 1:
            raise RecipeError(
                f"strategy = '{experiment.strategy}' does not go with privacy.mode = 'record': its "
                "provisional pass would learn from the records a second time. Set strategy = "
                "'lora_a2(share=1.0)' or 'rolora'."
            )

    def plan(self, turn: Turn) -> Plan:
        return replace(super().plan(turn), keep=self.share)
