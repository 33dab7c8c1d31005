"""Rounds without a network over drawn cohorts: what the tests of identities have in common."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from fedtune.adapter import Adapter, State, at_rank
from fedtune.combine import Mean
from fedtune.components import build
from fedtune.cores import folded
from fedtune.lowrank import products
from fedtune.seeds import generator
from fedtune.strategies import STRATEGIES
from fedtune.strategies.strategy import ClientInfo, Plan, Strategy, Turn, Update

EXACT = 1e-10  # relative Frobenius error in float64
Dense = dict[str, Tensor]


@dataclass(frozen=True)
class Cohort:
    """Clients that a test draws.

    Attributes:
        shapes: module -> (d_out, d_in), never square.
        rank: of the global adapter.
        weights: of the clients.
        ranks: of the clients, 0 for the global one.
        seed: of every tensor.
        dtype: of every tensor.
    """

    shapes: dict[str, tuple[int, int]]
    rank: int
    weights: tuple[float, ...]
    ranks: tuple[int, ...]
    seed: int
    dtype: torch.dtype = torch.float64

    def adapter(self, *seed: int | str) -> Adapter:
        """A random adapter of the global rank."""
        draws, drawn = generator(self.seed, *seed), {}
        for module, (d_out, d_in) in self.shapes.items():
            for key, shape in (("A", (self.rank, d_in)), ("B", (d_out, self.rank))):
                values = torch.randn(shape, generator=draws, dtype=torch.float64)
                drawn[f"{module}.lora_{key}.weight"] = values.to(self.dtype)
        return drawn

    def info(self, number: int, last_round: int = 0) -> ClientInfo:
        """What the coordinator knows of a client."""
        return ClientInfo(f"c{number}", 9, last_round, self.ranks[number])

    @property
    def shares(self) -> list[float]:
        """The weights, which then add up to 1."""
        return [weight / sum(self.weights) for weight in self.weights]


@st.composite
def cohorts(draw: st.DrawFn, mixed: bool = False, least: int = 1, most: int = 4) -> Cohort:
    """Two modules that are not square, some clients with weights, of one rank or of mixed ones."""
    sizes = st.tuples(st.integers(1, 7), st.integers(1, 7)).filter(lambda s: s[0] != s[1])
    rank = draw(st.integers(1, 4))
    weights = draw(st.lists(st.floats(0.1, 10.0), min_size=least, max_size=most))
    ranks = st.integers(1, rank) if mixed else st.just(0)
    return Cohort(
        shapes={"q": draw(sizes), "v": draw(sizes)},
        rank=rank,
        weights=tuple(weights),
        ranks=tuple(draw(ranks) for _ in weights),
        seed=draw(st.integers(0, 2**31)),
    )


def strategy_of(text: str) -> Strategy:
    """A strategy as a recipe names it; HetLoRA by its mere name does not prune.

    To prune is to change what was trained, which the promises of all strategies are about.
    """
    text = f"{text}(keep=1.0)" if text in ("hetlora", "hetlora_sum") else text
    return build(text, STRATEGIES, "strategy")


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        number: from 1.
        before: the coordinator's state.
        plans: of the clients.
        trained: their adapters after training.
        updates: what they sent.
        kept: what they have kept to themselves.
        after: the coordinator's state.
    """

    number: int
    before: State
    plans: list[Plan]
    trained: list[Adapter]
    updates: list[Update]
    kept: list[State]
    after: State


def rounds(
    strategy: Strategy, cohort: Cohort, count: int = 2, size: float = 0.3
) -> Iterator[Round]:
    """Rounds in which every client moves its trainable tensors by random steps."""
    server = strategy.start(cohort.adapter("start"))
    kept: list[State] = [{} for _ in cohort.weights]
    for number in range(1, count + 1):
        plans, trained, updates = [], [], []
        for client, weight in enumerate(cohort.weights):
            turn = turn_of(strategy, server, cohort, client, number, number - 1, kept[client])
            plan = strategy.plan(turn)
            end = moved(plan, cohort, size, number, client)
            sent, kept[client] = strategy.reply(turn, plan, end)
            plans.append(plan)
            trained.append(whole(end))
            updates.append(Update(f"c{client}", weight, sent))
        after = strategy.aggregate(server, updates, Mean(), number)
        yield Round(number, server, plans, trained, updates, list(kept), after)
        server = after


def turn_of(
    strategy: Strategy,
    server: State,
    cohort: Cohort,
    client: int,
    round: int,
    last_round: int,
    personal: State,
) -> Turn:
    """What a client has when its round begins, its rank as the coordinator would tell it."""
    dealt = cohort.info(client, last_round)
    info = replace(dealt, rank=strategy.client_rank(server, dealt))
    return Turn(round, strategy.broadcast(server, info, round), personal, rank=info.rank)


def moved(plan: Plan, cohort: Cohort, size: float, *seed: int | str) -> State:
    """What a plan begins from, with random steps on its trainable tensors."""
    start, steps = plan.start["adapter"], cohort.adapter(*seed)
    if set(steps) == set(start):
        rank = next(len(tensor) for name, tensor in start.items() if "lora_A" in name)
        steps = at_rank(steps, rank)

    def step(name: str, tensor: Tensor) -> Tensor:
        draws = generator(cohort.seed, *seed, name)
        own = steps.get(name)
        if own is None or own.shape != tensor.shape:
            own = torch.randn(tensor.shape, generator=draws, dtype=tensor.dtype)
        return size * own * plan.mask.get(name, torch.ones_like(tensor))

    return {
        group: {n: t + step(n, t) if n in plan.trainable else t for n, t in tensors.items()}
        for group, tensors in plan.start.items()
    }


def whole(state: State) -> Adapter:
    """The adapter of what was trained; a core between its factors is multiplied into one."""
    return folded(state["adapter"], state["core"]) if "core" in state else state["adapter"]


def dense(adapter: Adapter) -> Dense:
    """B A of every module."""
    return {module: own.dense() for module, own in products(adapter)}


def effective(state: State) -> Dense:
    """The dense change of the frozen weights: the base's and the adapter's product."""
    own, base = dense(state["adapter"]), dense(state.get("base", {}))
    return {m: matrix + base[m] if m in base else matrix for m, matrix in own.items()}


def ideal(played: Round, cohort: Cohort) -> Dense:
    """The weighted mean of what the clients trained, each on the base that it was sent."""
    ends = [
        effective({"adapter": end, "base": plan.base})
        for plan, end in zip(played.plans, played.trained, strict=True)
    ]
    return {
        module: sum(p * end[module] for p, end in zip(cohort.shares, ends, strict=True))
        for module in cohort.shapes
    }


def error(first: Dense, second: Dense) -> float:
    """The Frobenius norm of the difference over that of the second, 1 at least."""
    away = sum(float((first[m] - second[m]).square().sum()) for m in second) ** 0.5
    return away / max(1.0, sum(float(t.square().sum()) for t in second.values()) ** 0.5)


def rotation(rank: int, *seed: int | str) -> Tensor:
    """A random rotation (rank, rank): orthogonal, no reflection."""
    drawn = torch.randn(rank, rank, generator=generator(*seed), dtype=torch.float64)
    turn = torch.linalg.qr(drawn)[0]
    turn[:, 0] *= torch.linalg.det(turn).sign()
    return turn


def turned(adapter: Adapter, turn: Tensor) -> Adapter:
    """(B R, R^T A): the same change of the weights in other coordinates."""
    return {n: turn.T @ t if "lora_A" in n else t @ turn for n, t in adapter.items()}
