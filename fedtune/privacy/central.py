"""The noisy sum of a cohort at a coordinator that is trusted with single changes (client mode).

    S = sum_k clip(delta_k) + N(0, (z C)^2 I),   mean = S / (q N)

The denominator is the cohort's expected size, never the number of replies, which would tell who
took part and unbound what one client can do. An empty cohort gives noise alone. Noise is added
before the strategy or a server optimizer sees anything, so their state is made of noised numbers.

With a moving clip the share of clients within it, noised too, moves it towards a quantile of the
norms: C <- C exp(-eta (b - gamma)). Andrew, Thakkar, McMahan, Ramaswamy 2021, "Differentially
Private Learning with Adaptive Clipping", https://arxiv.org/abs/1905.03871, algorithm 1, theorem 1.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.adapter import Adapter, State, digest
from fedtune.config import PrivacySettings
from fedtune.privacy import noise
from fedtune.privacy.clipping import BOUND, clipped
from fedtune.privacy.mechanism import Mechanism
from fedtune.strategies.strategy import Update

COHORT = "cohort"  # who an update of all is from
COUNT_SHARE = 20  # the count's noise is a twentieth of the cohort (Andrew et al., section 4)


@dataclass(frozen=True)
class Release:
    """One noisy mean.

    Attributes:
        update: the mean, as one client's reply of weight 1.
        clip: that of the next round.
        sigma: the noise on the sum.
        grid: on which sums lie.
        noise_norm: expected norm of the noise in the mean: sigma sqrt(d) / denominator.
        signal_norm: of the released mean.
    """

    update: Update
    clip: float
    sigma: float
    grid: float
    noise_norm: float
    signal_norm: float


def split(mechanism: Mechanism, quantile: float) -> tuple[float, float]:
    """The noise multipliers (of the sum, of the count's standard deviation) that cost z together.

    z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2); sigma_b grows with z, so that the sum keeps most.
    """
    z = mechanism.noise
    if not quantile:
        return z, 0.0
    sigma_b = max(mechanism.denominator / COUNT_SHARE, z)
    return (z**-2 - (2 * sigma_b) ** -2) ** -0.5, sigma_b


def inputs_hash(updates: Sequence[Update], *context: str) -> str:
    """SHA-256 over clients and what they sent, in the order of their names."""
    sha = hashlib.sha256()
    for part in context:
        sha.update(f"{len(part)}:{part}".encode())
    for update in sorted(updates, key=lambda u: u.client):
        sha.update(f"{len(update.client)}:{update.client}:{digest(update.state)}".encode())
    return sha.hexdigest()


def release(
    updates: Sequence[Update],
    schema: State,
    mechanism: Mechanism,
    settings: PrivacySettings,
    clip: float,
    key: bytes,
    *context: bytes | int | str,
) -> Release:
    """The noisy mean of the updates, which may be none.

    Args:
        updates: what clients sent, "bound" included where the clip moves.
        schema: tensors of the names, shapes and dtypes that each of them sends.
        mechanism: the noise relative to the clip, and the denominator.
        settings: of the recipe.
        clip: C of this round.
        key: the run's secret.
        context: run, round and the inputs' hash.
    """
    multiplier, sigma_b = split(mechanism, settings.clip_quantile)
    sigma = multiplier * clip
    groups = {group: tensors for group, tensors in schema.items() if group != BOUND}
    sums = _summed(updates, groups, clip)
    mean: State = {}
    for group, tensors in groups.items():
        noisy = noise.noisy(sums[group], key, sigma, *context, "sum", group)
        mean[group] = {
            name: (noisy[name] / mechanism.denominator).to(t.dtype) for name, t in tensors.items()
        }
    after = clip
    if settings.clip_quantile:
        counted = sum((u.state[BOUND][BOUND].double() for u in updates), torch.zeros(1).double())
        noisy_count = noise.noisy({BOUND: counted}, key, sigma_b, *context, "count")[BOUND]
        after = _moved(clip, float(noisy_count) / mechanism.denominator + 0.5, settings)
    size = sum(t.numel() for tensors in groups.values() for t in tensors.values())
    signal = math.sqrt(
        sum(float(t.double().square().sum()) for g in mean.values() for t in g.values())
    )
    return Release(
        Update(COHORT, 1.0, mean),
        after,
        sigma,
        noise.grid_of(sigma),
        sigma * math.sqrt(size) / mechanism.denominator,
        signal,
    )


def _summed(updates: Sequence[Update], groups: State, clip: float) -> dict[str, dict[str, Tensor]]:
    """The sum in float64, each update held to the clip whatever it claims of itself."""
    sums: dict[str, Adapter] = {
        group: {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in tensors.items()}
        for group, tensors in groups.items()
    }
    for update in sorted(updates, key=lambda u: u.client):
        own, _ = clipped({group: update.state[group] for group in groups}, clip)
        for group, tensors in own.items():
            for name, tensor in tensors.items():
                sums[group][name].add_(tensor.double())
    return sums


def _moved(clip: float, share: float, settings: PrivacySettings) -> float:
    """C exp(-eta (b - gamma)): fewer clients within the clip than wanted raise it."""
    share = min(1.0, max(0.0, share))
    return clip * math.exp(-settings.clip_rate * (share - settings.clip_quantile))
