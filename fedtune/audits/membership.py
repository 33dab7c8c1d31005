"""Whether the final model tells which rows it was trained on.

Members are training rows of all clients; the others were set aside at random before training
(`data.audit_holdout`), or are the test rows where a run has none. Of each row one number is
computed, by the tuned model and by its base; the first statistic of its kind decides, which was
fixed before anything was looked at: the loss ratio for classes, EZ for text. The others are told
beside it.

Under a promise (epsilon, delta) no test whatever finds more than e^epsilon a + delta of the members
with a share a of false alarms (Wasserman and Zhou 2010, https://arxiv.org/abs/0811.2501): if the
lower end of what was found exceeds that, the promise is broken.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from fedtune.audits import blind, likelihoods, ranking
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
from fedtune.audits.ranking import Caught, Scores
from fedtune.dealing import permutation
from fedtune.shards import Shard
from fedtune.tasks.causal_lm import CausalLM
from fedtune.tasks.task import Example

LIMIT = 2000  # rows of each kind
FEWEST = 20  # rows of each kind, of the run or of a client, with which anything is said
DIFFERENT = 0.55  # AUC of the blind classifier above which members and others differ
RATES = (0.01, 0.001)  # of false alarms
QUESTION = "Does the final model tell which rows it was trained on?"
ADVERSARY = "whoever has the final model, its base, and a row with its label, and asks if it was in"


@dataclass(frozen=True)
class Side:
    """Rows of one kind, members or others.

    Attributes:
        examples: encoded.
        rows: which row each example is a part of.
        clients: whose each row is.
    """

    examples: list[Example]
    rows: list[int]
    clients: list[str]


def audit(audited: Audited) -> Finding:
    """The finding on the run's final model."""
    if audited.parts.strategy.personal:
        raise NotApplicableError(
            f"with strategy '{audited.experiment.strategy}' every client keeps its own model"
        )
    shards, apart = _honest(audited), audited.experiment.data.audit_holdout > 0
    members = _side(audited, {s.name: s.train for s in shards}, "members")
    others = _side(
        audited,
        {s.name: (s.holdout or s.train.select([])) if apart else s.test for s in shards},
        "others",
    )
    if min(len(members.clients), len(others.clients)) < FEWEST:
        reason = (
            f"{len(members.clients)} members and {len(others.clients)} others are too few; "
            f"{FEWEST} of each are needed. Set data.audit_holdout in the recipe"
        )
        return _finding(audited, (), INVALID, reason, "not measured")
    scores = _scores(audited, members), _scores(audited, others)
    measures = _measures(audited.claim, scores, members, others)
    guesses = blind.guesses(members.examples, others.examples, audited.experiment.seed)
    differ = ranking.delong(*guesses, "AUC of a blind bag of words, members against others")
    validity = (
        f"others are {'rows of data.audit_holdout' if apart else 'test rows (no holdout was set)'};"
        f" a blind bag of words tells them from members with AUC {differ.value:.3f} "
        f"[{differ.low:.3f}, {differ.high:.3f}], where {DIFFERENT} is allowed"
    )
    first = next(iter(scores[0]))
    found = [ranking.caught(scores[0][first], scores[1][first], rate) for rate in RATES]
    verdict, reason = _verdict(audited.claim, measures[0], found, differ)
    return _finding(audited, (*measures, differ), verdict, reason, validity)


def _honest(audited: Audited) -> list[Shard]:
    """The shards of clients that train on the rows as they are."""
    names = [shard.name for shard in audited.shards]
    malicious = audited.parts.attack.malicious(names)
    return [shard for shard in audited.shards if shard.name not in malicious]


def _side(audited: Audited, held: dict[str, Dataset], kind: str) -> Side:
    """At most `LIMIT` random rows of all clients, encoded as the task does."""
    task, model = audited.parts.task, audited.model
    places = [(name, row) for name, rows in sorted(held.items()) for row in range(len(rows))]
    order = permutation(len(places), audited.experiment.seed, "audit", kind)[:LIMIT]
    drawn: dict[str, list[int]] = {}
    for name, row in sorted(places[i] for i in order):
        drawn.setdefault(name, []).append(row)
    side = Side([], [], [])
    for name, own in drawn.items():
        chosen = held[name].select(own)
        if task.label_column:  # a rare label may have gone to the rows set aside
            known = [str(label) in model.labels for label in chosen[task.label_column]]
            chosen = chosen.select(np.flatnonzero(known).tolist())
        limit = audited.experiment.model.max_length
        examples = task.encode(chosen, model.tokenizer, model.labels, limit)
        begin = len(side.clients)
        side.examples.extend(examples)
        side.rows.extend(begin + e.get("row", [n])[0] for n, e in enumerate(examples))
        side.clients.extend([name] * len(chosen))
    return side


