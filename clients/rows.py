"""The rows of all shards in one process, encoded together: once for every client, arm and run."""

import json
from dataclasses import dataclass, field
from typing import Literal

from datasets import Dataset

from fedtune import bases, tokens
from fedtune.config import ModelSettings
from fedtune.errors import RecipeError
from fedtune.files import require
from fedtune.models import Model
from fedtune.shards import Shard
from fedtune.tasks.task import Example, Task
from fedtune.tokens import Encoded, Examples

Split = Literal["train", "test"]


@dataclass(frozen=True, eq=False)
class Rows:
    """The shards of a simulation, or the one of an institution.

    Attributes:
        shards: of all clients that this process may have to speak for.
        task: encodes their rows.
        settings: of the model that reads them.
    """

    shards: tuple[Shard, ...]
    task: Task
    settings: ModelSettings
    _encoded: dict[str, Encoded] = field(default_factory=dict)

    def examples(self, split: Split, client: int | None, model: Model) -> Examples:
        """The encoded rows of the shard of this number, or of all shards for None.

        Raises:
            RecipeError: a row of any shard does not fit the task; the message has its number.
        """
        if split not in self._encoded:
            self._encoded[split] = self._load(split, model)
        encoded = self._encoded[split]
        return encoded.whole if client is None else encoded.parts[client]

    def units(self, client: int | None, model: Model, column: str) -> list[list[int]]:
        """The training examples of each record, or of each value of a column of the rows.

        Raises:
            RecipeError: a row does not fit the task, or the rows have no such column.
        """
        numbers = range(len(self.shards)) if client is None else [client]
        whole = self.examples("train", client, model)  # encoded by now, with all parts
        found: dict[object, list[int]] = {}
        begin = 0
        for number in numbers:
            train, part = self.shards[number].train, self._encoded["train"].parts[number]
            if column:
                what = f"privacy.unit: the rows of '{self.shards[number].name}'"
                require(train, [column], what)
            owners = train[column] if column else [(number, row) for row in range(len(train))]
            for owner in owners:
                found.setdefault(owner, [])
            for example, row in enumerate(part.rows.tolist(), start=begin):
                found[owners[row]].append(example)
            begin += len(part)
        assert begin == len(whole)
        return list(found.values())

    def _load(self, split: Split, model: Model) -> Encoded:
        limit = self.settings.max_length
        chosen: list[Dataset] = [getattr(shard, split) for shard in self.shards]

        def encode(number: int) -> list[Example]:
            try:
                return self.task.encode(chosen[number], model.tokenizer, model.labels, limit)
            except RecipeError as error:
                name = self.shards[number].name
                raise RecipeError(f"{split} rows of client '{name}': {error}") from error

        tokenizer, task = bases.fingerprint(model.tokenizer), self.task.identity()
        known = [tokenizer, task, model.labels, limit] if tokenizer and task else []
        return tokens.load(chosen, encode, json.dumps(known) if known else "")
