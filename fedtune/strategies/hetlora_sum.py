"""HetLoRA as one weighted sum: no update needs to be seen by itself.

A client sends v_i A_i and v_i B_i, padded with zeros to the largest rank, and v_i = |B_i A_i|, and
the coordinator divides the first sum by the second: HetLoRA's mean (Cho et al. 2024,
https://arxiv.org/abs/2401.06432, see hetlora.py), which secure aggregation can hand over. What it
costs: everybody sends the largest rank, a client's own rank stays with the client, and ranks that
nobody of a round has become zero, since the coordinator cannot know that they are padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedtune.adapter import Adapter, State, at_rank, rank_of
from fedtune.combine import Combine
from fedtune.lowrank import product_norm
from fedtune.strategies.hetlora import pruned, require, with_tail
from fedtune.strategies.strategy import ClientInfo, Plan, Strategy, Turn, Update


@dataclass(frozen=True)
class HetLoRASum(Strategy):
    """HetLoRA, its weights multiplied in by the clients.

    Attributes:
        keep: the share of its ranks that a client keeps when it prunes; 1 never prunes.
        penalty: of the ranks that it would prune.
    """

    sends: ClassVar[Literal["delta", "adapter"]] = "adapter"
    admits_dora: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = True
    keep: float = 0.99
    penalty: float = 0.001

    def __post_init__(self) -> None:
        """Refuse what is no share and what would reward a tail."""
        require(self.keep, self.penalty)

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        weights = [update.weight for update in updates]
        mean = combine([update.state["adapter"] for update in updates], weights)
        norm = combine([update.state["norm"] for update in updates], weights)["norm"]
        if not norm > 0:  # nothing was learnt
            return server
        return {**server, "adapter": {n: (t / norm).to(t.dtype) for n, t in mean.items()}}

    def plan(self, turn: Turn) -> Plan:
        own = turn.personal.get("rank")
        rank = turn.rank if own is None else int(own["rank"])
        plan = super().plan(turn)
        cropped = {"adapter": at_rank(plan.start["adapter"], rank)}
        return with_tail(Plan(cropped, plan.trainable), self.keep, self.penalty)

    def reply(self, turn: Turn, plan: Plan, trained: State) -> tuple[State, State]:
        after = pruned(plan, trained["adapter"])
        norm = product_norm(after)
        padded = at_rank(after, rank_of(turn.received["adapter"]))
        sent = {n: (t.double() * norm).to(t.dtype) for n, t in padded.items()}
        own = {"rank": torch.tensor([float(rank_of(after))])}
        return {"adapter": sent, "norm": {"norm": torch.tensor([norm], dtype=torch.float64)}}, {
            "rank": own
        }

    def payload(self, initial: Adapter, client: ClientInfo, round: int) -> State:
        return {"adapter": initial, "norm": {"norm": torch.zeros(1, dtype=torch.float64)}}

    def contribution(self, server: State, update: Update, round: int) -> Adapter:
        norm = update.state["norm"]["norm"].clamp(min=1e-300)
        return {n: (t.double() / norm).to(t.dtype) for n, t in update.state["adapter"].items()}
