"""What an audit found, as data: a terminal, a page and JSON are written from it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

HOLDS, BROKEN, OPEN, INVALID = "holds", "broken", "no claim", "invalid"
Verdict = Literal["holds", "broken", "no claim", "invalid"]


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
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    method: str = ""
    subject: str = ""


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
            promised), invalid (the measurement could not have succeeded, or misleads).
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
