"""Fed-SB: fix both factors, train and average the small matrix between them.

Singhal, Ponkshe, Vartak, Varshney and Vepakomma, "Fed-SB: A Silver Bullet for Extreme Communication
Efficiency and Performance in (Private) Federated LoRA Fine-Tuning", 2025,
https://arxiv.org/abs/2502.15436. The change of a module is B R A; clients send R alone, r x r
numbers however large the module is and however many clients there are.

Departures. The paper takes B, A and R from the truncated SVD of a first full gradient step; a round
here trains an adapter and cannot ask for a gradient. In its place come `warmup` ordinary rounds
that train B and A in turn, which average exactly; then U S V^T = svd(B A) gives B <- U, R <- S and
A <- V^T, the same model. The model's scaling alpha / r stays, where the paper has 1: under AdamW it
is a factor of the learning rate, which must be tuned for R anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from fedtune.adapter import Adapter, State
from fedtune.combine import Combine
from fedtune.cores import BLOCKS, folded
from fedtune.errors import RecipeError
from fedtune.lowrank import Product, products, svd, with_products
from fedtune.strategies.cored import Cored
from fedtune.strategies.rolora import RoLoRA
from fedtune.strategies.strategy import ClientInfo, Plan, Strategy, Turn, Update


@dataclass(frozen=True)
class FedSB(Cored):
    """RoLoRA's rounds at first, then the core.

    Attributes:
        warmup: ordinary rounds, B first; B and A move once each in two.
    """

    warmup: int = 2

    def __post_init__(self) -> None:
        """Refuse a start without directions."""
        if self.warmup < 1:
            raise RecipeError(
                f"strategy fed_sb: warmup = {self.warmup} must be at least 1: its factors come "
                "from what was learnt until then."
            )

    @property
    def rounds_before(self) -> int:
        return self.warmup

    def blocks(self, initial: Adapter) -> Adapter:
        return {
            module + BLOCKS: product.A.new_zeros(1, len(product.A), len(product.A))
            for module, product in products(initial)
        }

    def trains(self, name: str, round: int) -> bool:
        return round <= self.warmup and RoLoRA().trains(name, round)

    def broadcast(self, server: State, client: ClientInfo, round: int) -> State:
        server = self._framed(server, round - 1)
        if "core" not in server:
            return Strategy.broadcast(self, server, client, round)
        return super().broadcast(server, client, round)

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        server = self._framed(server, round - 1)
        if "core" in server:
            return super().aggregate(server, updates, combine, round)
        return self._framed(Strategy.aggregate(self, server, updates, combine, round), round)

    def _framed(self, server: State, after: int) -> State:
        """The state with its frame, once round `after` ends the warm-up.

        The coordinator's state after a round without replies is the one before it, so that a later
        step may have to do what the last round of the warm-up did not.
        """
        if "core" in server or after < self.warmup:
            return server
        core: Adapter = {}

        def turned(module: str, product: Product) -> Product:
            rank, like = len(product.A), product.A
            u, s, vt = svd(product)
            missing = rank - len(s)
            core[module + BLOCKS] = torch.diag(pad(s, (0, missing))).unsqueeze(0).to(like.dtype)
            return Product(pad(u, (0, missing)), pad(vt, (0, 0, 0, missing)))

        frame = with_products(server["adapter"], turned)
        return {**server, "frame": frame, "core": core, "adapter": folded(frame, core)}

    def plan(self, turn: Turn) -> Plan:
        return super().plan(turn) if "core" in turn.received else Strategy.plan(self, turn)

    def reply(self, turn: Turn, plan: Plan, trained: State) -> tuple[State, State]:
        if "core" in turn.received:
            return super().reply(turn, plan, trained)
        return Strategy.reply(self, turn, plan, trained)

    def payload(self, initial: Adapter, client: ClientInfo, round: int) -> State:
        if round > self.warmup:
            return super().payload(initial, client, round)
        return Strategy.payload(self, initial, client, round)

    def contribution(self, server: State, update: Update, round: int) -> Adapter | None:
        server = self._framed(server, round - 1)
        if "core" in server:
            return super().contribution(server, update, round)
        return Strategy.contribution(self, server, update, round)
