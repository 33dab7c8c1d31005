"""What a comparison leaves in its study's folder, for people, papers and other programs."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from fedtune.studies import page, tables
from fedtune.studies.comparison import Arm, Audit, Comparison, Condition, Score

# One number a row: what it is (table, name), what it is of, and the value. Empty where it does not
# apply; `other` holds a value that is no number.
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("table", "condition", "arm", "role", "kind")),
        *((name, pa.string()) for name in ("protocol", "metric")),
        ("seed", pa.int64()),
        ("client", pa.string()),
        ("round", pa.int64()),
        ("name", pa.string()),
        ("value", pa.float64()),
        ("other", pa.string()),
    ]
)
Row = dict[str, Any]


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write comparison.json, .csv, .parquet, .md, .tex and .html; returns where they are."""
    ends = ("json", "csv", "parquet", "md", "tex", "html")
    paths = [folder / f"comparison.{end}" for end in ends]
    table = pa.Table.from_pylist(list(rows(comparison)), schema=SCHEMA)
    paths[0].write_text(comparison.to_json() + "\n", encoding="utf-8")
    pa_csv.write_csv(table, paths[1])
    pq.write_table(table, paths[2])
    paths[3].write_text(tables.markdown(comparison), encoding="utf-8")
    paths[4].write_text(tables.latex(comparison), encoding="utf-8")
    page.write(comparison, paths[5])
    return paths


def rows(comparison: Comparison) -> Iterator[Row]:
    """Every number of a comparison, one a row."""
    for condition in comparison.conditions:
        for arm in condition.arms:
            of: Row = {
                "condition": condition.name,
                "arm": arm.name,
                "role": arm.role,
                "kind": arm.kind,
            }
            for row in _arm(arm):
                yield of | row
        yield from _ranks(condition)
    for tuned in comparison.tuning:
        of = {"table": "tuning", "condition": tuned.condition, "arm": tuned.arm}
        of |= {"metric": tuned.metric}
        for number, trial in enumerate(tuned.trials):
            at = of | {"round": number, "name": tuned.key}
            yield at | _value(trial.value)
            yield at | {"name": "score", "value": trial.score, "other": trial.reason or None}
            yield at | {"name": "seconds", "value": trial.seconds}
        yield of | {"name": f"chosen {tuned.key}"} | _value(tuned.chosen)
    for failure in comparison.failures:
        of = {"table": "failures", "condition": failure.condition, "arm": failure.arm}
        yield of | {"seed": failure.seed, "name": "reason", "other": failure.reason}


def _arm(arm: Arm) -> Iterator[Row]:
    for score in arm.scores:
        yield from _score(score)
    yield from _cost(arm)
    for held in arm.clients:
        at: Row = {"table": "clients", "seed": held.seed, "client": held.client}
        yield at | {"name": "examples", "value": held.examples}
        yield at | {"name": "test_rows", "value": held.test_rows}
        for metric, value in held.values.items():
            yield at | {"metric": metric, "name": "value", "value": value}
    for curve in arm.curves:
        series: list[tuple[str, str, Sequence[float | None]]] = [
            *(("value", metric, values) for metric, values in curve.values.items()),
            ("bytes", "", curve.bytes),
            ("seconds", "", curve.seconds),
            *((name, "", values) for name, values in curve.aggregation.items()),
        ]
        for name, metric, values in series:
            for round, number in zip(curve.rounds, values, strict=True):
                at = {"table": "curves", "seed": curve.seed, "round": round, "name": name}
                yield at | {"metric": metric or None, "value": number}
    for name, value in arm.aggregation.items():
        yield {"table": "aggregation", "name": name, "value": value}
    for audit in arm.audits:
        yield from _audit(audit)
    for key, setting in arm.settings.items():
        yield {"table": "settings", "name": key} | _value(setting)


def _audit(audit: Audit) -> Iterator[Row]:
    of: Row = {"table": "audits", "metric": f"{audit.audit}: {audit.measure}"}
    for seed, value in zip(audit.seeds, audit.values, strict=True):
        yield of | {"seed": seed, "name": "value", "value": value}
    numbers = {"mean": audit.mean, **_ends("interval", audit.interval), "allowed": audit.allowed}
    for name, number in numbers.items():
        yield of | {"name": name, "value": number}
    for verdict, count in audit.verdicts.items():
        yield of | {"name": verdict, "value": count}


def _score(score: Score) -> Iterator[Row]:
    of: Row = {"table": "scores", "protocol": score.protocol, "metric": score.metric}
    for seed, value in zip(score.seeds, score.values, strict=True):
        yield of | {"seed": seed, "name": "value", "value": value}
    numbers: dict[str, float | None] = {
        "mean": score.mean,
        **_ends("interval", score.interval),
        **_ends("bootstrap", score.bootstrap),
        "worst": score.worst,
        "spread": score.spread,
    }
    if gap := score.difference:
        for seed, value in zip(gap.seeds, gap.values, strict=True):
            yield of | {"seed": seed, "name": "difference", "value": value}
        numbers |= {
            "difference_mean": gap.mean,
            **_ends("difference_interval", gap.interval),
            **_ends("difference_bootstrap", gap.bootstrap),
            "p": gap.p,
            "p_holm": gap.p_holm,
            "family": gap.family,
            "p_permutation": gap.p_permutation,
            "p_smallest": gap.p_smallest,
        }
    for name, number in numbers.items():
        yield of | {"name": name, "value": number}


def _ends(name: str, interval: Any) -> dict[str, float | None]:
    low, high = (interval.low, interval.high) if interval else (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def _cost(arm: Arm) -> Iterator[Row]:
    seeds = [curve.seed for curve in arm.curves]
    for name, values in vars(arm.cost).items():
        for seed, value in zip(seeds, values or (), strict=bool(values)):
            yield {"table": "cost", "seed": seed, "name": name, "value": value}


def _ranks(condition: Condition) -> Iterator[Row]:
    for ranking in condition.rankings:
        for rank in ranking.ranks:
            of = {"table": "ranking", "condition": condition.name, "arm": rank.arm}
            of |= {"protocol": ranking.protocol, "metric": ranking.metric}
            for name in ("mean", "low", "high", "best"):
                yield of | {"name": name, "value": getattr(rank, name)}


def _value(value: object) -> Row:
    """A setting as a number where it is one, else as text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"value": float(value)}
    return {"other": None if value is None else str(value)}
