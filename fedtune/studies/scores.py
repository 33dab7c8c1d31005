"""Evidence as scores, curves and costs: what `comparing.py` puts together.

Everything is computed from the sums that clients measured on their own test rows, so a score over
all rows, a client's own and a bootstrap draw of clients are the same formula over other sums.
"""

import functools
import itertools
import statistics as plain
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedtune.report import LOWER_IS_BETTER, pooled, summarise
from fedtune.studies import statistics
from fedtune.studies.comparison import (
    ClientScore,
    Cost,
    Curve,
    Difference,
    Interval,
    Rank,
    Ranking,
    Score,
)
from fedtune.studies.evidence import Evidence
from fedtune.studies.statistics import Array, Resampling


def score(evidence: Evidence, protocol: str, metric: str, baseline: Evidence | None) -> Score:
    """One metric of an arm; Holm's correction is made when all scores are there."""
    seeds = list(evidence.runs)
    values = [evidence.value(seed, metric) for seed in seeds]
    clients = [_by_client(evidence, seed, metric) for seed in seeds]
    apart = not evidence.pools
    draws = _draws([evidence], seeds, metric)[0] if apart else None
    best = max if metric in LOWER_IS_BETTER else min
    return Score(
        protocol=protocol,
        metric=metric,
        seeds=seeds,
        values=values,
        mean=plain.fmean(values),
        interval=_student(values),
        bootstrap=None if draws is None else _interval(draws, _stages(seeds, whole=False)),
        worst=plain.fmean(best(c) for c in clients) if apart else None,
        spread=plain.fmean(plain.pstdev(c) for c in clients) if apart else None,
        difference=None if baseline in (None, evidence) else difference(evidence, baseline, metric),
    )


def difference(evidence: Evidence, baseline: Evidence | None, metric: str) -> Difference | None:
    """The arm minus the baseline over the seeds that both have, None without any."""
    if baseline is None:
        return None
    seeds = [seed for seed in evidence.runs if seed in baseline.runs]
    if not seeds:
        return None
    values = [evidence.value(s, metric) - baseline.value(s, metric) for s in seeds]
    whole = _unlike([evidence, baseline], seeds)
    ours, theirs = _draws([evidence, baseline], seeds, metric)
    enough = len(seeds) > 1 or not whole
    return Difference(
        seeds=seeds,
        values=values,
        mean=plain.fmean(values),
        interval=_student(values),
        bootstrap=_interval(ours - theirs, _stages(seeds, whole)) if enough else None,
        p=statistics.paired_t(values),
        p_holm=None,
        family=0,
        p_permutation=statistics.sign_flip(values),
        p_smallest=max(2.0 ** (1 - len(seeds)), 2.0**-16),
    )


def corrected(scores: Sequence[tuple[str, Score]]) -> list[Score]:
    """The scores with Holm's correction.

    Args:
        scores: (role, score) of one protocol and metric, of the whole study.
    """
    tests = [s.difference.p if s.difference and role == "strategy" else None for role, s in scores]
    family = sum(p is not None for p in tests)
    made = []
    for (_, one), p in zip(scores, statistics.holm(tests), strict=True):
        gap = one.difference and replace(one.difference, p_holm=p, family=family)
        made.append(replace(one, difference=gap))
    return made


def ranking(arms: Sequence[Evidence], protocol: str, metric: str) -> Ranking | None:
    """Where strategies stand over the seeds that all have, None for fewer than two."""
    seeds = [s for s in (arms[0].runs if arms else ()) if all(s in arm.runs for arm in arms)]
    if len(arms) < 2 or not seeds:
        return None
    draws = np.stack(_draws(arms, seeds, metric))
    found = statistics.standings(draws, higher=metric not in LOWER_IS_BETTER)
    ranks = [
        Rank(arm.name, s.mean, s.low, s.high, s.best) for arm, s in zip(arms, found, strict=True)
    ]
    method = _stages(seeds, _unlike(arms, seeds))
    return Ranking(protocol, metric, method, sorted(ranks, key=lambda rank: rank.mean))


def clients_of(evidence: Evidence) -> list[ClientScore]:
    """Each client's own test rows, by seed; [] where one client held all."""
    if evidence.pools:
        return []
    held = []
    for seed, run in evidence.runs.items():
        about = {str(c["name"]): c for c in run.clients}
        for client, sums in sorted(evidence.own(seed).items()):
            examples, rows = about[client]["examples"], about[client]["test_examples"]
            held.append(ClientScore(seed, client, examples, rows, summarise(sums)))
    return held


