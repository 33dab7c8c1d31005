"""Whether the coordinator sees each client's update or their sum only: a recipe's choice."""

import json
import math
from dataclasses import dataclass, fields
from typing import ClassVar

from fedtune.config import Experiment
from fedtune.privacy.letters import digest
from fedtune.privacy.mechanism import Mechanism
from fedtune.privacy.ring import Grid


@dataclass(frozen=True)
class Aggregation:
    """How updates reach the coordinator."""

    masks: ClassVar[bool] = False


@dataclass(frozen=True)
class Open(Aggregation):
    """One by one, in clear."""


@dataclass(frozen=True)
class Masked(Aggregation):
    """Their sum only: each is masked, and the masks cancel in the sum.

    Attributes:
        threshold: the share of a cohort that must stay to the end of a round, above 2/3.
        clip: Euclidean norm to which every update is scaled down; 0 leaves them as they are.
        bound: largest absolute value of an update's coordinates; a client beyond it drops out. With
            privacy.mode = "client-distributed" privacy.clip takes the place of both.
        cap: rows that count at most as a client's weight, with weighting = "examples".
    """

    masks: ClassVar[bool] = True
    threshold: float = 0.67
    clip: float = 0.0
    bound: float = 2.0
    cap: int = 10_000

    def __post_init__(self) -> None:
        """Refuse what would protect nobody."""
        if not 2 / 3 <= self.threshold <= 1:
            raise ValueError("threshold must be between 2/3 and 1: below, two sums can be opened")
        if not (0 <= self.clip < math.inf and 0 < self.bound < math.inf and self.cap >= 1):
            raise ValueError("clip must be at least 0, bound above 0 and cap at least 1")

    def needed(self, clients: int) -> int:
        """t, of a cohort of so many: at least floor(2 n / 3) + 1."""
        return max(2 * clients // 3 + 1, math.ceil(self.threshold * clients))

    def grid(self, clients: int, weighting: str) -> Grid:
        """The grid of a cohort.

        Raises:
            ValueError: so many clients do not fit.
        """
        cap = self.cap if weighting == "examples" else 1
        return Grid(clients, self.bound, self.clip, cap)

    def weight(self, rows: int, weighting: str) -> int:
        """A client's weight."""
        return min(rows, self.cap) if weighting == "examples" else 1


@dataclass(frozen=True)
class Noised(Masked):
    """Masked, each update with a share of the noise that hides it in the sum; no recipe names it.

    The clip of the promise takes the place of `clip` and `bound`, and every client weighs the same.
    Those who must stay to the end of a round make the promised noise; if more stay, there is more.

    Attributes:
        noise: z, of the promise.
        radius: C, of the promise.
    """

    noise: float = 1.0
    radius: float = 1.0

    def grid(self, clients: int, weighting: str) -> Grid:
        return Grid(clients, self.radius, self.radius, 1, self.noise, self.needed(clients))

    def weight(self, rows: int, weighting: str) -> int:
        return 1


def noised(settings: Masked, promised: Mechanism) -> Noised:
    """The recipe's settings with the noise that its promise to clients needs."""
    given = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return Noised(**given, noise=promised.noise, radius=promised.clip)


AGGREGATIONS: dict[str, type[Aggregation]] = {"none": Open, "masked": Masked}


def config_digest(experiment: Experiment) -> bytes:
    """Equal where everything that decides a run's bytes is."""
    return digest(json.dumps(experiment.identity(), sort_keys=True).encode())
