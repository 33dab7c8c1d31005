"""What a recipe promises, resolved into numbers.

Client and coordinator each derive it from the recipe and from what the roster tells, so neither has
to believe the other: the noise of a client's steps follows from its own number of records, and the
coordinator computes the same number for the ledger.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedtune.cohorts import Cohort, Fixed, Poisson
from fedtune.config import Experiment, PrivacySettings
from fedtune.errors import RecipeError
from fedtune.privacy import skellam
from fedtune.privacy.accounting import Event
from fedtune.privacy.calibration import noise_for
from fedtune.strategies.strategy import Strategy

ADD_REMOVE, REPLACE, ZERO_OUT = "add or remove one", "replace one", "zero out one"
CENTRAL, DISTRIBUTED, LOCAL = "client", "client-distributed", "local"  # modes that protect clients
DELTA = 1e-5


@dataclass(frozen=True)
class Mechanism:
    """A noisy sum that is released again and again.

    Each sum adds up the units' contributions, each clipped to the norm `clip` over all tensors
    together, and noise of standard deviation `sigma` in every coordinate, Gaussian but for mode
    client-distributed; the result is divided by `denominator`, a constant.

    Attributes:
        mode: record, client, client-distributed or local.
        unit: what is protected: "record", the values of a column, or "client".
        neighbouring: the relation of data sets between which nobody can tell.
        adversary: against whom.
        clip: C.
        sensitivity: how far a neighbour can move a sum: C, or 2 C where a unit is replaced.
        noise: z = sigma / C.
        sampling: of units into a sum: all, poisson or fixed.
        rate: q, the share of the units in a sum.
        units: N, how many there are.
        steps: T, noisy sums in a round.
        rounds: of the run.
        batch: expected units in a sum, q N.
        denominator: of the mean.
        delta: of (epsilon, delta).
        budget: epsilon of the whole run at most; 0 without one.
    """

    mode: str
    unit: str
    neighbouring: str
    adversary: str
    clip: float
    sensitivity: float
    noise: float
    sampling: str
    rate: float
    units: int
    steps: int
    rounds: int
    batch: float
    denominator: float
    delta: float
    budget: float

    @property
    def sigma(self) -> float:
        """The noise's standard deviation on a sum."""
        return self.noise * self.clip

    def event(self, rounds: int) -> Event:
        """What `rounds` rounds of it are to an accountant."""
        return Event(
            self.sigma / self.sensitivity,
            self.sampling,
            self.rate,
            self.steps * rounds,
            self.units if self.sampling == "fixed" else 0,
            _steps(self.mode),
        )


ADVERSARY = {
    "record": "the coordinator, the other clients and whoever uses the models; "
    "not whoever reads the client's own memory or its key",
    "client": "the other clients and whoever uses the models of every round; "
    "the coordinator is trusted",
    "client-distributed": "whoever uses the models of every round, and a coordinator that keeps to "
    "the protocol and sees sums and who takes part; not whoever knows shares of the noise",
    "local": "everybody but the client itself",
}


def _steps(mode: str) -> int:
    return skellam.LEAST_STEPS if mode == DISTRIBUTED else 0


def not_covered(experiment: Experiment, strategy: Strategy) -> list[str]:
    """What the promise leaves out, for the ledger and whoever reads its certificate."""
    p = experiment.privacy
    found = [
        "the choice of the recipe, of its hyper-parameters and of this run among others",
        "how many clients there are, and what the roster tells of them (rows, label counts)",
        "how long a round takes, and which clients failed",
    ]
    if p.mode == "record":
        found.append("metrics on test rows, which are other rows than those trained on")
    else:
        found.append("metrics on clients' test rows, in rounds.jsonl and the report")
    if experiment.evaluation.samples:
        found.append("generated answers and the test rows they answer, in samples.json")
    if p.unit:
        found.append(f"test rows that share their '{p.unit}' with rows trained on")
    if strategy.personal:
        found.append("the models that clients keep to themselves")
    if p.mode == DISTRIBUTED:
        found.append("whether a client takes part in a round: only what it gives is hidden")
        found.append(
            "clients that tell others their own shares of the noise: each of them takes its share "
            "from the noise of those who must stay to the end of a round"
        )
    if p.mode == "client":
        found.append("what the coordinator's own folder tells of single clients (rounds.jsonl)")
    if experiment.references != "none":
        found.append(
            f"the references ({experiment.references}), which learn from the same rows without "
            "noise: publish none of their models and numbers as private"
        )
    return found


def private(experiment: Experiment) -> bool:
    """Whether the recipe promises anything."""
    return experiment.privacy.mode != "none"


