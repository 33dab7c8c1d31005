"""The noisy sum of a cohort of which nobody sees a part (mode client-distributed).

    S = sum over the survivors k of clip(delta_k) + share_k,   mean = S / (expected size)

Each share is a Skellam number in every coordinate, such that those clients who must stay to the end
of a round make the promised noise; the more of the others stay, the more there is. The sum comes
out of secure aggregation, so the coordinator never holds it without noise.

Agarwal, Kairouz and Liu, NeurIPS 2021, https://arxiv.org/abs/2110.04995, section 4.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedtune.privacy import skellam
from fedtune.privacy.mechanism import Mechanism
from fedtune.privacy.secure import Noised
from fedtune.strategies.strategy import Update


@dataclass(frozen=True)
class Shares:
    """What the noise of one sum is made of; it stands in the ledger.

    Attributes:
        needed: clients without whom there is no sum; their shares alone keep the promise.
        mean: of both Poisson numbers of a share.
        steps: of the grid, in the clip.
    """

    needed: int
    mean: int
    steps: int

    @classmethod
    def of(cls, settings: Noised, cohort: int) -> "Shares":
        """Those of a cohort of so many."""
        grid = settings.grid(cohort, "uniform")
        return cls(grid.needed, grid.share, grid.steps)

    def sigma(self, clients: int, clip: float) -> float:
        """The standard deviation of the noise of so many shares."""
        return math.sqrt(2 * self.mean * clients) * clip / self.steps

    def lacking(self, promised: Mechanism, clients: int) -> str:
        """Why the promise does not hold for a sum of so many clients, "" where it does."""
        if clients < self.needed:
            return f"a sum of {clients} clients, where {self.needed} must stay"
        least = (promised.noise * self.steps) ** 2
        if self.steps < skellam.LEAST_STEPS or 2 * self.mean * self.needed < least:
            return "shares that make less noise than it began with"
        return ""


@dataclass(frozen=True)
class Release:
    """One noisy mean.

    Attributes:
        update: the mean, over the cohort's expected size.
        sigma: the noise on the sum, with all who stayed.
        noise_norm: expected norm of the noise in the mean.
        released_norm: of the mean.
    """

    update: Update
    sigma: float
    noise_norm: float
    released_norm: float


def release(update: Update, shares: Shares, promised: Mechanism) -> Release:
    """The mean of the survivors over the expected number, and the noise in it."""
    ratio = len(update.clients) / promised.denominator
    state = {
        group: {name: (tensor.double() * ratio).to(tensor.dtype) for name, tensor in named.items()}
        for group, named in update.state.items()
    }
    tensors = [tensor for named in state.values() for tensor in named.values()]
    size = sum(tensor.numel() for tensor in tensors)
    sigma = shares.sigma(len(update.clients), promised.clip)
    return Release(
        replace(update, state=state),
        sigma,
        sigma * math.sqrt(size) / promised.denominator,
        math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors)),
    )


def lacking(line: Mapping[str, Any], promised: Mechanism) -> str:
    """Why a ledger's line of a release breaks the promise, "" where it keeps it."""
    return Shares(**line["shares"]).lacking(promised, len(line["clients"]))
