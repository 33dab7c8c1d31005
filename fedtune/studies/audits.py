"""What audits found in the cells of an arm, seed by seed."""

import math
import statistics as plain
from collections import Counter
from collections.abc import Mapping, Sequence

from fedtune.audits import kept
from fedtune.audits.finding import Finding, Measure
from fedtune.studies import statistics
from fedtune.studies.comparison import Audit, Interval
from fedtune.studies.evidence import Evidence

MOST = 3  # measures of an audit in a comparison; a cell's audit.json has all
NOTE = (
    "Audits: the leading measures of each audit of every finished cell, mean over seeds with "
    "Student's t interval (of one seed the audit's own interval). An audit that was invalid could "
    "not have succeeded, or misleads: its numbers count, and the verdicts and open marks say so. A "
    "cell's audit.json has every measure, with adversary and validity."
)


def of(evidence: Evidence, names: Sequence[str]) -> list[Audit]:
    """The leading measures of each named audit; [] of the untuned model, which is no cell."""
    if evidence.untuned or not names:
        return []
    found = {seed: kept.read(run.folder) for seed, run in evidence.runs.items()}
    made = []
    for name in names:
        own = {seed: findings[name] for seed, findings in found.items() if name in findings}
        made += _of(name, own) if own else []
    return made


def leading(finding: Finding) -> tuple[Measure, ...]:
    """The first measures, as far as they are of one subject."""
    first = finding.measures[0].subject if finding.measures else ""
    return tuple(m for m in finding.measures if m.subject == first)[:MOST]


def _of(name: str, findings: Mapping[int, Finding]) -> list[Audit]:
    verdicts = dict(Counter(finding.verdict for finding in findings.values()))
    values: dict[str, dict[int, Measure]] = {}
    reason = ""
    for seed, finding in findings.items():
        if not finding.measures:
            reason = reason or finding.reason
        for measure in leading(finding):
            values.setdefault(measure.title, {})[seed] = measure
    if not values:
        return [Audit(name, "", [], [], None, None, None, verdicts, reason)]
    return [_measure(name, title, by, verdicts, reason) for title, by in values.items()]


def _measure(
    name: str, title: str, by: Mapping[int, Measure], verdicts: dict[str, int], reason: str
) -> Audit:
    values = [measure.value for measure in by.values()]
    limits = [measure.allowed for measure in by.values()]
    allowed = [limit for limit in limits if limit is not None and math.isfinite(limit)]
    return Audit(
        audit=name,
        measure=title,
        seeds=list(by),
        values=values,
        mean=plain.fmean(values),
        interval=_interval(list(by.values())),
        allowed=plain.fmean(allowed) if allowed else None,
        verdicts=verdicts,
        reason=reason,
    )


def _interval(measures: Sequence[Measure]) -> Interval | None:
    if len(measures) > 1:
        found = statistics.t_interval([measure.value for measure in measures])
        return found and Interval(*found, f"Student t over {len(measures)} seeds")
    (only,) = measures
    if only.low is None or only.high is None:
        return None
    return Interval(only.low, only.high, only.method)
