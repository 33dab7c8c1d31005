"""FLoRA: stack the clients' factors into the base, and begin afresh.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024, https://arxiv.org/abs/2409.05976. The stack [p_1 B_1 ...] [A_1; ...] is
the mean of the products, exactly; clients may have different ranks. FLoRIST, Ramesh and Dass 2025,
https://arxiv.org/abs/2506.09199, keeps of it what `energy` says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedtune.adapter import Adapter, State, digest, rank_axis
from fedtune.combine import Combine
from fedtune.errors import RecipeError
from fedtune.lowrank import added, keep_energy, mean_product
from fedtune.seeds import generator
from fedtune.strategies.factored import Factored
from fedtune.strategies.strategy import Update


@dataclass(frozen=True)
class FLoRA(Factored):
    """The mean of the products joins the base every round; each round has a new adapter.

    Attributes:
        energy: the share of the squared singular values that joins the base, module by module; 1
            is all of it (FLoRA), less is FLoRIST.
    """

    changes_base: ClassVar[bool] = True
    fixed_frame: ClassVar[bool] = False
    energy: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 < self.energy <= 1:
            raise RecipeError(f"strategy flora: energy = {self.energy} must be in (0, 1].")

    def aggregate(
        self, server: State, updates: Sequence[Update], combine: Combine, round: int
    ) -> State:
        mean = mean_product([u.state["adapter"] for u in updates], [u.weight for u in updates])
        if self.energy < 1:
            mean = keep_energy(mean, self.energy)
        base = added(server.get("base", {}), mean)
        return {**server, "adapter": afresh(server["adapter"], round), "base": base}


def afresh(adapter: Adapter, round: int) -> Adapter:
    """B = 0 and A as LoRA draws it, uniform up to 1 / sqrt(d_in), new in every round.

    The first A again would keep all rounds in its row space. Each tensor has draws of its own: one
    that was read from a checkpoint has another order of names.
    """
    last = digest({"adapter": adapter})
    fresh = {}
    for name, tensor in adapter.items():
        values = torch.zeros_like(tensor)
        if rank_axis(name) == 0:
            draws = generator(last, "afresh", name, round)
            values.uniform_(-1, 1, generator=draws).div_(tensor.shape[1] ** 0.5)
        fresh[name] = values
    return fresh
