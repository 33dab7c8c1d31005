"""Whether the coordinator sees each client's update or their sum only: a recipe's choice."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

from fedtune.config import Experiment
from fedtune.privacy.letters import digest
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
        bound: largest absolute value of an update's coordinates; a client beyond it drops out.
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


AGGREGATIONS: dict[str, type[Aggregation]] = {"none": Open, "masked": Masked}


def config_digest(experiment: Experiment) -> bytes:
    """Equal where everything that decides a run's bytes is."""
    return digest(json.dumps(experiment.identity(), sort_keys=True).encode())