def _scores(audited: Audited, side: Side) -> dict[str, Scores]:
    """Each statistic of each row, the deciding one first."""
    model, task = audited.model, audited.parts.task
    if not isinstance(task, CausalLM):
        return likelihoods.of_classes(model, task, side.examples)
    tokens = likelihoods.tokens_of(model, task, side.examples, side.rows)
    return likelihoods.of_tokens(tokens, len(side.clients))


def _measures(
    claim: Claim | None,
    scores: tuple[dict[str, Scores], dict[str, Scores]],
    members: Side,
    others: Side,
) -> list[Measure]:
    """The deciding statistic over all rows, the others, and the deciding one client by client."""
    first, *rest = scores[0]
    measures = _told(claim, scores[0][first], scores[1][first], first, "")
    measures += [ranking.delong(scores[0][s], scores[1][s], f"AUC of the {s}") for s in rest]
    owners = np.array(members.clients), np.array(others.clients)
    for client in sorted(set(members.clients) & set(others.clients)):
        own = [side[first][who == client] for side, who in zip(scores, owners, strict=True)]
        if min(map(len, own)) >= FEWEST:
            measures += _told(claim, own[0], own[1], first, client)
    return measures


def _told(
    claim: Claim | None, members: Scores, others: Scores, statistic: str, subject: str
) -> list[Measure]:
    measures = [ranking.delong(members, others, f"AUC of the {statistic}", subject)]
    for rate in RATES:
        found = ranking.caught(members, others, rate)
        name = f"share of members found at {rate:.1%} false alarms by the {statistic}"
        method = f"Clopper-Pearson, {len(members):,} members"
        most = allowed(claim, found.passes) if claim else None
        ends = (found.low, found.high)
        measures.append(Measure(name, found.share, *ends, method, subject, most))
    return measures


def allowed(claim: Claim, false_alarms: float) -> float:
    """What a test may find at most of the members under a promise."""
    return min(1.0, math.exp(min(claim.epsilon, 700.0)) * false_alarms + claim.delta)


def _verdict(
    claim: Claim | None, auc: Measure, found: Sequence[Caught], differ: Measure
) -> tuple[Verdict, str]:
    if differ.value > DIFFERENT:
        return INVALID, (
            f"members and others differ by themselves: a blind bag of words has AUC "
            f"{differ.value:.3f}, above {DIFFERENT}. Set data.audit_holdout in the recipe"
        )
    if claim is None:
        return OPEN, f"nothing is promised; AUC {auc.value:.3f} [{auc.low:.3f}, {auc.high:.3f}]"
    if all(allowed(claim, one.passes) >= 1 for one in found):
        return INVALID, (
            f"the measurement could not have contradicted the claim: epsilon = "
            f"{claim.epsilon:.3g} allows that every member is found at all these rates of false "
            f"alarms; AUC {auc.value:.3f} [{auc.low:.3f}, {auc.high:.3f}]"
        )
    texts = []
    for one in found:
        most = allowed(claim, one.passes)
        texts.append(
            f"at {one.rate:.1%} false alarms (below {one.passes:.2%} with 97.5 % confidence) at "
            f"least {one.low:.2%} of the members, where {most:.2%} are allowed"
        )
        if one.low > most:
            return BROKEN, f"{texts[-1]} by epsilon = {claim.epsilon:.3g}"
    return HOLDS, f"{'; '.join(texts)} by epsilon = {claim.epsilon:.3g}"


def _finding(
    audited: Audited,
    measures: tuple[Measure, ...],
    verdict: Verdict,
    reason: str,
    validity: str,
) -> Finding:
    claim = audited.claim
    return Finding(
        audit="membership",
        question=QUESTION,
        adversary=ADVERSARY,
        measures=measures,
        claim=claim.text if claim else "none",
        verdict=verdict,
        reason=reason,
        validity=validity,
    )
