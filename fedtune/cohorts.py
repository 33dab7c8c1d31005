"""Who takes part in a round: drawn by client name, so that node ids and arrival do not matter."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.errors import RecipeError
from fedtune.seeds import seed_of, uniform


@dataclass(frozen=True)
class Cohort(ABC):
    """A rule that draws the clients of a round from the population."""

    @abstractmethod
    def draw(self, population: Sequence[str], round: int, seed: int) -> list[str]:
        """The names of the round's clients, sorted; it may be empty under Poisson sampling."""

    def most(self, population: int) -> int:
        """How many clients a round can have, of a population of so many."""
        return population


@dataclass(frozen=True)
class All(Cohort):
    """Everybody, every round."""

    def draw(self, population: Sequence[str], round: int, seed: int) -> list[str]:
        return sorted(population)


@dataclass(frozen=True)
class Fixed(Cohort):
    """`size` clients without replacement, each subset equally likely."""

    size: int

    def __post_init__(self) -> None:
        """Refuse an empty cohort."""
        if self.size < 1:
            raise ValueError("size must be at least 1")

    def most(self, population: int) -> int:
        return min(self.size, population)

    def draw(self, population: Sequence[str], round: int, seed: int) -> list[str]:
        if self.size > len(population):
            raise RecipeError(
                f"cohort = 'fixed(size={self.size})' is larger than the population of "
                f"{len(population)} clients."
            )
        keyed = sorted(population, key=lambda name: seed_of(seed, "cohort", round, name))
        return sorted(keyed[: self.size])


@dataclass(frozen=True)
class Poisson(Cohort):
    """Every client by itself with probability `rate`: what privacy accountants amplify by."""

    rate: float

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        if not (math.isfinite(self.rate) and 0 < self.rate <= 1):
            raise ValueError("rate must be above 0 and at most 1")

    def draw(self, population: Sequence[str], round: int, seed: int) -> list[str]:
        return sorted(n for n in population if uniform(seed, "cohort", round, n) < self.rate)


COHORTS: dict[str, type[Cohort]] = {"all": All, "fixed": Fixed, "poisson": Poisson}
