"""What an audit found, as data: a terminal, a page and JSON are written from it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from fedtune.errors import RecipeError

HOLDS: Final = "holds"
BROKEN: Final = "broken"
OPEN: Final = "no claim"
INVALID: Final = "invalid"
INAPPLICABLE: Final = "not applicable"
Verdict = Literal["holds", "broken", "no claim", "invalid", "not applicable"]


class NotApplicableError(RecipeError):
    """The audit has no meaning for this run; the message says why."""


@dataclass(frozen=True)
class Measure:
    """One number of an audit.

    Attributes:
        name: what was measured, "AUC of the loss ratio".
        value: in the unit that `name` says.
        low: the lower end of the 95 % interval; None where none can be given.
        high: its upper end.
        method: how the interval was made, "Clopper-Pearson over 3,000 draws".
        subject: whom or what it is of, "bank, round 1"; "" for the run.
        allowed: the most that the claim allows, or where it says nothing of this number the
            audit's own criterion; drawn beside it. None where nothing is promised.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    method: str = ""
    subject: str = ""
    allowed: float | None = None

    @property
    def title(self) -> str:
        """What was measured, and of whom."""
        return f"{self.name} ({self.subject})" if self.subject else self.name


@dataclass(frozen=True)
class Finding:
    """One audit of one run.

    Attributes:
        audit: its name in the registry: mechanism, tokens, membership, canaries, extraction.
        question: what it asks, one sentence.
        adversary: who attacks, and what he sees.
        measures: the numbers, the most telling first.
        claim: what the ledger promises of them, or "none".
        verdict: holds (the claim is not contradicted), broken (it is), no claim (nothing is
            promised), invalid (the measurement could not have succeeded, or misleads), not
            applicable (an audit raises NotApplicableError and does not return this itself).
        reason: why that verdict.
        validity: what was checked of the measurement itself, and how it came out.
    """

    audit: str
    question: str
    adversary: str
    measures: tuple[Measure, ...]
    claim: str
    verdict: Verdict
    reason: str
    validity: str

    def to_json(self) -> dict[str, Any]:
        """The same as JSON's values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Finding":
        """What `to_json` wrote.

        Raises:
            TypeError, KeyError: it is something else.
        """
        measures = tuple(Measure(**measure) for measure in value["measures"])
        return cls(**{**value, "measures": measures})
