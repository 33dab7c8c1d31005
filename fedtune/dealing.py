"""Whole rows to whole clients: seeded order, largest remainders, client names, test rows.

What every partition needs beside its partitioner.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from datasets import Dataset

from fedtune.config import NAME
from fedtune.errors import RecipeError
from fedtune.files import require
from fedtune.seeds import seed_of

Held: TypeAlias = dict[str, list[int]]  # client -> the numbers of its rows, ascending
Value: TypeAlias = str | int

TRAIN, TEST = "The training rows", "The test rows"


def permutation(length: int, *key: int | str) -> list[int]:
    """0 ... length - 1 in an order that depends on the key alone."""
    order: list[int] = np.random.default_rng(seed_of(*key)).permutation(length).tolist()
    return order


def apportion(total: int, weights: Sequence[int], *key: int | str) -> list[int]:
    """`total` divided in proportion to `weights` by largest remainders, in whole numbers.

    Equal remainders are ordered by the key, so that no client is favoured by its place.
    """
    quotas = [total * weight // sum(weights) for weight in weights]
    remainders = [total * weight % sum(weights) for weight in weights]
    ties = permutation(len(weights), *key)
    for place in sorted(ties, key=lambda i: -remainders[i])[: total - sum(quotas)]:
        quotas[place] += 1
    return quotas


def names_of(values: Sequence[Value]) -> dict[Value, str]:
    """A client name for each value; a value that is a name already keeps it.

    Other characters become "-". Letters that cannot be written in ASCII (北京) are told apart by a
    hash of the value, which does not depend on the other values.
    """
    names: dict[Value, str] = {v: str(v) for v in sorted(values) if NAME.fullmatch(str(v))}
    taken = set(names.values())
    for value in sorted(set(values) - set(names)):
        plain = unicodedata.normalize("NFKD", str(value)).casefold()
        stem = re.sub(r"[^a-z0-9._-]+", "-", re.sub(r"[\u0300-\u036f]", "", plain)).strip("._-")
        lost = any(letter.isalnum() and not letter.isascii() for letter in plain)
        if lost or not stem:
            digest = f"{seed_of('client', str(value)):016x}"[:8]
            stem = f"{stem[:50] or 'client'}-{digest}"
        name, count = stem[:64], 1
        while name in taken:
            count += 1
            name = f"{stem[:58]}-{count}"
        names[value] = name
        taken.add(name)
    return names


def values_of(rows: Dataset, column: str, source: str) -> list[Value]:
    """A column of text or whole numbers without gaps.

    Raises:
        RecipeError: the column is missing, or a row has another value; `source` says which rows.
    """
    require(rows, [column], source)
    values = list(rows[column])
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str | int) or value == "":
            found = "empty" if value in (None, "") else f"of type {type(value).__name__}"
            raise RecipeError(
                f"{source}, row {number}: column '{column}' is {found}; a partition needs text or "
                "a whole number in every row. Fill it in or remove the row."
            )
    return values


def deal(test: Sequence[Value], train: Sequence[Value], held: Held, seed: int) -> Held:
    """Test rows for each client, in proportion to its share of each value among training rows.

    Every test row goes to exactly one client; a value that nobody trains on is spread evenly.

    Args:
        test: the label of each test row.
        train: the label of each training row.
        held: the training rows of each client.
        seed: of the experiment.
    """
    names = sorted(held)
    counts = [Counter(train[row] for row in held[name]) for name in names]
    dealt: Held = {name: [] for name in names}
    rows_of: dict[Value, list[int]] = {}
    for row, value in enumerate(test):
        rows_of.setdefault(value, []).append(row)
    for value, rows in sorted(rows_of.items()):
        key = (seed, "test rows", value)
        weights = [count[value] for count in counts]
        quotas = apportion(len(rows), weights if any(weights) else [1] * len(names), *key)
        drawn = iter(permutation(len(rows), *key))
        for name, quota in zip(names, quotas, strict=True):
            dealt[name] += [rows[next(drawn)] for _ in range(quota)]
    return {name: sorted(rows) for name, rows in dealt.items()}


def alike(column: str, train: Dataset, test: Dataset) -> tuple[list[Value], list[Value]]:
    """A column of training and of test rows.

    Raises:
        RecipeError: the column is missing or holds text in one and numbers in the other.
    """
    known, asked = values_of(train, column, TRAIN), values_of(test, column, TEST)
    if known and asked and type(known[0]) is not type(asked[0]):
        kinds = f"{type(known[0]).__name__} in the training rows, {type(asked[0]).__name__} in the"
        raise RecipeError(f"Column '{column}' is {kinds} test rows. Write both the same way.")
    return known, asked


def deal_labels(column: str, test: Dataset, train: Dataset, held: Held, seed: int) -> Held:
    """Test rows for each client by its own mix of a column's values; see `deal`."""
    known, asked = alike(column, train, test)
    return deal(asked, known, held, seed)
