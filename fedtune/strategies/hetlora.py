"""HetLoRA: clients of different ranks, which they prune themselves; zeros pad a weighted mean.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP
2024, https://arxiv.org/abs/2401.06432. A client has the first r_i ranks of the global factors and
adds lambda |B[:, g r_i:]| |A[g r_i:, :]| to its loss; if that product of norms shrank, r_i <- g
r_i. Factors are padded with zeros and averaged with the weights |B_i A_i|, the norms of the
clients' changes.

Departures: the weights are multiplied by the recipe's (weighting = 'uniform' gives the paper's), so
that equal norms and ranks are FedIT; the norm is that of all modules together, one weight a client;
ranks that no client of a round has stay as they were, since zeros in both factors would never learn
again. g r_i is rounded down, so that below rank 100 a whole rank goes at a time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedtune.adapter import Adapter, State, at_rank, rank_axis, rank_of, weighted_mean
from fedtune.combine import Combine
from fedtune.errors import RecipeError
from fedtune.lowrank import product_norm, products
from fedtune.strategies.factored import Factored
from fedtune.strategies.strategy import ClientInfo, Plan, Turn, Update


@dataclass(frozen=True)
class HetLoRA(Factored):
    """Every client at its own rank, which never grows.

    The coordinator keeps the ranks, in the group "ranks": a client learns its own from what it is
    sent, and tells in the group "rank" that it pruned.

    Attributes:
        keep: g, the share of its ranks that a client keeps when it prunes; 1 never prunes.
        penalty: lambda.
    """

    keep: float = 0.99
    penalty: float = 0.001

    def __post_init__(self) -> None:
        """Refuse what is no share and what would reward a tail."""
        require(self.keep, self.penalty)

    def client_rank(self, server: State, client: ClientInfo) -> int:
        own = server.get("ranks", {}).get(client.name)
        return client.rank if own is None else int(own)

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        adapters = [update.state["adapter"] for update in updates]
        sizes = [rank_of(adapter) for adapter in adapters]
        ranks = {
            update.client: torch.tensor(
                [float(min(max(int(update.state["rank"]["rank"]), 1), size))]
            )
            for update, size in zip(updates, sizes, strict=True)
        }
        after = {**server, "ranks": {**server.get("ranks", {}), **ranks}}
        weights = [u.weight * product_norm(a) for u, a in zip(updates, adapters, strict=True)]
        if not any(weights):  # nothing was learnt
            return after
        mean = weighted_mean([at_rank(adapter, max(sizes)) for adapter in adapters], weights)
        return {**after, "adapter": _over(server["adapter"], mean)}

    def plan(self, turn: Turn) -> Plan:
        return with_tail(super().plan(turn), self.keep, self.penalty)

    def reply(self, turn: Turn, plan: Plan, trained: State) -> tuple[State, State]:
        rank = rank_of(plan.start["adapter"])
        after = pruned(plan, trained["adapter"])
        # Of the old size once more: the coordinator learns of the new one with this reply.
        told = {"rank": torch.tensor([float(rank_of(after))])}
        return {"adapter": at_rank(after, rank), "rank": told}, {}

    def payload(self, initial: Adapter, client: ClientInfo, round: int) -> State:
        return {"adapter": at_rank(initial, client.rank), "rank": {"rank": torch.zeros(1)}}


def require(keep: float, penalty: float) -> None:
    """Refuse parameters outside their range.

    Raises:
        RecipeError: with the parameter and its range.
    """
    if not 0 < keep <= 1:
        raise RecipeError(f"strategy hetlora: keep = {keep} must be in (0, 1].")
    if not 0 <= penalty < math.inf:
        raise RecipeError(f"strategy hetlora: penalty = {penalty} must be at least 0 and finite.")


def with_tail(plan: Plan, keep: float, penalty: float) -> Plan:
    """The plan with a penalty on the ranks that pruning would take; one rank always stays."""
    rank = rank_of(plan.start["adapter"])
    tail = max(1, math.floor(keep * rank))
    return replace(plan, penalty=penalty if tail < rank else 0.0, tail=tail)


def pruned(plan: Plan, trained: Adapter) -> Adapter:
    """What a client trained, without the plan's tail where that shrank."""
    shrank = tail_norm(trained, plan.tail) < tail_norm(plan.start["adapter"], plan.tail)
    return at_rank(trained, plan.tail) if shrank else trained


def tail_norm(adapter: Adapter, tail: int) -> float:
    """The sum over modules of |B[:, tail:]| |A[tail:, :]|."""
    parts = [(p.B[:, tail:].double(), p.A[tail:].double()) for _, p in products(adapter)]
    return sum(float(b.norm() * a.norm()) for b, a in parts)


def _over(whole: Adapter, first: Adapter) -> Adapter:
    """The adapter with its first ranks replaced."""
    joined = {}
    for name, tensor in whole.items():
        axis = rank_axis(name)
        joined[name] = first[name] if axis is None else _end(first[name], tensor, axis)
    return joined


def _end(first: Tensor, tensor: Tensor, axis: int) -> Tensor:
    count = first.shape[axis]
    return torch.cat([first, tensor.narrow(axis, count, tensor.shape[axis] - count)], dim=axis)
