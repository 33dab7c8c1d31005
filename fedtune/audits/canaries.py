"""Which canaries the model was trained on, guessed from the model, and what that proves.

The rows and their coins are those of `fedtune/canaries.py`, the bound that of `guesses.py`. A
canary's score is what tuning took from its loss: the loss without the adapter less the loss with
it. Where a classifier's head began at random, the loss before tells nothing, and the score is minus
the loss with it.
"""

import math
from collections.abc import Sequence

from datasets import Dataset

from fedtune import canaries, models
from fedtune.audits import guesses, losses
from fedtune.audits.audited import Audited, Claim
from fedtune.audits.finding import (
    BROKEN,
    HOLDS,
    INVALID,
    OPEN,
    Finding,
    Measure,
    NotApplicableError,
    Verdict,
)
from fedtune.canaries import Canary
from fedtune.privacy.mechanism import CENTRAL, DISTRIBUTED
from fedtune.report import wilson

QUESTION = "Does the final model tell which made-up rows the clients trained on?"
ADVERSARY = (
    "who holds the final model and every made-up row, and not the coins that put half of them into "
    "the clients' training rows"
)
DELTA = 1e-5  # of the bound where nothing is promised


def audit(audited: Audited) -> Finding:
    """Guess the coins of a run's canaries.

    Raises:
        NotApplicableError: the run had too few canaries, or no common model; or several
            canaries are one unit.
        LedgerError: the ledger is damaged or contradicts itself.
    """
    losses.require_common(audited)
    e = audited.experiment
    planted = canaries.drawn(audited.shards, audited.parts.task, e.data.audit_canaries, e.seed)
    inserted = [canary.inserted for canary in planted]
    if len(planted) < 4 or not 0 < sum(inserted) < len(planted):
        raise NotApplicableError(
            f"The run has {len(planted)} canaries, too few to guess: run it again with "
            "data.audit_canaries=200 or more, made-up rows that are trained on by a coin each."
        )
    _require_units(audited, planted)
    return found(scores(audited, planted), inserted, audited.claim)


def scores(audited: Audited, planted: Sequence[Canary]) -> list[float]:
    """What tuning took from each canary's loss, in nats: the higher, the likelier it was in."""
    task, model, e = audited.parts.task, audited.model, audited.experiment
    rows = Dataset.from_list(
        [canary.row for canary in planted], features=audited.shards[0].train.features
    )
    tuned = losses.of_rows(model, task, rows, e.model.max_length)
    if model.fresh and "head" in model.tensors:
        return [-float(loss) for loss in tuned]
    with models.untuned(model):
        before = losses.of_rows(model, task, rows, e.model.max_length)
    return [float(score) for score in before - tuned]


def _require_units(audited: Audited, planted: Sequence[Canary]) -> None:
    """Refuse canaries that record-level privacy counts as one unit.

    Raises:
        NotApplicableError: the unit's column holds neither text nor whole numbers.
    """
    column = audited.experiment.privacy.unit
    if column and len({str(canary.row[column]) for canary in planted}) < len(planted):
        raise NotApplicableError(
            f"privacy.unit = '{column}' holds neither text nor whole numbers, so all canaries of a "
            "client are one unit, and guesses of single rows say nothing of the claim. Write the "
            "column as text."
        )


def found(scores: Sequence[float], inserted: Sequence[bool], claim: Claim | None) -> Finding:
    """What the scores of canaries with known coins prove against a claim."""
    rows = len(scores)
    epsilon, delta = _promised(claim) if claim else (math.inf, DELTA)
    count, right = guesses.count_right(scores, inserted)
    bound = guesses.lower_bound(rows, count, right, delta)
    reach = guesses.reach(rows, delta)
    verdict: Verdict = OPEN
    reason = "nothing is promised of single rows that the bound could contradict"
    if claim:
        verdict, reason = _verdict(bound, reach, epsilon, delta)
    exposed = guesses.exposures(scores, inserted)
    middle, low, high = guesses.median(exposed)
    hits = wilson(right, count)
    return Finding(
        audit="canaries",
        question=QUESTION,
        adversary=ADVERSARY,
        measures=(
            Measure(
                "epsilon, lower bound",
                bound,
                bound,
                method=f"Steinke et al. 2023 at delta = {delta:.2g}, one-sided",
                allowed=epsilon if claim else None,
            ),
            Measure("share of guesses that are right", right / count, *hits, method="Wilson"),
            Measure("exposure, median, bits", middle, low, high, method="order statistics"),
            Measure("exposure, largest, bits", max(exposed)),
            Measure("epsilon that only right guesses would show", reach),
        ),
        claim=claim.text if claim else "none",
        verdict=verdict,
        reason=reason,
        validity=f"Fair coins put {sum(inserted)} of {rows} made-up rows among the clients' "
        f"training rows. {count} coins were guessed, a number fixed beforehand: the {count // 2} "
        f"highest scores in, the {count // 2} lowest out; {right} guesses are right. A model that "
        "never saw a row shows it with a median exposure of 1 bit.",
    )


def _promised(claim: Claim) -> tuple[float, float]:
    """The (epsilon, delta) that a claim gives to one row.

    Where a client is added, removed or zeroed, one row more is two such steps: twice epsilon, and
    (1 + e^epsilon) delta (Dwork and Roth 2014, theorem 2.2). The claim does not tell which relation
    a client's is, so this weaker promise is held against all.
    """
    if claim.mode not in (CENTRAL, DISTRIBUTED):
        return claim.epsilon, claim.delta
    factor = 1 + math.exp(min(claim.epsilon, 500.0))
    return 2 * claim.epsilon, min(1.0, factor * claim.delta)


def _verdict(bound: float, reach: float, epsilon: float, delta: float) -> tuple[Verdict, str]:
    if bound > epsilon:
        return BROKEN, (
            f"the guesses refute every epsilon up to {bound:.2f}, and {epsilon:.2f} is promised of "
            "a row; by chance they do so in 5 % of honest runs at most"
        )
    if reach <= epsilon:
        enough = guesses.needed(epsilon, delta)
        how = f"data.audit_canaries = {enough} could" if enough else "no number of canaries could"
        return INVALID, (
            f"the measurement could not have contradicted the claim: even guesses that are all "
            f"right would show epsilon {reach:.2f} only, and {epsilon:.2f} is promised; {how}"
        )
    return HOLDS, (
        f"the guesses show an epsilon of {bound:.2f} at least, within the {epsilon:.2f} that is "
        f"promised; guesses that are all right would have shown {reach:.2f}"
    )
