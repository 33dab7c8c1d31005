"""Two adapters side by side, as the ranks of one: a client's own beside what is shared.

B_1 A_1 + B_2 A_2 = [B_1, B_2] [A_1; A_2]. The wider adapter exists on clients only, on the scaling
of the recipe's rank; what is sent has the recipe's ranks.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedtune.adapter import Adapter, State, at_rank, rank_axis, rank_of, subtract
from fedtune.combine import DISTANCES, Family
from fedtune.cores import SCALES
from fedtune.lowrank import products
from fedtune.strategies.flora import afresh
from fedtune.strategies.strategy import Plan, Strategy, Turn


def beside(first: Adapter, second: Adapter) -> Adapter:
    """The sum of both products: the ranks of the first, then those of the second."""
    return {
        name: torch.cat([tensor, second[name]], dim=rank_axis(name) or 0)
        for name, tensor in first.items()
    }


def apart(both: Adapter, first: Adapter) -> tuple[Adapter, Adapter]:
    """The two adapters that lie side by side, the first as wide as `first`."""
    halves: tuple[Adapter, Adapter] = {}, {}
    for name, tensor in both.items():
        axis = rank_axis(name) or 0
        own = first[name].shape[axis]
        parts = torch.split(tensor, [own, tensor.shape[axis] - own], dim=axis)
        for half, part in zip(halves, parts, strict=True):
            half[name] = part.contiguous()
    return halves


def only(both: Adapter, first: Adapter, number: int) -> Adapter:
    """Masks that let train the first (0) or the second (1) of two adapters side by side."""
    masks = {}
    for name, tensor in both.items():
        axis = rank_axis(name) or 0
        mask = torch.full((tensor.shape[axis],), float(number), dtype=tensor.dtype)
        mask[: first[name].shape[axis]] = 1.0 - number
        masks[name] = mask.unsqueeze(1 - axis)
    return masks


def mixed(adapter: Adapter, first: float, second: float) -> Adapter:
    """The core that multiplies the first of two equally wide adapters, and the second."""
    return {
        module + SCALES: product.A.new_tensor([first, second])
        for module, product in products(adapter)
    }


@dataclass(frozen=True)
class Paired(Strategy):
    """The shared adapter is averaged as in FedIT; the private one stays.

    A private adapter begins as LoRA does, with B = 0, and with the same A on all clients that begin
    from one broadcast.
    """

    combines: ClassVar[frozenset[Family]] = DISTANCES
    personal: ClassVar[bool] = True
    admits_dora: ClassVar[bool] = False

    def private_rank(self, shared: int) -> int:
        """Of the private adapter, beside the shared one's."""
        return shared

    def plan(self, turn: Turn) -> Plan:
        shared = turn.received["adapter"]
        own = turn.personal.get("private")
        if own is None:
            own = afresh(at_rank(shared, self.private_rank(rank_of(shared))), 0)
        both = beside(shared, own)
        return Plan({"adapter": both}, frozenset(both))

    def reply(self, turn: Turn, plan: Plan, trained: State) -> tuple[State, State]:
        shared, own = apart(trained["adapter"], turn.received["adapter"])
        change = subtract(shared, turn.received["adapter"])
        sent = {name: t for name, t in change.items() if self.shares(name, turn.round)}
        return {"delta": sent}, {"private": own}
