"""RAVAN: several heads with fixed factors, of which a small matrix each is trained and averaged.

Raje, Askin, Jhunjhunwala and Joshi, "Ravan: Multi-Head Low-Rank Adaptation for Federated
Fine-Tuning", NeurIPS 2025, https://arxiv.org/abs/2506.05568. The change of a module is
sum_h s_h B_h H_h A_h with B_h and A_h fixed and orthonormal, H_h zero at first and s_h one. Clients
train H_h and s_h and send s_h H_h, whose average is exact; then s_h is one again.

A head's rank is by default such that all blocks of a module hold about as many numbers as its LoRA
factors of the recipe's rank: the same traffic, and heads x rank ranks instead of the recipe's.
Departures: every client trains every head (the paper lets weak clients choose some), and the
model's scaling alpha / r stays.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.adapter import Adapter, State, digest
from fedtune.cores import BLOCKS, SCALES, folded
from fedtune.errors import RecipeError
from fedtune.lowrank import Product, products
from fedtune.seeds import generator
from fedtune.strategies.cored import Cored
from fedtune.strategies.strategy import Plan, Turn


@dataclass(frozen=True)
class Ravan(Cored):
    """The core is diag(s_1 H_1, ..., s_h H_h).

    Attributes:
        heads: of every module.
        rank: of a head; 0 makes the blocks about as large as the recipe's factors.
    """

    heads: int = 4
    rank: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no number of heads or ranks."""
        if self.heads < 1 or self.rank < 0:
            raise RecipeError(
                f"strategy ravan: heads = {self.heads} must be at least 1 and rank = {self.rank} "
                "at least 0."
            )

    def start(self, initial: Adapter) -> State:
        draws = generator(_key(initial), "ravan")
        frame: Adapter = {}
        for module, product in products(initial):
            ranks = self.heads * self._rank(product)
            a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
            frame[a] = _orthonormal(ranks, product.A.shape[1], draws).to(initial[a])
            frame[b] = _orthonormal(ranks, product.B.shape[0], draws).T.contiguous().to(initial[b])
        core = self.blocks(initial)
        return {"adapter": folded(frame, core), "frame": frame, "core": core}

    def blocks(self, initial: Adapter) -> Adapter:
        shapes = {module: self._rank(product) for module, product in products(initial)}
        return {
            module + BLOCKS: product.A.new_zeros(self.heads, shapes[module], shapes[module])
            for module, product in products(initial)
        }

    def plan(self, turn: Turn) -> Plan:
        plan = super().plan(turn)
        core = dict(plan.start["core"])
        for name, blocks in plan.start["core"].items():
            core[name.replace(BLOCKS, SCALES)] = blocks.new_ones(len(blocks))
        return Plan({**plan.start, "core": core}, frozenset(core))

    def _rank(self, product: Product) -> int:
        """Of a head: h k^2 = r (m + n), and no more ranks than the module has."""
        sizes = product.B.shape[0], product.A.shape[1]
        wanted = self.rank or math.isqrt(len(product.A) * sum(sizes) // self.heads)
        return max(1, min(wanted, min(sizes) // self.heads))


def _key(initial: Adapter) -> str:
    """What the frame is drawn from: the run's first adapter, whose values a forecast has not."""
    return "" if any(t.is_meta for t in initial.values()) else digest({"adapter": initial})


def _orthonormal(count: int, length: int, draws: torch.Generator) -> Tensor:
    """`count` rows, orthonormal in groups of at most `length` consecutive ones, in float64."""
    groups = []
    while count > 0:
        size = min(count, length)
        drawn = torch.randn(length, size, generator=draws, dtype=torch.float64)
        groups.append(torch.linalg.qr(drawn)[0].T)
        count -= size
    return torch.cat(groups)
