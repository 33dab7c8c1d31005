"""The oracle: the mean of the clients' products itself, in full precision.

A reference for aggregation: clients train as in FedIT, from the averaged factors, and whatever the
averages leave out of the dense mean is put into the base. What a method loses against it, it loses
by how it joins clients; what it gains, it gains by something else. Everything is dense and float64
at the coordinator and the base travels up to the size of the frozen weights, so it is for
simulations. A client of fewer ranks trains the first of the adapter's, on a base that holds the
others: everybody begins from the same model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.adapter import Adapter, State, at_rank, rank_of
from fedtune.combine import Combine
from fedtune.lowrank import Product, added, named, principal, products
from fedtune.strategies.strategy import ClientInfo, Strategy, Update, ended


@dataclass(frozen=True)
class Oracle(Strategy):
    """FedIT without aggregation error, whatever it costs."""

    admits_dora: ClassVar[bool] = False
    changes_base: ClassVar[bool] = True
    sums_only: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = True

    def broadcast(self, server: State, client: ClientInfo, round: int) -> State:
        sent = super().broadcast(server, client, round)
        rank = client.rank
        if not 0 < rank < rank_of(sent["adapter"]):
            return sent
        others = {
            module: Product(own.B[:, rank:].double(), own.A[rank:].double())
            for module, own in products(sent["adapter"])
        }
        like = {name: tensor.double() for name, tensor in sent["adapter"].items()}
        base = added(sent.get("base", {}), named(others, like))
        return {"adapter": at_rank(sent["adapter"], rank), "base": base}

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        rank = rank_of(server["adapter"])
        whole = [replace(u, state={"delta": at_rank(u.state["delta"], rank)}) for u in updates]
        after = super().aggregate(server, whole, combine, round)
        clients = [dict(products(ended(server, update))) for update in whole]
        total = sum(update.weight for update in updates)
        before, base = dict(products(server.get("base", {}))), {}
        for module, mean in products(after["adapter"]):
            ideal = torch.zeros(len(mean.B), mean.A.shape[1], dtype=torch.float64)
            for update, own in zip(updates, clients, strict=True):
                ideal += update.weight / total * own[module].dense()
            if module in before:
                ideal += before[module].dense()
            left = _factors(ideal - mean.dense(), float(ideal.norm()))
            if len(left.A):
                base[module] = left
        like = {name: tensor.double() for name, tensor in after["adapter"].items()}
        rest = {group: tensors for group, tensors in after.items() if group != "base"}
        return {**rest, "base": named(base, like)} if base else rest

    def payload(self, initial: Adapter, client: ClientInfo, round: int) -> State:
        return {"delta": at_rank(initial, client.rank)}

    def contribution(self, server: State, update: Update, round: int) -> Adapter:
        whole = at_rank(update.state["delta"], rank_of(server["adapter"]))
        return ended(server, replace(update, state={"delta": whole}))


def _factors(matrix: Tensor, scale: float) -> Product:
    """The matrix as two factors, without what is rounding beside `scale`."""
    whole = principal(matrix, min(matrix.shape))
    singular = whole.B.square().sum(dim=0)
    least = max(matrix.shape) * torch.finfo(matrix.dtype).eps * scale
    rank = int((singular > least).sum())
    return Product(whole.B[:, :rank], whole.A[:rank])
