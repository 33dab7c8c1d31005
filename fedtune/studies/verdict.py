"""What a comparison says, in sentences: who is best, and what cannot be told from noise.

One rule decides every "better" and "worse": the paired difference to the baseline has p < 0.05
after Holm's correction over its family. All else is noise, however far apart two means lie, and
with one seed nothing is told at all.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from fedtune.studies.comparison import PROTOCOLS, Arm, Comparison, Condition, Score

LEVEL = 0.05
FEW = 6  # seeds, of which a bootstrap is clearly too narrow
BETTER, WORSE, NOISE, UNTESTED = "better", "worse", "within noise", "not tested"
BEST = {"higher": "highest", "lower": "lowest"}
MODELS = {"global": "global model", "personal": "personal models"}


@dataclass(frozen=True)
class Verdict:
    """The sentences.

    Attributes:
        overall: of the whole study, a paragraph.
        conditions: those of each condition, by protocol, in the study's order.
    """

    overall: str
    conditions: list[dict[str, list[str]]]


def verdict(comparison: Comparison) -> Verdict:
    """What the deciding metric says."""
    overall = [s for protocol in PROTOCOLS for s in _overall(comparison, protocol)]
    overall += _caveats(comparison)
    conditions = []
    for condition in comparison.conditions:
        said = {p: _condition(comparison, condition, p) for p in PROTOCOLS}
        conditions.append(
            {protocol: sentences for protocol, sentences in said.items() if sentences}
        )
    return Verdict(" ".join(overall), conditions)


def reading(score: Score, direction: str) -> str:
    """How a score compares with the baseline's: better, worse, within noise or not tested."""
    difference = score.difference
    if difference is None or difference.p_holm is None:
        return UNTESTED
    if difference.p_holm >= LEVEL:
        return NOISE
    return BETTER if (difference.mean > 0) == (direction == "higher") else WORSE


def competitors(
    comparison: Comparison, condition: Condition, protocol: str
) -> list[tuple[Arm, Score]]:
    """Strategies with a score of the deciding metric, the best mean first."""
    found = [(arm, arm.score(protocol, comparison.metric)) for arm in condition.arms]
    scored = [(arm, s) for arm, s in found if s is not None and arm.role == "strategy"]
    sign = -1 if comparison.direction == "higher" else 1
    return sorted(scored, key=lambda pair: sign * pair[1].mean)


def listed(names: list[str]) -> str:
    """Names in a sentence: "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _fields(comparison: Comparison, protocol: str) -> Iterator[list[tuple[Arm, Score]]]:
    """The competitors of each condition in which two or more have a score."""
    for condition in comparison.conditions:
        if len(pairs := competitors(comparison, condition, protocol)) > 1:
            yield pairs


def _overall(comparison: Comparison, protocol: str) -> list[str]:
    """Who leads where, and how many differences to the baseline are more than noise."""
    fields = list(_fields(comparison, protocol))
    if not fields:
        return []
    metric = comparison.metric.replace("_", " ")
    leads = Counter(pairs[0][0].name for pairs in fields)
    where = [
        name + ("" if len(fields) == 1 else f" ({count} of {len(fields)} conditions)")
        for name, count in leads.most_common()
    ]
    best = f"the {BEST[comparison.direction]} mean {metric} is that of {listed(where)}"
    sentences = [f"{MODELS[protocol].capitalize()}: {best}."]
    read = [
        (arm.name, reading(score, comparison.direction))
        for pairs in fields
        for arm, score in pairs
        if arm.name != comparison.baseline
    ]
    return sentences + _told(comparison.baseline, read)


def _told(baseline: str, read: list[tuple[str, str]]) -> list[str]:
    """What pairs of strategy and reading amount to."""
    tested = [pair for pair in read if pair[1] != UNTESTED]
    if not read:
        return []
    if not tested:
        return [f"No difference to the baseline {baseline} could be tested, so none is claimed."]
    parts = []
    for word in (BETTER, WORSE):
        counts = Counter(name for name, r in tested if r == word)
        if counts:
            names = [n if k == 1 else f"{n} ({k} conditions)" for n, k in counts.items()]
            parts.append(f"{listed(names)} {'is' if len(names) == 1 else 'are'} {word}")
    noise = sum(r == NOISE for _, r in tested)
    if not parts:
        one = "the one difference is" if noise == 1 else f"all {noise} differences are"
        return [f"None can be told from the baseline {baseline}: {one} within noise."]
    if noise:
        parts.append(f"the other {noise} of {len(tested)} differences are within noise")
    if noise == 1:
        parts[-1] = "the one other difference is within noise"
    return [f"Against the baseline {baseline}, {'; '.join(parts)}."]


def _caveats(comparison: Comparison) -> list[str]:
    sentences = []
    count = len(comparison.seeds)
    smallest = 2.0 ** (1 - count)
    if count == 1:
        sentences.append("One seed shows no spread between runs: repeat with three or more.")
    elif smallest >= LEVEL:
        sentences.append(
            f"With {count} seeds only large and steady differences can show: a test that assumes "
            f"no distribution cannot go below p = {smallest:.3g}."
        )
    if comparison.failures:
        failed, cells = len(comparison.failures), comparison.cells
        sentences.append(
            f"{failed} of {cells} cells failed and {'is' if failed == 1 else 'are'} missing here."
        )
    return sentences


def _condition(comparison: Comparison, condition: Condition, protocol: str) -> list[str]:
    """The best, its distance to the baseline, who else may be best, and the yardsticks."""
    pairs = competitors(comparison, condition, protocol)
    if not pairs:
        return []
    metric = comparison.metric.replace("_", " ")
    arm, score = pairs[0]
    first = f"{arm.name} has the {BEST[comparison.direction]} mean {metric}, {score.mean:.3f}"
    if score.interval:
        first += f" (95 % interval {score.interval.low:.3f} to {score.interval.high:.3f})"
    sentences = [first + _against(comparison, arm, score) + "."]
    ranking = next((r for r in condition.rankings if r.protocol == protocol), None)
    if ranking and ranking.ranks:
        open_to = [r for r in ranking.ranks if r.low <= 1]
        top = max(ranking.ranks, key=lambda r: r.best)
        said = f"{top.arm} is the best in {100 * top.best:.0f} % of bootstrap draws"
        others = [r.arm for r in open_to if r.arm != top.arm]
        said += f"; {listed(others)} may be too" if others else ""
        seeds = len(comparison.seeds)
        said += f" (of {seeds} seeds, which understate the spread)" if seeds < FEW else ""
        sentences.append(said + ".")
    references = [
        f"{a.name} {s.mean:.3f}"
        for a in condition.arms
        if a.role == "reference" and (s := a.score(protocol, comparison.metric))
    ]
    if references:
        sentences.append(f"For orientation: {listed(references)}.")
    return sentences


def _against(comparison: Comparison, arm: Arm, score: Score) -> str:
    if arm.name == comparison.baseline:
        return ", and is the baseline"
    if score.difference is None:
        return ""
    p = score.difference.p_holm
    mean = f"{score.difference.mean:+.3f}".replace("-", "\N{MINUS SIGN}")
    gap = f", {mean} against the baseline {comparison.baseline}"
    if p is None:
        return f"{gap}: not tested"
    verdict = reading(score, comparison.direction)
    return f"{gap}: {verdict} (Holm-corrected p = {p:.2g})"
