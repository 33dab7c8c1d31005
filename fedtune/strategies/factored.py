"""Whole factors, of each client's own rank: what strategies that join products have in common.

A product needs both of its factors, so clients send them and not their changes. A client of fewer
ranks is sent the first ones: of an SVD, whose values descend, they are the best approximation.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedtune.adapter import Adapter, State, at_rank
from fedtune.strategies.strategy import ClientInfo, Plan, Strategy, Turn, Update


@dataclass(frozen=True)
class Factored(Strategy):
    """Both factors travel, down and up, at the client's rank; the rest is the strategy's own."""

    sends: ClassVar[Literal["delta", "adapter"]] = "adapter"
    admits_dora: ClassVar[bool] = False
    sums_only: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = True

    def broadcast(self, server: State, client: ClientInfo, round: int) -> State:
        sent = super().broadcast(server, client, round)
        return {**sent, "adapter": at_rank(sent["adapter"], client.rank)}

    def reply(self, turn: Turn, plan: Plan, trained: State) -> tuple[State, State]:
        return {"adapter": trained["adapter"]}, {}

    def payload(self, initial: Adapter, client: ClientInfo, round: int) -> State:
        return {"adapter": at_rank(initial, client.rank)}

    def contribution(self, server: State, update: Update, round: int) -> Adapter:
        return update.state["adapter"]
