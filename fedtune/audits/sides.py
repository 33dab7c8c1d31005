"""Many releases with a canary and without it: what each side trained, and what came out.

The canary is the worst that a client may bring: a thousand times the clip, over every tensor alike,
against the others, its tensors in another order, and with a claim of many examples.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedtune.audits.draws import Array
from fedtune.audits.paths import Path, Trained, Vectors, directions
from fedtune.privacy.mechanism import REPLACE

CLIENTS = 2  # honest ones beside the canary, of whom every number costs thousands of draws
LOUD = 1000.0  # norm of the canary's change over the clip
MANY, FEW = 5000, 100  # examples of the canary and of an honest client
QUIET = 4.0  # by which the noise of the control is too small


@dataclass(frozen=True)
class Sides:
    """What was released with the canary and without it, by the same keys.

    Attributes:
        names: of the tensors of the mean, and where each begins and ends.
        present: (draws, numbers) of the mean.
        absent: the same without the canary.
        more: of everything else, by name, with the canary and without.
        canary: its direction in the mean.
    """

    names: dict[str, slice]
    present: Array
    absent: Array
    more: dict[str, tuple[Array, Array]]
    canary: Array

    @property
    def size(self) -> Array:
        """The standard deviation of each number of the mean without the canary."""
        varies = np.ptp(self.absent, axis=0) > 0
        return np.where(varies, self.absent.std(0), 0.0)


def clients_of(path: Path) -> tuple[list[Trained], list[Trained]]:
    """Who trains with the canary and without it.

    Half of the honest changes' coordinates add up and the canary goes against them, so that a
    denominator that follows the number of replies shows; the other half cancel, so that an
    optimizer that divides by what it sees shows. The canary's tensors come in another order and it
    claims many examples.
    """
    own, along = path.mechanism, directions(path.shapes)
    honest = [
        Trained(f"honest-{k}", FEW, {n: own.clip * _mixed(t, k) for n, t in along.items()})
        for k in range(CLIENTS)
    ]

    def canary(scale: float) -> Trained:
        change = {n: scale * LOUD * own.clip * along[n] for n in reversed(list(along))}
        return Trained("canary", MANY, change)

    if own.mode == "local":
        return [canary(-1.0)], [canary(1.0)]
    if own.neighbouring == REPLACE:
        return [canary(-1.0), *honest], [canary(1.0), *honest]
    return [canary(-1.0), *honest], honest


def _mixed(tensor: Tensor, number: int) -> Tensor:
    """The tensor, every second entry with another sign in every second client."""
    signs = torch.ones(tensor.numel())
    signs[1::2] = (-1.0) ** number
    return tensor * signs.view(tensor.shape)


def keys_of(count: int, purpose: str = "draw") -> list[bytes]:
    """New keys, the same in every audit: a finding can be repeated."""
    return [hashlib.sha256(f"{purpose} {number}".encode()).digest() for number in range(count)]


def sides_of(path: Path, count: int) -> Sides:
    """So many releases of each side."""
    keys = keys_of(count)
    (present, moved), (absent, still) = (_drawn(path, who, keys) for who in clients_of(path))
    names, start = {}, 0
    first = path.released(path.collected(clients_of(path)[0]), keys[0]).mean
    along = directions(path.shapes)
    canary = np.zeros(present.shape[1])
    for name, vector in first.items():
        names[name] = slice(start, start + len(vector))
        if name in along and along[name].numel() == len(vector):
            canary[names[name]] = along[name].flatten().numpy()
        start += len(vector)
    more = {name: (moved[name], still[name]) for name in moved}
    return Sides(names, present, absent, more, canary)


def _drawn(
    path: Path, clients: Sequence[Trained], keys: Sequence[bytes]
) -> tuple[Array, dict[str, Array]]:
    """The mean and everything else, (draws, numbers) each."""
    collected = path.collected(clients)
    means: list[Array] = []
    more: dict[str, list[Array]] = {}
    for key in keys:
        done = path.released(collected, key)
        means.append(whole(done.mean))
        for name, vector in done.more.items():
            more.setdefault(name, []).append(vector.double().numpy())
    return np.stack(means), {name: np.stack(found) for name, found in more.items()}


def whole(mean: Vectors) -> Array:
    """All numbers of a mean in a row."""
    found: Array = torch.cat([vector.double() for vector in mean.values()]).numpy()
    return found


def statistics(sides: Sides) -> tuple[Array, Array]:
    """What a distinguisher looks at, (draws, statistics) of both sides.

    Projections of the mean on the canary, whole and tensor by tensor, and on the direction in which
    the means of the first half differ; everything else along such a direction of its own.
    """
    half = len(sides.present) // 2
    found = sides.present[:half].mean(0) - sides.absent[:half].mean(0)
    ways = [sides.canary, found]
    for place in sides.names.values():
        part = np.zeros_like(found)
        part[place] = sides.canary[place] if sides.canary[place].any() else found[place]
        ways.append(part)
    along = np.stack(ways, 1)
    present, absent = [sides.present @ along], [sides.absent @ along]
    for moved, still in sides.more.values():
        gap = (moved[:half].mean(0) - still[:half].mean(0))[:, None]
        present.append(moved @ gap)
        absent.append(still @ gap)
    return np.concatenate(present, 1), np.concatenate(absent, 1)


def quiet(sides: Sides) -> Sides:
    """The same draws, had their noise been a quarter."""

    def less(values: Array) -> Array:
        return values.mean(0) + (values - values.mean(0)) / QUIET

    more = {name: (less(moved), less(still)) for name, (moved, still) in sides.more.items()}
    return replace(sides, present=less(sides.present), absent=less(sides.absent), more=more)
