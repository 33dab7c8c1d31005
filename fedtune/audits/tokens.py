"""What one message reveals: which tokens stood in a client's rows.

A linear layer's gradient is a sum of outer products g_t x_t', so its rows lie in the span of the
inputs x_t that the layer saw. Where the input of a layer follows from the token alone, as that of
the first attention layer does, whoever holds the public base model knows x_v of every token v of
the vocabulary and asks how much of it the message's change explains:

    res_v = |x_v - W' W x_v| / |x_v|,     W: right singular vectors of dA, sigma > 1e-5 sigma_1

Tokens that were there have the smaller residuals. Of a message with B alone, A x_v is what dB saw;
dB has all directions of that small space, so the directions are weighed by their singular values
instead of being all in or all out: 1 - |S W A x_v| / (sigma_1 |A x_v|).

The query's, the key's and the value's projections read one input, so their changes are looked at
together. In an upper layer x_v is the hidden state of the token by itself, all that an adversary
has without its neighbours. Present and absent tokens are compared at equal frequency in the whole
corpus: that a common word was there is no secret. As a control the same tokens are looked for in
the message of another client, in whose rows the absent ones may stand: it should tell nothing of
the present ones.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedtune.adapter import Adapter
from fedtune.audits import inputs, payloads, ranking
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
from fedtune.audits.payloads import Played
from fedtune.dealing import permutation
from fedtune.privacy.mechanism import DISTRIBUTED
from fedtune.tasks.task import Example

COHORT = 4  # clients whose messages are added up
LIMIT = 400  # tokens on each side
FEWEST = 20  # tokens on each side, with which anything can be said
BOUND = 0.6  # of the AUC's interval under a claimed protection
SMALL = 1e-5  # singular values beside the largest that are rounding
QUESTION = "Which tokens stood in a client's rows, by its message of round 1 alone?"


def audit(audited: Audited) -> Finding:
    """The finding on the client with the fewest rows, whose message hides the least."""
    _require_messages(audited)
    played = payloads.play(audited, COHORT)
    seed, victim = audited.experiment.seed, played.cohort[0]
    pairs = matched(played, seed)
    readers = inputs.readers(played.model, played.train[victim][0]["input_ids"])
    used = [path for path in readers.paths if _factor(path, played.sent)]
    if not used:
        raise NotApplicableError(
            f"strategy '{audited.experiment.strategy}' sends neither A nor B of the attention "
            "layer that tokens enter first"
        )
    validity = (
        f"{len(pairs)} present and {len(pairs)} absent tokens of '{victim}', equally frequent in "
        f"all training and test rows together; absent ones stand in no row of {len(played.cohort)} "
        f"clients. Read from {', '.join(used)}"
        f"{'' if readers.alone else ', by hidden states of single tokens'}"
    )
    if len(pairs) < FEWEST:
        reason = f"{len(pairs)} tokens a side are too few; {FEWEST} are needed"
        return _finding(audited, (), INVALID, reason, validity)
    states = inputs.states(played.model, readers, [token for pair in pairs for token in pair])
    measures = _measures(audited, played, used, states)
    verdict, reason = _verdict(audited.claim, measures[0])
    return _finding(audited, measures, verdict, reason, validity)


def _require_messages(audited: Audited) -> None:
    strategy = audited.parts.strategy
    if strategy.pools or not strategy.joins:
        raise NotApplicableError(
            f"with strategy '{audited.experiment.strategy}' no client sends an update"
        )
    if audited.experiment.privacy.mode == DISTRIBUTED:
        raise NotApplicableError(
            f"privacy.mode = '{DISTRIBUTED}' makes its noise behind the masks, where this audit "
            "does not follow it"
        )


def _factor(path: str, change: Adapter) -> str:
    """The tensor of a module that is looked at: A where it was sent, else B, "" for neither."""
    names = (f"{path}.lora_{factor}.weight" for factor in ("A", "B"))
    return next((name for name in names if name in change), "")


def _measures(
    audited: Audited, played: Played, used: Sequence[str], states: Tensor
) -> tuple[Measure, ...]:
    """The AUC of each payload: first of what the adversary sees of whom a promise is made."""
    e, many = audited.experiment, len(played.cohort)
    sent: tuple[str, Adapter | None] = ("as sent", played.sent)
    joined = (f"mean of {many} clients", played.joined)
    summed = e.privacy.mode == "client" or audited.parts.secure.masks
    shown = [joined, sent] if summed else [sent, joined]
    if e.privacy.mode != "none":
        shown.append(("without protection", played.raw))
    shown.append(("by the message of another client, as a control", played.other))
    found = []
    for what, change in shown:
        if change is None:
            continue
        scores = -unexplained(states, played.start, change, used).numpy()
        name = f"AUC of token presence, {what}"
        key = (e.seed, "tokens", what)
        found.append(ranking.bootstrapped(scores[0::2], scores[1::2], name, *key))
    if audited.claim:
        found[0] = replace(found[0], allowed=BOUND)
    return tuple(found)


def unexplained(states: Tensor, start: Adapter, change: Adapter, used: Sequence[str]) -> Tensor:
    """The part of each token's input that a change does not explain, (tokens,) in [0, 1].

    Args:
        states: x_v, (tokens, width), in float64.
        start: the factors before the change.
        change: of A or of B.
        used: the modules to look at together.
    """
    names = [_factor(path, change) for path in used]
    if "lora_A" in names[0]:
        return residual(states, torch.cat([change[name].double() for name in names]))
    first = [start[name.replace("lora_B", "lora_A")].double() for name in names]
    seen = torch.cat([states @ a.T for a in first], dim=1)
    own = [change[name].double() for name in names]
    return residual(seen, torch.block_diag(*own))  # type: ignore[no-untyped-call]


def residual(states: Tensor, change: Tensor) -> Tensor:
    """|x - W' W x| / |x| for each row x of `states`; weighed where W has all directions.

    A change that is zero explains nothing.
    """
    _, s, vt = torch.linalg.svd(change, full_matrices=False)
    kept = s > SMALL * s[0]
    if not kept.any():
        return torch.ones(len(states), dtype=torch.float64)
    s, w = s[kept], vt[kept]
    seen, size = states @ w.T, states.norm(dim=1)
    whole = len(w) == states.shape[1]
    rest: Tensor = (
        size - (seen * (s / s[0])).norm(dim=1) if whole else (states - seen @ w).norm(dim=1)
    )
    return rest.div(size)


def matched(played: Played, seed: int) -> list[tuple[int, int]]:
    """Pairs of a token of the first client's rows and one of no row of the cohort.

    Both are equally frequent in the whole corpus, to a factor of two. Which tokens are paired, and
    which pairs are kept of many, is drawn from the seed.
    """
    special = set(played.model.tokenizer.all_special_ids)
    train = {name: counted(rows) for name, rows in played.train.items()}
    everything: Counter[int] = sum(train.values(), counted(played.tests))
    present = set(train[played.cohort[0]]) - special
    theirs: set[int] = set().union(*(train[name] for name in played.cohort))
    absent = set(everything) - theirs - special
    pairs: list[tuple[int, int]] = []
    sides = [_binned(tokens, everything) for tokens in (present, absent)]
    for size in sorted(sides[0].keys() & sides[1].keys()):
        mine, other = (
            [own[size][i] for i in permutation(len(own[size]), seed, "tokens", side, size)]
            for side, own in enumerate(sides)
        )
        pairs += zip(mine, other, strict=False)
    chosen = permutation(len(pairs), seed, "pairs of tokens")[:LIMIT]
    return [pairs[place] for place in sorted(chosen)]


def counted(rows: Iterable[Example]) -> Counter[int]:
    """How often each token stands in some rows."""
    counts: Counter[int] = Counter()
    for row in rows:
        counts.update(row["input_ids"])
    return counts


def _binned(tokens: Iterable[int], counts: Counter[int]) -> dict[int, list[int]]:
    """Tokens, ascending, by the binary logarithm of how often they stand in the corpus."""
    bins: dict[int, list[int]] = {}
    for token in sorted(tokens):
        bins.setdefault(int(np.log2(counts[token])), []).append(token)
    return bins


def _verdict(claim: Claim | None, exposed: Measure) -> tuple[Verdict, str]:
    low, high = exposed.low or 0.0, exposed.high or 1.0
    found = f"AUC {exposed.value:.3f} [{low:.3f}, {high:.3f}]"
    if claim is None:
        tells = "tells tokens apart" if low > 0.5 else "is not shown to tell tokens apart"
        return OPEN, f"nothing is promised; what is sent {tells}: {found}"
    criterion = f"the interval's upper end must be {BOUND} at most (a proposed criterion)"
    if high <= BOUND:
        return HOLDS, f"{found}; {criterion}"
    if low > 0.5:
        return BROKEN, f"{found}, but {criterion}"
    return INVALID, f"{found} is compatible with chance and with a leak alike; {criterion}"


def _finding(
    audited: Audited, measures: tuple[Measure, ...], verdict: Verdict, reason: str, validity: str
) -> Finding:
    claim = audited.claim
    return Finding(
        audit="tokens",
        question=QUESTION,
        adversary=(
            "whoever reads what leaves a client in round 1, or the mean of some, and has the "
            "public base model and the initial adapter; "
            f"{COHORT} clients at most, those with the fewest rows"
        ),
        measures=measures,
        claim=claim.text if claim else "none",
        verdict=verdict,
        reason=reason,
        validity=validity,
    )
