"""What a round leaves behind: a line of rounds.jsonl, which reports read.

Metrics are sums: lists of numbers that add up exactly over batches and clients, e.g. "accuracy":
    [correct, rows]. They become ratios at the last moment.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Sums: TypeAlias = dict[str, list[float]]


def merge(parts: Iterable[Mapping[str, Sequence[float]]]) -> Sums:
    """The elementwise sum of metrics.

    Raises:
        ValueError: two parts have lists of different lengths for one name.
    """
    total: Sums = {}
    for part in parts:
        for name, values in part.items():
            if name not in total:
                total[name] = [float(value) for value in values]
                continue
            total[name] = [a + b for a, b in zip(total[name], values, strict=True)]
    return total


def padding(tokens: Sequence[float]) -> float | None:
    """The share of padding among [real, computed] tokens, None where they are not known."""
    real, computed = tokens
    return 1 - real / computed if computed else None


@dataclass(frozen=True)
class Rejection:
    """A reply that was set aside.

    Attributes:
        client: whose it was.
        code: E_CLIENT, E_TIMEOUT, E_REPLAY, E_SCHEMA, E_DTYPE, E_NONFINITE or E_WEIGHT.
        reason: for a person.
    """

    client: str
    code: str
    reason: str


@dataclass(frozen=True)
class RoundRecord:
    """One round.

    Attributes:
        round: from 1; 0 is the untuned model, evaluated only.
        cohort: the clients that were asked to train.
        seconds: of wall-clock time, evaluation included.
        bytes_down: of all arrays broadcast for training, serialised.
        bytes_up: of all arrays in accepted and refused replies to it.
        bytes_evaluation: of all arrays broadcast for evaluation.
        train: client -> metrics of its training batches.
        rejected: replies that were set aside.
        evaluation: scope -> client -> metrics on test rows. Scope "own" is the client's own rows;
            "pooled", in the last round of a strategy of personal models, the rows of all.
        update_norm: Euclidean norm of the change of the coordinator's adapter.
        tokens: [real, computed] of the accepted clients' training; the base saw the computed ones,
            padding included.
        aggregation: figures of `fedtune.aggregation`, {} where clients keep what they would need.
    """

    round: int
    cohort: list[str]
    seconds: float
    bytes_down: int
    bytes_up: int
    bytes_evaluation: int = 0
    train: dict[str, Sums] = field(default_factory=dict)
    rejected: list[Rejection] = field(default_factory=list)
    evaluation: dict[str, dict[str, Sums]] = field(default_factory=dict)
    update_norm: float = 0.0
    tokens: list[float] = field(default_factory=lambda: [0.0, 0.0])
    aggregation: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "RoundRecord":
        """The record of one line.

        Raises:
            ValueError: the line is cut short or has other fields.
        """
        try:
            fields: dict[str, Any] = json.loads(line)
            rejected = [Rejection(**item) for item in fields.pop("rejected", [])]
            return cls(**fields, rejected=rejected)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"no record of a round: {error}") from error
