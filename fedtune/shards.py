"""Shards: the rows of each client of a simulation, or of one institution.

Where a source has no test rows, each client holds out a part of its own. While settings are tuned,
`data.validation_fraction` puts a part of the training rows in the place of the test rows, which
then nobody looks at. `data.audit_holdout` sets rows aside that are neither trained nor tested on:
drawn at random of the same rows as those trained on, they are what an audit of membership needs.
"""

import bisect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from fedtune.components import build
from fedtune.config import NAME, DataSettings
from fedtune.data import SOURCES
from fedtune.dealing import permutation
from fedtune.errors import RecipeError
from fedtune.files import read_file, require
from fedtune.partitions import FEWER, PARTITIONS


@dataclass(frozen=True)
class Shard:
    """One client's rows; `name` matches `config.NAME`.

    Attributes:
        name: of the client.
        train: rows that it learns from.
        test: rows that models are tested on.
        holdout: rows for audits, None where none are set aside.
    """

    name: str
    train: Dataset
    test: Dataset
    holdout: Dataset | None = None


def tests_among(rows: int, fraction: float) -> int:
    """How many of a client's rows are held out: at least one of two, and never all."""
    return min(rows - 1, max(1, round(rows * fraction))) if fraction and rows > 1 else 0


def _hold_out(
    name: str, rows: Dataset, count: int, seed: int, purpose: str = "held-out rows"
) -> Shard:
    order = permutation(len(rows), seed, purpose, name)
    return Shard(name, rows.select(sorted(order[count:])), rows.select(sorted(order[:count])))


def _parted(shard: Shard, data: DataSettings, seed: int) -> Shard:
    """The shard without the training rows that are for audits or for validation.

    Audits choose first, so that theirs are the same while settings are tuned. `data.minimum` rows
    remain to train on, so a recipe that runs can be tuned and audited.
    """
    holdout = None
    if data.audit_holdout:
        count = _spared(shard, data, data.audit_holdout)
        apart = _hold_out(shard.name, shard.train, count, seed, "audit rows")
        shard, holdout = replace(shard, train=apart.train), apart.test
    if data.validation_fraction:
        count = _spared(shard, data, data.validation_fraction)
        shard = _hold_out(shard.name, shard.train, count, seed, "validation rows")
    return replace(shard, holdout=holdout)


def _spared(shard: Shard, data: DataSettings, fraction: float) -> int:
    rows = len(shard.train)
    return min(tests_among(rows, fraction), max(0, rows - data.minimum))


def _require_rows(shard: Shard, data: DataSettings, held_out: bool, remedy: str) -> Shard:
    if len(shard.train) < data.minimum:
        besides = f" beside {len(shard.test)} held out for tests" if held_out else ""
        raise RecipeError(
            f"Client '{shard.name}' would have {len(shard.train)} training rows{besides}, but "
            f"data.minimum = {data.minimum}. {remedy}"
        )
    return shard


def load(data: DataSettings, seed: int) -> list[Shard]:
    """The clients of a simulation, sorted by name; the same for the same settings and seed.

    Raises:
        RecipeError: the source's rows are wrong, or their partition leaves a client too few.
    """
    source = build(data.source, SOURCES, "data.source")
    partition = build(data.partition, PARTITIONS, "data.partition")
    if partition.counted != bool(data.clients):
        expected = (
            "above 0" if partition.counted else "0, since the column's values are the clients"
        )
        raise RecipeError(
            f"data.clients = {data.clients} must be {expected} with data.partition = "
            f'"{data.partition}".'
        )
    rows = source.load()
    train, test = rows.train, rows.test
    fraction = data.test_fraction if test is None else 0.0
    # The fewest rows of which data.minimum remain when the test rows are held out.
    least = bisect.bisect_left(
        range(math.ceil(data.minimum / (1 - fraction)) + 2),
        data.minimum,
        key=lambda count: count - tests_among(count, fraction),
    )
    if data.clients * least > len(train):
        raise RecipeError(
            f"{len(train)} training rows cannot give {data.clients} clients {least} each "
            f"(data.minimum = {data.minimum}, data.test_fraction = {fraction}). {FEWER}."
        )
    held = dict(sorted(partition.split(train, data.clients, least, seed).items()))
    if test is None:
        shards = [
            _hold_out(name, train.select(own), tests_among(len(own), fraction), seed)
            for name, own in held.items()
        ]
    else:
        tests = partition.assign(test, train, held, seed)
        shards = [Shard(n, train.select(own), test.select(tests[n])) for n, own in held.items()]
    shards = [_parted(shard, data, seed) for shard in shards]
    return [_require_rows(shard, data, test is None, partition.remedy) for shard in shards]


def institution(
    name: str, train: str | Path, test: str | Path | None, data: DataSettings, seed: int
) -> Shard:
    """One institution's own rows, from the files that its node-config names.

    Args:
        name: of the client.
        train: a file that `data.read_file` reads.
        test: another, or None to hold out `data.test_fraction` of the rows.
        data: the recipe's; its source and partition belong to simulations and are not looked at.
        seed: of the experiment.

    Raises:
        RecipeError: the name or a file is wrong, or there are too few rows.
    """
    if not NAME.fullmatch(name):
        raise RecipeError(
            f"'{name}' is no client name: expected letters a-z, digits, '.', '_' or '-', at most "
            "64, the first a letter or digit. Correct client in the node-config."
        )
    rows = read_file(train)
    if test is None:
        shard = _hold_out(name, rows, tests_among(len(rows), data.test_fraction), seed)
    else:
        shard = Shard(name, rows, read_file(test))
    shard = _parted(shard, data, seed)
    return _require_rows(shard, data, test is None, "Add rows, or lower data.minimum.")


def pooled(shards: Sequence[Shard], name: str = "centralized") -> Shard:
    """All rows together, in the order of the shards: the centralized reference."""
    apart = [shard.holdout for shard in shards if shard.holdout is not None]
    return Shard(
        name,
        concatenate_datasets([shard.train for shard in shards]),
        concatenate_datasets([shard.test for shard in shards]),
        concatenate_datasets(apart) if apart else None,
    )


def mix(shards: Sequence[Shard], column: str) -> dict[str, dict[str, int]]:
    """How many training rows of each value of `column` each client has.

    Raises:
        RecipeError: there is no such column.
    """
    counts: dict[str, dict[str, int]] = {}
    for shard in shards:
        require(shard.train, [column], f"The training rows of client '{shard.name}'")
        found: Mapping[Any, int] = Counter(shard.train[column])
        counts[shard.name] = {str(value): found[value] for value in sorted(found, key=str)}
    return counts


def units(shard: Shard, column: str) -> int:
    """What record-level privacy protects in a shard: training rows, or values of a column of them.

    Raises:
        RecipeError: the rows have no such column.
    """
    if not column:
        return len(shard.train)
    require(shard.train, [column], f"privacy.unit: the rows of '{shard.name}'")
    return len(set(shard.train[column]))
