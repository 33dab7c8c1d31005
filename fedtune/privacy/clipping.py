"""The bound on what one client can change, and what leaves it in the modes client and local.

One flat norm over every tensor that is sent, head included: bounds tensor by tensor would add up to
a larger one that nobody counted.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedtune.adapter import State, digest
from fedtune.config import PrivacySettings
from fedtune.privacy import noise
from fedtune.privacy.mechanism import Mechanism

SLACK = 1e-6  # relative, for the rounding of the scaled numbers to float32
BOUND, CLIP = "bound", "clip"  # groups of a reply and of a broadcast with a moving clip


def norm(state: Mapping[str, Mapping[str, Tensor]]) -> float:
    """The Euclidean norm of all tensors of all groups together, in float64."""
    squares = [t.double().square().sum() for group in state.values() for t in group.values()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def clipped(state: State, clip: float) -> tuple[State, float]:
    """The state scaled down to the norm `clip` at most, and the norm that it had.

    Abadi et al. 2016, https://arxiv.org/abs/1607.00133, algorithm 1: x / max(1, |x| / C).

    Raises:
        FloatingPointError: the norm is not finite; nothing would bound such a state.
    """
    size = norm(state)
    if not size < float("inf"):
        raise FloatingPointError(f"the norm of a client's change is {size}")
    if size <= clip:
        return state, size
    factor = clip / size * (1 - SLACK)
    scaled = {
        group: {name: (t.double() * factor).to(t.dtype) for name, t in tensors.items()}
        for group, tensors in state.items()
    }
    return scaled, size


def clip_of(received: State, settings: PrivacySettings) -> float:
    """The clip of a round: the broadcast's where it moves, else the recipe's."""
    return float(received[CLIP][CLIP]) if CLIP in received else settings.clip


def bounded(sent: State, received: State, settings: PrivacySettings) -> State:
    """What a client sends in client mode: its change clipped, and whether that was needed.

    With a moving clip the group "bound" holds b - 1/2, where b is 1 if the norm was within the clip
    (Andrew et al. 2021, https://arxiv.org/abs/1905.03871): centred, so one client moves the sum of
    all by 1/2 only.
    """
    clip = clip_of(received, settings)
    state, size = clipped(sent, clip)
    if settings.clip_quantile:
        within = torch.tensor([0.5 if size <= clip else -0.5])
        state = {**state, BOUND: {BOUND: within}}
    return state


def noised(sent: State, mechanism: Mechanism, key: bytes, *context: bytes | int | str) -> State:
    """What a client sends in local mode: its change clipped, with its own noise.

    The noise depends on the clipped change, so the same change has the same noise and another one
    has another.
    """
    state, _ = clipped(sent, mechanism.clip)
    mine = digest(state)
    return {
        group: {
            name: t.to(tensors[name].dtype)
            for name, t in noise.noisy(
                tensors, key, mechanism.sigma, *context, "local", mine, group
            ).items()
        }
        for group, tensors in state.items()
    }
