"""FedDPA: a global adapter for all, a local one for each, trained in turn.

Yang, Long, Shen, Jiang and Blumenstein, "Dual-Personalizing Adapter for Federated Foundation
Models", NeurIPS 2024, https://arxiv.org/abs/2403.19211. A client's model is
W0 + (1 - a) B A + a B_k A_k, with B A averaged and B_k A_k its own.

Departures. Of its two schedules this is FedDPA-T, the alternating one, by whole rounds: odd ones
train and send the global adapter with the local one frozen, even ones the local adapter with the
global one frozen, and send nothing; so two rounds are one of the paper's. The weight a is the same
for every row, in training and in use; the paper sets it row by row when the model is used, from how
much the row resembles the client's own.
"""

from dataclasses import dataclass, replace

from fedtune.errors import RecipeError
from fedtune.strategies.paired import Paired, mixed, only
from fedtune.strategies.strategy import Plan, Turn


@dataclass(frozen=True)
class FedDPA(Paired):
    """The global adapter in odd rounds, the local one, of the same rank, in even rounds.

    Attributes:
        weight: a, of the local adapter.
    """

    weight: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what is no weight."""
        if not 0 <= self.weight <= 1:
            raise RecipeError(f"strategy feddpa: weight = {self.weight} must be in [0, 1].")

    def shares(self, name: str, round: int) -> bool:
        return round % 2 == 1

    def plan(self, turn: Turn) -> Plan:
        plan, shared = super().plan(turn), turn.received["adapter"]
        core = mixed(shared, 1 - self.weight, self.weight)
        mask = only(plan.start["adapter"], shared, 1 - turn.round % 2)
        return replace(plan, start={**plan.start, "core": core}, mask=mask)
