"""FLoRA of which only sums are seen: what joins the base comes from sketches.

Wang et al. 2024, https://arxiv.org/abs/2409.05976, see flora.py; sketches: sketched.py. All clients
have the adapter's own rank: behind masks only equal tensors add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedtune.adapter import Adapter, State
from fedtune.combine import Combine
from fedtune.lowrank import Product, added, named, split, svd
from fedtune.strategies.flora import afresh
from fedtune.strategies.sketched import Sketched
from fedtune.strategies.strategy import Update


@dataclass(frozen=True)
class FLoRASum(Sketched):
    """The mean of the products joins the base every round; clients send sketches of theirs."""

    changes_base: ClassVar[bool] = True

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        start = server["adapter"]
        means = self.mean(server, updates, combine, round)
        whole = {module: _without_rounding(m, start) for module, m in means.items()}
        base = added(server.get("base", {}), named(whole, start))
        return {**server, "adapter": afresh(start, round), "base": base}


def _without_rounding(mean: Product, like: Adapter) -> Product:
    """The mean without the ranks of a wide sketch that hold what the numbers sent were rounded by.

    They would travel with the base, and be others on every machine.
    """
    u, s, vt = svd(mean)
    rounding = len(s) * torch.finfo(next(iter(like.values())).dtype).eps * s[0]
    return split(u, s, vt, max(1, int((s > rounding).sum())), balanced=True)