@functools.lru_cache(maxsize=4096)
def record(experiment: Experiment, units: int) -> Mechanism:
    """The noisy steps of a client that has `units` records (or patients, see privacy.unit).

    Raises:
        RecipeError: a batch is larger than the client, or delta is too large for it.
    """
    train = experiment.train
    if train.batch_size > units:
        raise RecipeError(
            f"train.batch_size = {train.batch_size} is more than the {units} "
            f"{experiment.privacy.unit or 'records'} of a client, so no batch can be a sample of "
            "them. Lower it, or leave such clients out with data.minimum."
        )
    steps = train.steps or train.epochs * math.ceil(units / train.batch_size)
    size, rate = float(train.batch_size), train.batch_size / units
    return _resolved(experiment, units, "poisson" if rate < 1 else "all", rate, size, steps)


def client(experiment: Experiment, cohort: Cohort, population: int) -> Mechanism:
    """The noisy sum of each round's cohort.

    Where the clients make the noise, nothing is amplified by sampling: the coordinator sees who
    takes part, and how much noise there is tells everybody how many do. The relation is then that a
    client gives zeros; each is charged for the rounds that it was asked in.

    Raises:
        RecipeError: the population is too small, or delta is too large for it.
    """
    if population < experiment.privacy.minimum_clients:
        raise RecipeError(
            f"privacy.mode = '{experiment.privacy.mode}' with {population} clients, where "
            f"privacy.minimum_clients = {experiment.privacy.minimum_clients}: noise that hides one "
            "of so few drowns what the others say. Take privacy.mode = 'record', or lower it and "
            "see the noise in `fedtune plan`."
        )
    if isinstance(cohort, Poisson):
        kind, rate = ("poisson" if cohort.rate < 1 else "all"), cohort.rate
    elif isinstance(cohort, Fixed):
        rate = cohort.size / population
        kind = "fixed" if rate < 1 else "all"
    else:
        kind, rate = "all", 1.0
    if experiment.privacy.mode == DISTRIBUTED:
        return _resolved(experiment, population, "all", 1.0, rate * population, 1)
    return _resolved(experiment, population, kind, rate, rate * population, 1)


def local(experiment: Experiment) -> Mechanism:
    """The noise on one client's own change, in every round that it takes part in."""
    return _resolved(experiment, 1, "all", 1.0, 1.0, 1)


def of_roster(
    experiment: Experiment, cohort: Cohort, units: Mapping[str, int]
) -> dict[str, Mechanism]:
    """Each client's own mechanism; in mode "client" there is one, under "".

    Args:
        experiment: the recipe.
        cohort: of its rounds.
        units: client -> its records, or its values of privacy.unit.

    Raises:
        RecipeError: the recipe does not fit the clients.
    """
    mode = experiment.privacy.mode
    if mode == CENTRAL:
        return {"": client(experiment, cohort, len(units))}
    if mode == DISTRIBUTED:
        return dict.fromkeys(units, client(experiment, cohort, len(units)))
    if mode == LOCAL:
        return dict.fromkeys(units, local(experiment))
    return {name: record(experiment, count) for name, count in sorted(units.items())}


def delta_of(settings: PrivacySettings, units: int) -> float:
    """The recipe's delta, or min(1e-5, 1 / (10 units)).

    Raises:
        RecipeError: with so large a delta a mechanism may give away whole units.
    """
    if settings.delta >= 1 / units > 0 and settings.delta:
        raise RecipeError(
            f"privacy.delta = {settings.delta} must be below 1 / {units}, the number of units it "
            "is to protect: it allows a mechanism to publish one of them. 0 takes "
            f"{min(DELTA, 1 / (10 * units)):.3g}."
        )
    return settings.delta or min(DELTA, 1 / (10 * units))


def _resolved(
    experiment: Experiment, units: int, sampling: str, rate: float, batch: float, steps: int
) -> Mechanism:
    p = experiment.privacy
    replaced = sampling == "fixed" or p.mode == LOCAL
    sensitivity = 2 * p.clip if replaced else p.clip
    delta = delta_of(p, units)
    population = units if sampling == "fixed" else 0
    event = Event(1.0, sampling, rate, steps * experiment.rounds, population, _steps(p.mode))
    noise = p.noise or noise_for(p.epsilon, delta, event) * sensitivity / p.clip
    return Mechanism(
        mode=p.mode,
        unit=(p.unit or "record") if p.mode == "record" else "client",
        neighbouring=ZERO_OUT if p.mode == DISTRIBUTED else REPLACE if replaced else ADD_REMOVE,
        adversary=ADVERSARY[p.mode],
        clip=p.clip,
        sensitivity=sensitivity,
        noise=noise,
        sampling=sampling,
        rate=rate,
        units=units,
        steps=steps,
        rounds=experiment.rounds,
        batch=batch,
        denominator=batch,
        delta=delta,
        budget=p.epsilon,
    )
