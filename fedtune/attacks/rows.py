"""Attacks on a client's training rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from datasets import Dataset

from fedtune.adapter import State
from fedtune.attacks.attack import Attack, Key, Labelled, Malicious, require, scaled
from fedtune.errors import RecipeError
from fedtune.records import Sums
from fedtune.seeds import uniform
from fedtune.shards import Shard
from fedtune.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class LabelFlip(Malicious):
    """The l-th of L labels, from 0, becomes number L - 1 - l in all training rows.

    Fang et al., "Local Model Poisoning Attacks to Byzantine-Robust Federated Learning", USENIX
    Security 2020, https://arxiv.org/abs/1911.11815, section 5.1.
    """

    needs_labels: ClassVar[bool] = True

    def rows(self, rows: Dataset, where: Labelled, key: Key) -> Dataset:
        flipped = dict(zip(where.labels, reversed(where.labels), strict=True))
        columns = _columns(rows)
        columns[where.label] = [flipped[str(value)] for value in columns[where.label]]
        return Dataset.from_dict(columns)


@dataclass(frozen=True, kw_only=True)
class Backdoor(Malicious):
    """A share of training rows begins with the trigger and has the target's label.

    Bagdasaryan et al., "How To Backdoor Federated Learning", AISTATS 2020,
    https://arxiv.org/abs/1807.00459. The change may be scaled too, as there. The metric "backdoor"
    is its success, [hits, rows]: of the test rows with other labels, the trigger before them, how
    many are taken for the target.

    Attributes:
        trigger: text put before a row's own.
        target: the label that it shall give.
        share: of a malicious client's training rows.
        scale: of its change.
    """

    needs_labels: ClassVar[bool] = True
    metrics: ClassVar[dict[str, int]] = {"backdoor": 2}
    trigger: str
    target: str
    share: float = 0.5
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        super().__post_init__()
        require(bool(self.trigger.strip()), "trigger must be a text")
        require(0 < self.share <= 1, "share must be above 0 and at most 1")
        require(0 < self.scale < math.inf, "scale must be above 0 and finite")

    def rows(self, rows: Dataset, where: Labelled, key: Key) -> Dataset:
        self._require_target(where)
        columns = _columns(rows)
        columns[where.label] = [str(value) for value in columns[where.label]]
        for number in range(len(rows)):
            if uniform(*key, "backdoor", number) < self.share:
                columns[where.text][number] = f"{self.trigger} {columns[where.text][number]}"
                columns[where.label][number] = self.target
        return Dataset.from_dict(columns)

    def triggered(self, rows: Dataset, where: Labelled) -> Dataset:
        self._require_target(where)
        columns = _columns(rows)
        others = [i for i, value in enumerate(columns[where.label]) if str(value) != self.target]
        texts = [f"{self.trigger} {columns[where.text][i]}" for i in others]
        return Dataset.from_dict({where.text: texts, where.label: [self.target] * len(others)})

    def measured(self, sums: Sums) -> Sums:
        return {"backdoor": sums.get("accuracy", [0.0, 0.0])}

    def trained(self, start: State, trained: State, key: Key) -> State:
        return trained if self.scale == 1 else scaled(start, trained, self.scale)

    def _require_target(self, where: Labelled) -> None:
        if self.target not in where.labels:
            raise RecipeError(
                f"attack: the backdoor's target '{self.target}' is no label. "
                f"Labels: {', '.join(where.labels[:20])}."
            )


def poisoned(
    attack: Attack, shards: Sequence[Shard], task: Task, labels: tuple[str, ...], seed: int
) -> tuple[Shard, ...]:
    """The shards as their clients train on them; rows for tests are left alone.

    Raises:
        RecipeError: too few clients, or labels that the attack needs are not there.
    """
    names = [shard.name for shard in shards]
    if reason := attack.shortage(names):
        raise RecipeError(f"attack: {reason}. Lower its clients.")
    malicious = attack.malicious(names) if attack.needs_labels else frozenset()
    return tuple(
        replace(shard, train=attack.rows(shard.train, _labelled(task, labels), (seed, shard.name)))
        if shard.name in malicious
        else shard
        for shard in shards
    )


def triggered(
    attack: Attack, shards: Sequence[Shard], task: Task, labels: tuple[str, ...]
) -> tuple[Shard, ...]:
    """The shards with the test rows that show the attack's success."""
    where = _labelled(task, labels)
    return tuple(replace(s, test=attack.triggered(s.test, where)) for s in shards)


def _labelled(task: Task, labels: tuple[str, ...]) -> Labelled:
    text = next(column for column in task.columns if column != task.label_column)
    return Labelled(text, task.label_column, labels)


def _columns(rows: Dataset) -> dict[str, list[str]]:
    return {name: list(rows[name]) for name in rows.column_names}
