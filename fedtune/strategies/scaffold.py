"""SCAFFOLD: correct each client's gradients by how much they differ from everybody's.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
https://arxiv.org/abs/1910.06378, algorithm 1 with option II. Symbols: x the global adapter, y_i a
client's after its steps, c and c_i the control variates of all and of one client, S steps at the
rate eta, N clients in the population. The formula of c_i assumes SGD; with AdamW it is a heuristic.
The mean of y has the recipe's weights and that of the variates none: corrections cancel in the mean
with weighting = "uniform", the paper's, only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedtune.adapter import Adapter, State, add, pick, subtract, weighted_mean
from fedtune.combine import Combine
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.strategies.strategy import ClientInfo, Plan, Strategy, Turn, Update


@dataclass(frozen=True)
class Scaffold(Strategy):
    """y <- y - eta (g - c_i + c), and the mean of y; c_i <- c_i - c + (x - y) / (S eta).

    Attributes:
        population: N; 0 where all clients take part in every round.
    """

    one_sum: ClassVar[bool] = False

    population: int = 0

    def start(self, initial: Adapter) -> State:
        return {"adapter": initial, "control": _zeros(initial)}

    def broadcast(self, server: State, client: ClientInfo, round: int) -> State:
        return {"adapter": server["adapter"], "control": server["control"]}

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        after = super().aggregate(server, updates, combine, round)
        clients = sum(len(update.clients) for update in updates)
        share = clients / (self.population or clients)
        mean = weighted_mean([u.state["control"] for u in updates], [1.0] * len(updates))
        moved = {name: tensor * share for name, tensor in mean.items()}
        return {**after, "control": add(server["control"], moved)}

    def plan(self, turn: Turn) -> Plan:
        plan = super().plan(turn)
        c = turn.received["control"]
        correction = subtract(c, turn.personal.get("control", _zeros(c)))
        return Plan(plan.start, plan.trainable, correction=pick(correction, plan.trainable))

    def reply(self, turn: Turn, plan: Plan, trained: State) -> tuple[State, State]:
        sent, _ = super().reply(turn, plan, trained)
        c = turn.received["control"]
        own = turn.personal.get("control", _zeros(c))
        after = {
            name: own[name] - c[name] - change / turn.rates_sum
            for name, change in sent["delta"].items()
        }
        return {**sent, "control": subtract(after, own)}, {"control": after}

    def payload(self, initial: Adapter, client: ClientInfo, round: int) -> State:
        return {"delta": initial, "control": initial}

    def check(self, experiment: Experiment) -> None:
        if experiment.cohort != "all" and not self.population:
            raise RecipeError(
                f"strategy = 'scaffold' with cohort = '{experiment.cohort}' must know how many "
                "clients there are. Set strategy = 'scaffold(population=100)', or cohort = 'all'."
            )
        if experiment.secure_aggregation != "none" and experiment.weighting != "uniform":
            raise RecipeError(
                "strategy = 'scaffold' weighs control variates alike and updates by "
                f"weighting = '{experiment.weighting}', but secure_aggregation = "
                f"'{experiment.secure_aggregation}' has one weight for all that a client sends. "
                "Set weighting = 'uniform'."
            )


def _zeros(adapter: Adapter) -> Adapter:
    return {name: torch.zeros_like(tensor) for name, tensor in adapter.items()}
