"""FLoRA of which only sums are seen: what joins the base comes from sketches.

Wang et al. 2024, https://arxiv.org/abs/2409.05976, see flora.py; sketches: sketched.py. All clients
have the adapter's own rank: behind masks only equal tensors add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.adapter import State
from fedtune.combine import Combine
from fedtune.lowrank import added, named
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
        mean = named(self.mean(server, updates, combine, round), server["adapter"])
        base = added(server.get("base", {}), mean)
        return {**server, "adapter": afresh(server["adapter"], round), "base": base}
