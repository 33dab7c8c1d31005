"""Canaries: made-up rows of which a coin decides whether a client trains on them.

Since nobody but the coin decides, whatever a model says of a canary that it says of no other comes
from having trained on it: `fedtune audit` guesses the coins from the finished model. A canary is
words of its client's own rows, drawn alike whether frequent or rare and in any order, so that
nothing but the canary itself teaches it; its label, where rows have one, is drawn too. It is a row
like any other to the client, its privacy accounting and its report, and it stands behind the real
rows, which hence are the same with and without it. Which rows are drawn, for whom, and every coin
come from the experiment's seed, each for a purpose of its own, so an auditor can draw them again.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets

from fedtune import shards
from fedtune.config import DataSettings
from fedtune.errors import RecipeError
from fedtune.seeds import seed_of, uniform
from fedtune.shards import Shard
from fedtune.tasks.task import Task, texts

WORDS = 12  # of a canary's text
LETTERS = 12  # of a word: text without spaces has none shorter than a sentence
WHOLE = ("int32", "int64")


@dataclass(frozen=True)
class Canary:
    """One made-up row.

    Attributes:
        client: whose row it is, or would be.
        row: every column of the client's rows.
        inserted: what the coin said.
    """

    client: str
    row: dict[str, Any]
    inserted: bool


def load(data: DataSettings, seed: int, task: Task) -> list[Shard]:
    """The clients of a simulation as they train, their canaries among their rows.

    Raises:
        RecipeError: the rows or their partition are wrong, or give no canaries.
    """
    held = shards.load(data, seed)
    return planted(held, drawn(held, task, data.audit_canaries, seed))


def drawn(held: Sequence[Shard], task: Task, count: int, seed: int) -> tuple[Canary, ...]:
    """All canaries of a simulation, inserted or not; clients have them in turn.

    Args:
        held: the clients without canaries.
        task: says which columns are text and label.
        count: how many there are.
        seed: of the experiment.

    Raises:
        RecipeError: a client's rows have so few words that two canaries are the same.
    """
    if not count:
        return ()
    labels = _labels(held, task)
    own = functools.cache(lambda number: _words(held[number].train, task))
    canaries = []
    for number in range(count):
        client = number % len(held)
        draws = np.random.default_rng(seed_of(seed, "canary", number))
        row = _row(held[client].train.features, task, own(client), labels, number, draws)
        coin = uniform(seed, "canary's coin", number) < 0.5
        canaries.append(Canary(held[client].name, row, coin))
    _require_different(canaries, task)
    return tuple(canaries)


def planted(held: Sequence[Shard], canaries: Sequence[Canary]) -> list[Shard]:
    """The clients with their inserted canaries behind their own training rows."""
    found = []
    for shard in held:
        rows = [c.row for c in canaries if c.inserted and c.client == shard.name]
        if rows:
            more = Dataset.from_list(rows, features=shard.train.features)
            shard = replace(shard, train=concatenate_datasets([shard.train, more]))
        found.append(shard)
    return found


def _labels(held: Sequence[Shard], task: Task) -> list[Any]:
    if not task.label_column:
        return []
    return sorted({v for shard in held for v in shard.train[task.label_column]}, key=str)


def _words(rows: Dataset, task: Task) -> list[str]:
    """The different words in the texts that the task reads, in one order."""
    columns = [column for column in task.columns if column != task.label_column]
    found = {word for column in columns for text in texts(rows, column) for word in text.split()}
    return sorted({word[:LETTERS] for word in found})


def _row(
    features: Features,
    task: Task,
    words: Sequence[str],
    labels: Sequence[Any],
    number: int,
    draws: np.random.Generator,
) -> dict[str, Any]:
    """A canary in the columns of its client's rows."""
    row: dict[str, Any] = {}
    for column, feature in features.items():
        if column == task.label_column:
            row[column] = labels[int(draws.integers(len(labels)))]
        elif column in task.columns:
            row[column] = " ".join(words[i] for i in draws.integers(len(words), size=WORDS))
        else:  # each canary is a unit of its own, whatever column privacy.unit names
            marks = {"string": f"canary {number}"} | dict.fromkeys(WHOLE, -1 - number)
            row[column] = marks.get(feature.dtype) if isinstance(feature, Value) else None
    return row


def _require_different(canaries: Sequence[Canary], task: Task) -> None:
    columns = [column for column in task.columns if column != task.label_column]
    if len({tuple(c.row[column] for column in columns) for c in canaries}) < len(canaries):
        raise RecipeError(
            f"data.audit_canaries = {len(canaries)}: the rows have so few different words that two "
            "canaries are the same. Lower data.audit_canaries, or set it to 0."
        )
