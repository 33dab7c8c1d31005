"""FedALT: every client goes on with its own adapter, beside the mean of all others'.

Bian, Wang, Zhang and Xu, "FedALT: Federated Fine-Tuning through Adaptive Local Training with
Rest-of-World LoRA", AAAI 2026, https://arxiv.org/abs/2503.11880. A client's own adapter is never
overwritten. What the others learnt is frozen beside it, as the mean of their adapters:
RoW_k = (mean - p_k own_k) / (1 - p_k), which a client computes from the mean of all, its own
adapter, and its share p_k of the mean (the paper has equal shares 1 / K).

Departure. The paper mixes the two by a softmax of a linear map of each layer's input. Here every
module has two learnt numbers, 1/2 each at first, which need not add up to one and are the same for
every row; they are private.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedtune.adapter import Adapter, State
from fedtune.combine import Combine
from fedtune.strategies.paired import apart, beside, mixed, only
from fedtune.strategies.strategy import ClientInfo, Plan, Strategy, Turn, Update


@dataclass(frozen=True)
class FedALT(Strategy):
    """Own adapters are sent whole; the coordinator keeps their mean, and who has which share in it.

    A client that is new begins from the mean.
    """

    sends: ClassVar[Literal["delta", "adapter"]] = "adapter"
    personal: ClassVar[bool] = True
    admits_dora: ClassVar[bool] = False
    # Whose share is how large must be known beside the sum.
    sums_only: ClassVar[bool] = False

    def broadcast(self, server: State, client: ClientInfo, round: int) -> State:
        shares = server.get("shares")
        none = torch.zeros(1, dtype=torch.float64)
        # Before the first mean there is no rest of the world, as if all of it were one's own.
        share = none + 1 if shares is None else shares.get(client.name, none)
        if shares is not None and not client.last_round:
            share = none
        return {"adapter": server["adapter"], "share": {"own": share}}

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        weights = [update.weight for update in updates]
        mean = combine([update.state["adapter"] for update in updates], weights)
        shares = {
            update.client: torch.tensor([update.weight / sum(weights)], dtype=torch.float64)
            for update in updates
        }
        return {**server, "adapter": mean, "shares": shares}

    def plan(self, turn: Turn) -> Plan:
        mean, share = turn.received["adapter"], float(turn.received["share"]["own"])
        if 0 < share < 1 and "own" not in turn.personal:
            raise ValueError("this client's own adapter is gone; it cannot continue its run")
        own = turn.personal.get("own", mean)
        both = beside(own, rest_of_world(mean, own, share))
        core = turn.personal.get("core") or mixed(own, 0.5, 0.5)
        names = frozenset(both) | frozenset(core)
        return Plan({"adapter": both, "core": core}, names, mask=only(both, own, 0))

    def reply(self, turn: Turn, plan: Plan, trained: State) -> tuple[State, State]:
        own, _ = apart(trained["adapter"], turn.received["adapter"])
        return {"adapter": own}, {"own": own, "core": trained["core"]}

    def payload(self, initial: Adapter, client: ClientInfo, round: int) -> State:
        return {"adapter": initial}


def rest_of_world(mean: Adapter, own: Adapter, share: float) -> Adapter:
    """The mean of the others, from that of all, in which `own` has a share; zeros for share 1."""
    if share == 1:
        return {name: torch.zeros_like(tensor) for name, tensor in mean.items()}
    return {
        name: ((tensor.double() - share * own[name].double()) / (1 - share)).to(tensor.dtype)
        for name, tensor in mean.items()
    }
