"""A finished comparison as data: what tables, files and the page are written from.

A study has conditions (one a combination of whatever is varied beside strategy and seed), a
condition has arms (a strategy, or a reference to read it against), an arm has scores. Two
protocols are kept apart everywhere:

global      the coordinator's model on the pooled test rows of all clients
personal    all test rows, each answered by the model that its own client holds

An arm whose model is each client's own has scores of the second only. The baseline, the untuned
model and references that have one model stand in both, as yardsticks: there their `kind` is still
"global". Nothing here is computed; `comparing.py` does that.
"""

import dataclasses
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

from fedtune.config import Leaf
from fedtune.errors import RunError

GLOBAL, PERSONAL = "global", "personal"
PROTOCOLS = {
    GLOBAL: "the global model on the pooled test rows of all clients",
    PERSONAL: "each client's own model on its own test rows, all rows together",
}
UNTUNED = "untuned"


@dataclass(frozen=True)
class Interval:
    """A 95 % interval.

    Attributes:
        low: its lower end.
        high: its upper end.
        method: how it was made, for a caption: "Student t over 3 seeds".
    """

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Difference:
    """An arm minus the baseline, paired by seed: same shards, start, cohorts and batches.

    Attributes:
        seeds: that both have.
        values: one a seed.
        mean: of the values.
        interval: Student t over seeds, None with one seed.
        bootstrap: over seeds, and over clients where both arms have the same ones.
        p: of the paired t test, two-sided; None with one seed or where all values are equal but 0.
        p_holm: after Holm's correction over `family` tests; None for references.
        family: tests of strategies, of one protocol and metric, in the whole study.
        p_permutation: of the sign-flip test over seeds, exact.
        p_smallest: the least that test can give with so many seeds, 2 ** (1 - seeds).
    """

    seeds: list[int]
    values: list[float]
    mean: float
    interval: Interval | None
    bootstrap: Interval | None
    p: float | None
    p_holm: float | None
    family: int
    p_permutation: float
    p_smallest: float


@dataclass(frozen=True)
class Score:
    """One metric of an arm under one protocol, after the last round.

    Attributes:
        protocol: global or personal.
        metric: "accuracy", "macro_f1", "loss", ...
        seeds: whose cells are finished, ascending.
        values: one a seed.
        mean: of the values.
        interval: Student t over seeds, None with one seed.
        bootstrap: over seeds and clients, None where the arm has no clients of its own.
        worst: the worst client's value, mean over seeds; None without clients.
        spread: standard deviation across clients, mean over seeds; None without clients.
        difference: to the baseline; None for itself and where no seed is shared.
    """

    protocol: str
    metric: str
    seeds: list[int]
    values: list[float]
    mean: float
    interval: Interval | None = None
    bootstrap: Interval | None = None
    worst: float | None = None
    spread: float | None = None
    difference: Difference | None = None


@dataclass(frozen=True)
class ClientScore:
    """One client's own test rows in one seed, after the last round.

    Attributes:
        seed: of the cell.
        client: its name.
        examples: its training rows.
        test_rows: above 0.
        values: metric -> value.
    """

    seed: int
    client: str
    examples: int
    test_rows: int
    values: dict[str, float]