def curve(evidence: Evidence, seed: int, metrics: Sequence[str]) -> Curve:
    """One cell, round by round."""
    records = evidence.records(seed)
    clients = len(evidence.own(seed))
    # Where a client's evaluation was set aside, a value would be of other rows than its neighbours.
    whole = [
        summarise(pooled(r)) if len(r.evaluation.get("own", {})) == clients else {} for r in records
    ]
    moved = [r.bytes_up + r.bytes_down if evidence.federated else 0 for r in records]
    told = [r.aggregation for r in records]
    names = sorted(set().union(*told)) if evidence.federated else []
    return Curve(
        seed=seed,
        rounds=[r.round for r in records],
        values={m: [numbers.get(m) for numbers in whole] for m in metrics},
        bytes=list(itertools.accumulate(moved)),
        seconds=list(itertools.accumulate(r.seconds for r in records)),
        aggregation={name: [numbers.get(name) for numbers in told] for name in names},
    )


def cost(evidence: Evidence, curves: Sequence[Curve], metric: str, target: float | None) -> Cost:
    """What an arm took, and what it took to reach the target."""
    records = [evidence.records(c.seed) for c in curves]
    reached = [] if target is None else [_reached(c, metric, target) for c in curves]
    pairs = list(zip(curves, reached, strict=False))
    up = [sum(r.bytes_up for r in rounds) for rounds in records]
    down = [sum(r.bytes_down for r in rounds) for rounds in records]
    return Cost(
        rounds=[c.rounds[-1] for c in curves],
        bytes_up=up if evidence.federated else None,
        bytes_down=down if evidence.federated else None,
        seconds=[c.seconds[-1] for c in curves],
        rounds_to_target=[None if at is None else c.rounds[at] for c, at in pairs],
        bytes_to_target=[None if at is None else c.bytes[at] for c, at in pairs]
        if evidence.federated
        else [],
        seconds_to_target=[None if at is None else c.seconds[at] for c, at in pairs],
    )


def aggregation(curves: Sequence[Curve]) -> dict[str, float]:
    """Diagnostics, mean over all rounds and seeds that have them."""
    found: dict[str, list[float]] = {}
    for each in curves:
        for name, values in each.aggregation.items():
            found.setdefault(name, []).extend(v for v in values if v is not None)
    return {name: plain.fmean(values) for name, values in sorted(found.items()) if values}


def _reached(curve: Curve, metric: str, target: float) -> int | None:
    """The place of the first evaluated round that is as good as the target."""
    lower = metric in LOWER_IS_BETTER
    for place, value in enumerate(curve.values[metric]):
        if value is not None and (value <= target if lower else value >= target):
            return place
    return None


def _by_client(evidence: Evidence, seed: int, metric: str) -> list[float]:
    """The metric of each client that has rows to measure it on."""
    values = statistics.metric_of(metric, evidence.sample(seed, whole=False))
    return [float(value) for value in values if not np.isnan(value)]


def _unlike(arms: Sequence[Evidence], seeds: Sequence[int]) -> bool:
    """Whether arms have other clients in a seed, so that only the seed as a whole is paired."""
    return any(len({frozenset(arm.own(seed)) for arm in arms}) > 1 for seed in seeds)


@functools.lru_cache(maxsize=8)
def _resampling(clients: tuple[int, ...]) -> Resampling:
    return Resampling(clients)


def _draws(arms: Sequence[Evidence], seeds: Sequence[int], metric: str) -> list[Array]:
    """Bootstrap draws of each arm, paired."""
    whole = _unlike(arms, seeds)
    counts = tuple(1 if whole else len(arms[0].own(seed)) for seed in seeds)
    resampling = _resampling(counts)
    return [resampling.means(metric, [arm.sample(s, whole) for s in seeds]) for arm in arms]


def _stages(seeds: Sequence[int], whole: bool) -> str:
    over = ["seeds"] if len(seeds) > 1 else []
    return f"bootstrap over {' and '.join(over + ([] if whole else ['clients']))}"


def _interval(draws: Array, method: str) -> Interval:
    return Interval(*statistics.percentiles(draws), method)


def _student(values: Sequence[float]) -> Interval | None:
    found = statistics.t_interval(values)
    return found and Interval(*found, f"Student t over {len(values)} seeds")
