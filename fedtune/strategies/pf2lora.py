"""PF2LoRA: a common adapter, and a small one of each client on top of it.

Hao, Wu, Payani, Lee and Liu, "Personalized Federated Fine-tuning for Heterogeneous Data: An
Automatic Rank Learning Approach via Two-Level LoRA", 2025, https://arxiv.org/abs/2503.03920. A
client's model is W0 + B A + D_k C_k, with B A averaged and D_k C_k its own, of lower rank.

Departures. The paper poses two levels: D_k C_k minimises a client's loss given B A, and B A is
trained through that minimum, with second derivatives. Here both take the same gradient steps
together, which is the first order of it, with one optimizer and learning rate (the paper has AdamW
for the common adapter and SGD for the client's).
"""

from dataclasses import dataclass

from fedtune.errors import RecipeError
from fedtune.strategies.paired import Paired


@dataclass(frozen=True)
class PF2LoRA(Paired):
    """Both adapters are trained in every round.

    Attributes:
        rank: of the client's own adapter.
    """

    rank: int = 2

    def __post_init__(self) -> None:
        """Refuse what is no rank."""
        if self.rank < 1:
            raise RecipeError(f"strategy pf2lora: rank = {self.rank} must be at least 1.")

    def private_rank(self, shared: int) -> int:
        return self.rank
