"""What a promise will cost, round by round, and what its noise will do to the signal."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedtune.cohorts import Cohort
from fedtune.config import Experiment
from fedtune.privacy import accounting, mechanism

MOST_ROUNDS = 12  # rows of the table; of longer runs some rounds are shown


@dataclass(frozen=True)
class Outlook:
    """A run's promise before it runs, for the client that is worst off.

    Attributes:
        mode: record, client, client-distributed or local.
        unit: what is protected.
        neighbouring: the relation.
        adversary: against whom.
        client: the worst off; "" in client mode, which has one promise for all.
        units: of it.
        delta: of (epsilon, delta).
        noise: z.
        rate: of the units in a sum.
        steps: noisy sums in a round.
        rounds: [round, epsilon of the models alone, epsilon to who sees the sampling].
        parameters: numbers in a sum.
        noise_per_coordinate: standard deviation in the released mean.
        noise_norm: expected norm of the noise in the mean, over all its numbers.
        signal_norm: norm of the mean without noise, at most: the clip.
    """

    mode: str
    unit: str
    neighbouring: str
    adversary: str
    client: str
    units: int
    delta: float
    noise: float
    rate: float
    steps: int
    rounds: list[tuple[int, float, float]]
    parameters: int
    noise_per_coordinate: float
    noise_norm: float
    signal_norm: float

    def to_json(self) -> dict[str, Any]:
        """For `fedtune plan --json`."""
        return asdict(self)


def outlook(
    experiment: Experiment,
    cohort: Cohort,
    units: Mapping[str, int],
    parameters: int,
    excess: float = 1.0,
) -> Outlook:
    """The outlook of an experiment that promises something.

    Args:
        experiment: the recipe.
        cohort: of its rounds.
        units: client -> its records, or its values of privacy.unit.
        parameters: numbers in a noisy sum.
        excess: deviation of its noise over the promised one, where clients bring shares for those
            who may drop out and nobody does.

    Raises:
        RecipeError: the recipe does not fit the clients.
    """
    mechanisms = mechanism.of_roster(experiment, cohort, units)

    def total(name: str) -> float:
        own = mechanisms[name]
        return accounting.epsilon([own.event(own.rounds)], own.delta)

    name = max(sorted(mechanisms), key=total)
    own = mechanisms[name]
    rounds = []
    for round in shown(own.rounds):
        event = own.event(round)
        seen = replace(event, sampling="all", rate=1.0, population=0)
        alone, observed = (accounting.epsilon([e], own.delta) for e in (event, seen))
        rounds.append((round, alone, observed))
    deviation = excess * own.sigma / own.denominator
    return Outlook(
        mode=own.mode,
        unit=own.unit,
        neighbouring=own.neighbouring,
        adversary=own.adversary,
        client=name,
        units=own.units,
        delta=own.delta,
        noise=own.noise,
        rate=own.rate,
        steps=own.steps,
        rounds=rounds,
        parameters=parameters,
        noise_per_coordinate=deviation,
        noise_norm=deviation * math.sqrt(parameters),
        signal_norm=own.clip,
    )


def shown(rounds: int) -> list[int]:
    """At most a dozen rounds from the first to the last, evenly spaced."""
    if rounds <= MOST_ROUNDS:
        return list(range(1, rounds + 1))
    steps = MOST_ROUNDS - 1
    return sorted({1 + round_ * (rounds - 1) // steps for round_ in range(steps + 1)})
