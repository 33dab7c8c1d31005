"""What a federated result is read against: each client alone, and the rows of all pooled.

Neither is federated learning. `local_only` shares nothing: what a client could do by itself.
`centralized` pools the rows, which only a simulation can do: what privacy costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.adapter import Adapter, State, at_rank
from fedtune.combine import Combine
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.strategies.strategy import ClientInfo, Plan, Strategy, Turn, Update


@dataclass(frozen=True)
class LocalOnly(Strategy):
    """Each client trains its own adapter and head from the same start and keeps them."""

    joins: ClassVar[bool] = False
    personal: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True

    def shares(self, name: str, round: int) -> bool:
        return False

    def broadcast(self, server: State, client: ClientInfo, round: int) -> State:
        # The common start is sent once; afterwards a client has its own.
        if client.last_round:
            return {}
        return {"adapter": at_rank(server["adapter"], client.rank)}

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        return server

    def plan(self, turn: Turn) -> Plan:
        start = turn.personal.get("adapter") or turn.received.get("adapter")
        if start is None:
            raise ValueError("this client's personal adapter is gone; it cannot continue its run")
        return Plan({"adapter": start}, frozenset(start))

    def reply(self, turn: Turn, plan: Plan, trained: State) -> tuple[State, State]:
        return {}, {"adapter": trained["adapter"]}

    def payload(self, initial: Adapter, client: ClientInfo, round: int) -> State:
        return {}


@dataclass(frozen=True)
class Centralized(Strategy):
    """One client that holds the rows of all, with the same number of passes over them."""

    joins: ClassVar[bool] = False
    pools: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True  # its one client has the largest

    def check(self, experiment: Experiment) -> None:
        if experiment.cohort != "all":
            raise RecipeError(
                f"strategy = 'centralized' has one client, so cohort = '{experiment.cohort}' has "
                "no meaning. Set cohort = 'all'."
            )
