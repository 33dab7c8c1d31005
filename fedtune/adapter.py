"""Arithmetic on adapters: pure functions on named tensors.

An adapter maps PEFT's tensor names to float32 tensors on the CPU; a state maps group names
("adapter", "head", "delta", ...) to adapters. What the coordinator keeps, what is broadcast, what
comes back, what a client keeps to itself and what a checkpoint holds are all states. Sums over
clients run in float64, in the order they are given.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Adapter: TypeAlias = dict[str, Tensor]
State: TypeAlias = dict[str, Adapter]


def _matched(first: Adapter, second: Adapter) -> None:
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())
        raise ValueError(f"adapters hold different tensors: {odd[:3]} are in one only")
    for name, tensor in first.items():
        if tensor.shape != second[name].shape:
            shapes = f"{tuple(tensor.shape)} and {tuple(second[name].shape)}"
            raise ValueError(f"'{name}' has shapes {shapes}")


def add(first: Adapter, second: Adapter) -> Adapter:
    """Sum first + second, tensor by tensor.

    Raises:
        ValueError: names or shapes differ; nothing is broadcast.
    """
    _matched(first, second)
    return {name: tensor + second[name] for name, tensor in first.items()}


def subtract(first: Adapter, second: Adapter) -> Adapter:
    """Difference first - second, tensor by tensor.

    Raises:
        ValueError: names or shapes differ; nothing is broadcast.
    """
    _matched(first, second)
    return {name: tensor - second[name] for name, tensor in first.items()}


def weighted_mean(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """sum_i w_i x_i / sum_i w_i, summed in float64 and returned in the first adapter's dtypes.

    Raises:
        ValueError: no adapters, names or shapes differ, or the weights are negative, not finite or
            sum to 0.
    """
    total = float(sum(weights))
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights")
    if not 0 < total < float("inf") or min(weights) < 0:
        raise ValueError(f"weights must be finite, at least 0 and sum to more than 0: {weights}")
    first = adapters[0]
    for other in adapters[1:]:
        _matched(first, other)
    mean: Adapter = {}
    for name, tensor in first.items():
        sum_ = torch.zeros(tensor.shape, dtype=torch.float64)
        for adapter, weight in zip(adapters, weights, strict=True):
            sum_.add_(adapter[name].double(), alpha=weight / total)
        mean[name] = sum_.to(tensor.dtype)
    return mean


def gram(adapters: Sequence[Adapter]) -> Tensor:
    """<x_i, x_j> over all entries together, (clients, clients) float64; zeros for empty adapters.

    Raises:
        ValueError: names or shapes differ.
    """
    for other in adapters[1:]:
        _matched(adapters[0], other)
    inner = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for name in adapters[0] if adapters else ():
        rows = torch.stack([adapter[name].double().flatten() for adapter in adapters])
        inner += rows @ rows.T
    return (inner + inner.T) / 2


def pick(adapter: Adapter, names: Sequence[str] | frozenset[str]) -> Adapter:
    """The named tensors of an adapter, in the adapter's order."""
    wanted = frozenset(names)
    return {name: tensor for name, tensor in adapter.items() if name in wanted}


def pick_groups(state: State, *groups: str) -> State:
    """The named groups of a state, as far as it has them."""
    return {group: state[group] for group in groups if group in state}


def rank_axis(name: str) -> int | None:
    """Which axis of a LoRA factor counts its ranks; None for other tensors."""
    if "lora_A" in name:
        return 0
    return 1 if "lora_B" in name else None


def fitted(name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A LoRA factor cropped or filled up with zeros to the rank that `shape` has.

    The product of both factors is unchanged by filling up.

    Raises:
        ValueError: the shapes differ in more than the rank.
    """
    if tensor.shape == torch.Size(shape):
        return tensor
    axis = rank_axis(name)
    if (
        axis is None
        or len(shape) != 2
        or tensor.dim() != 2
        or tensor.shape[1 - axis] != shape[1 - axis]
    ):
        raise ValueError(f"'{name}' has shape {tuple(tensor.shape)}, not {tuple(shape)}")
    whole = tensor.new_zeros(tuple(shape))
    kept = min(tensor.shape[axis], shape[axis])
    whole.narrow(axis, 0, kept).copy_(tensor.narrow(axis, 0, kept))
    return whole


def rank_of(adapter: Adapter) -> int:
    """The largest rank of its LoRA factors, 0 without any."""
    axes = ((tensor, rank_axis(name)) for name, tensor in adapter.items())
    return max((tensor.shape[axis] for tensor, axis in axes if axis is not None), default=0)


def at_rank(adapter: Adapter, rank: int) -> Adapter:
    """Its LoRA factors cropped or filled up with zeros to `rank`; 0 leaves them."""
    fitting: Adapter = {}
    for name, tensor in adapter.items():
        shape, axis = list(tensor.shape), rank_axis(name)
        if rank and axis is not None:
            shape[axis] = rank
        fitting[name] = fitted(name, tensor, shape)
    return fitting


def norm(adapter: Adapter) -> float:
    """The Euclidean norm of all entries together, in float64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in adapter.values()))


def nbytes(state: State) -> int:
    """Bytes of all tensors, without names and headers."""
    return sum(t.numel() * t.element_size() for group in state.values() for t in group.values())


def digest(state: State) -> str:
    """SHA-256 over names, shapes, dtypes and bytes: equal only where the states are bitwise so."""
    sha = hashlib.sha256()
    for group, adapter in sorted(state.items()):
        for name, tensor in sorted(adapter.items()):
            sha.update(f"{group}|{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
            sha.update(tensor.detach().numpy().tobytes())
    return sha.hexdigest()