@dataclass(frozen=True)
class Curve:
    """One seed, round by round; every list has an item for each of `rounds`, from round 0.

    Attributes:
        seed: of the cell.
        rounds: 0, 1, 2, ...
        values: metric -> value over all test rows (each by the model its client holds, which for a
            global model is that one); None in a round without evaluation.
        bytes: up and down, cumulated, as serialised.
        seconds: cumulated.
        aggregation: diagnostics such as "error", "effective_rank", "drift"; None where a round has
            none.
    """

    seed: int
    rounds: list[int]
    values: dict[str, list[float | None]]
    bytes: list[int]
    seconds: list[float]
    aggregation: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What an arm took, a value a seed; the seeds are those of its curves.

    Attributes:
        rounds: trained.
        bytes_up: of all rounds, None where nothing is federated (untuned, alone, centralized).
        bytes_down: the same.
        seconds: wall clock of the cell's rounds, evaluation included; other cells ran beside it.
        rounds_to_target: the first evaluated round that reached the study's target, None where
            none did; [] without a target.
        bytes_to_target: up and down until then.
        seconds_to_target: until then.
    """

    rounds: list[int]
    bytes_up: list[int] | None
    bytes_down: list[int] | None
    seconds: list[float]
    rounds_to_target: list[int | None] = field(default_factory=list)
    bytes_to_target: list[int | None] = field(default_factory=list)
    seconds_to_target: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class Audit:
    """One of the leading measures of an audit of an arm's cells.

    Attributes:
        audit: its name, "membership".
        measure: what was measured; "" where no cell could be.
        seeds: whose cells were measured, ascending.
        values: one a seed.
        mean: of the values, None without any.
        interval: Student t over seeds; with one seed the audit's own.
        allowed: the most that the claim allows, mean over seeds; None where nothing is promised.
        verdicts: verdict -> how many cells have it.
        reason: of the first cell that was not measured, "" where all were.
    """

    audit: str
    measure: str
    seeds: list[int]
    values: list[float]
    mean: float | None
    interval: Interval | None
    allowed: float | None
    verdicts: dict[str, int]
    reason: str = ""


@dataclass(frozen=True)
class Arm:
    """A strategy, or what strategies are read against, in one condition.

    Attributes:
        name: the strategy's text in the recipe, "hetlora(keep=0.95)", or "untuned".
        role: "strategy" or "reference".
        kind: "global" where the result is one model, "personal" where it is one a client.
        scores: of every protocol and metric that it has.
        cost: what it took.
        clients: by seed and client; [] where one model was tested on pooled rows only.
        curves: one a seed.
        aggregation: diagnostics, mean over rounds and seeds.
        settings: what was set for this arm alone, as a tuned learning rate.
        audits: [] where the study asks for none.
    """

    name: str
    role: str
    kind: str
    scores: list[Score]
    cost: Cost
    clients: list[ClientScore]
    curves: list[Curve]
    aggregation: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Leaf] = field(default_factory=dict)
    audits: list[Audit] = field(default_factory=list)

    def score(self, protocol: str, metric: str) -> Score | None:
        """That score, None where the arm has none."""
        found = (s for s in self.scores if (s.protocol, s.metric) == (protocol, metric))
        return next(found, None)


@dataclass(frozen=True)
class Rank:
    """Where a strategy stands among the others, 1 being best.

    Attributes:
        arm: its name.
        mean: rank over bootstrap draws.
        low: of the 95 % interval of the rank.
        high: of the same.
        best: share of the draws in which it is the best.
    """

    arm: str
    mean: float
    low: float
    high: float
    best: float


@dataclass(frozen=True)
class Ranking:
    """Strategies of one protocol, best first; references do not compete.

    Attributes:
        protocol: global or personal.
        metric: the study's.
        method: how the draws were made, for a caption.
        ranks: best mean rank first.
    """

    protocol: str
    metric: str
    method: str
    ranks: list[Rank]


@dataclass(frozen=True)
class Condition:
    """One combination of the varied keys that are neither strategy nor seed.

    Attributes:
        name: "data.partition=dirichlet(alpha=0.1)", "" where nothing else is varied.
        changes: key -> value of them.
        arms: references first (untuned, ...), then strategies in the study's order.
        rankings: one a protocol that has two strategies or more.
    """

    name: str
    changes: dict[str, Leaf]
    arms: list[Arm]
    rankings: list[Ranking]


@dataclass(frozen=True)
class Trial:
    """One value that was tried.

    Attributes:
        value: of the tuned key.
        score: of the study's metric on validation rows, mean over the tuning seeds; None where it
            failed.
        seconds: of its cells.
        reason: why it failed.
    """

    value: Leaf
    score: float | None
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Tuning:
    """How one arm's setting was chosen in one condition, on validation rows only.

    Attributes:
        condition: its name.
        arm: its name.
        key: "train.learning_rate".
        chosen: the value that its cells run with; None where every trial failed, and none ran.
        metric: that decided.
        sampler: "grid" or "tpe".
        rounds: of a trial.
        seeds: of a trial.
        validation_fraction: of each shard's training rows.
        trials: in the order in which they were asked.
    """

    condition: str
    arm: str
    key: str
    chosen: Leaf | None
    metric: str
    sampler: str
    rounds: int
    seeds: list[int]
    validation_fraction: float
    trials: list[Trial]


@dataclass(frozen=True)
class Failure:
    """A cell without a result.

    Attributes:
        condition: its name.
        arm: its name.
        seed: of the cell.
        reason: for a person.
    """

    condition: str
    arm: str
    seed: int
    reason: str


@dataclass(frozen=True)
class Comparison:
    """A study's result.

    Attributes:
        study: its name.
        question: that it answers, "" where none was written.
        metric: that decides.
        direction: "higher" or "lower" is better.
        metrics: all that were measured, the deciding one first.
        baseline: the arm that others are compared with.
        seeds: that were asked for.
        target: of the metric, None without.
        conditions: in the study's order.
        tuning: [] where nothing was tuned.
        failures: cells without a result.
        cells: how many there are, trials of tuning apart.
        seconds: of all cells, added up.
        notes: how the numbers were made, sentence by sentence.
        recipe: the study as TOML, overrides applied.
        code: digest of the sources that decide a cell's result.
    """

    study: str
    question: str
    metric: str
    direction: str
    metrics: list[str]
    baseline: str
    seeds: list[int]
    target: float | None
    conditions: list[Condition]
    tuning: list[Tuning]
    failures: list[Failure]
    cells: int
    seconds: float
    notes: list[str]
    recipe: str
    code: str

    def to_json(self) -> str:
        """The whole as JSON; `from_json` gives an equal one."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, allow_nan=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The comparison of `to_json`.

        Raises:
            ValueError: a field is missing, or of another type.
        """
        try:
            value = _built(cls, json.loads(text))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no comparison: {error}") from error
        assert isinstance(value, cls)
        return value


def read(path: str | Path) -> Comparison:
    """The comparison in a file comparison.json.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        return Comparison.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read: {error}. `fedtune compare STUDY` writes it again; cells that "
            "are finished are not run again."
        ) from error


def _built(kind: Any, value: Any) -> Any:
    """A value of JSON as the type that an annotation names."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        if value is None or len(inner) > 1:  # None, or the kinds of a recipe's leaf
            return value
        return _built(inner[0], value)
    if origin is list:
        return [_built(arguments[0], item) for item in value]
    if origin is dict:
        return {key: _built(arguments[1], item) for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _object(kind, value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value


def _object(kind: Any, value: Mapping[str, Any]) -> Any:
    hints = get_type_hints(kind)
    if unknown := value.keys() - hints.keys():
        raise TypeError(f"{kind.__name__} has no field {sorted(unknown)[0]}")
    return kind(**{name: _built(hints[name], item) for name, item in value.items()})
