"""What a model is trained to do: the interface between rows of text and a loss.

A task encodes rows into examples, collates examples into batches, and gives one loss an example, so
that a padded client can be masked and per-example clipping is possible. Its metrics are sums: lists
of numbers that add up exactly over batches and clients, e.g. "accuracy": [correct, rows]. Only a
report turns them into ratios.
"""

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedtune.errors import RecipeError
from fedtune.records import Sums

Example: TypeAlias = dict[str, list[int]]
Scores: TypeAlias = dict[str, Tensor]
Batch: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Base:
    """A base model without adapter.

    Attributes:
        module: the transformers model.
        heads: names of its submodules that are trained whole, such as "classifier".
        fresh: whether those heads are newly made, so that the experiment's seed must fill them.
    """

    module: PreTrainedModel
    heads: tuple[str, ...] = ()
    fresh: bool = True


@dataclass(frozen=True)
class Task(ABC):
    """Encode, collate, loss; one instance of a frozen dataclass for one recipe."""

    head_policy: ClassVar[str] = "none"
    generates: ClassVar[bool] = False

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Columns that every row must have."""

    @property
    def label_column(self) -> str:
        """The column of class labels, or "" for a task without classes."""
        return ""

    def labels(self, train: Dataset | None) -> tuple[str, ...]:
        """The names of all classes in order; () for a task without classes.

        Args:
            train: the training rows of all clients in a simulation, None at an institution.

        Raises:
            RecipeError: an institution's recipe does not name its labels.
        """
        return ()

    @abstractmethod
    def configure(self, config: PretrainedConfig, path: str | Path, labels: Sequence[str]) -> None:
        """Write what the task needs into the model's configuration, before anything is loaded."""

    @abstractmethod
    def load(self, path: str | Path, config: PretrainedConfig, **options: Any) -> Base:
        """The pretrained model at `path`, a folder or a hub id."""

    @abstractmethod
    def skeleton(self, config: PretrainedConfig) -> Base:
        """The same model without weights; called under `torch.device("meta")`."""

    @abstractmethod
    def encode(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
    ) -> list[Example]:
        """Tokenised rows, each with "input_ids" and what `collate` needs.

        An example has its row's number in "row", from 0, unless every row is one example.

        Raises:
            RecipeError: a row cannot be encoded; the message has its number, from 1.
        """

    @abstractmethod
    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        """One batch, padded on the right to its longest example; pad: the pad token's id."""

    @abstractmethod
    def metrics(self, labels: Sequence[str]) -> dict[str, int]:
        """Each metric that `sums` adds up, and of how many numbers it consists."""

    @abstractmethod
    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        """What `sums` needs of each row, every tensor of shape (batch,).

        "loss" is what is minimised, in float32 or float64, with its gradient.
        """

    @abstractmethod
    def sums(self, scores: Scores, labels: Sequence[str]) -> Sums:
        """The metrics of some rows, which add up over batches and clients; see `metrics`."""

    def identity(self) -> str:
        """What decides the examples that `encode` makes, beside its arguments.

        The parameters and the source itself: who improves `encode` need not think of what was kept.
        "" where there is no source to read.
        """
        kinds = [kind for kind in type(self).__mro__ if issubclass(kind, Task)]
        try:
            sources = sorted({inspect.getsource(sys.modules[kind.__module__]) for kind in kinds})
        except OSError:
            return ""
        return "\n".join([repr(self), *sources])

    def prompts(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[list[int], str, str]]:
        """For generative tasks: (prompt's token ids, prompt, reference answer) of each row."""
        return []


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """A (rows, longest) int64 tensor, filled up with `value`."""
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(padded)


def mask_of(rows: Sequence[Sequence[int]]) -> Tensor:
    """The attention mask of `pad_right`, 1 where a row has a token."""
    lengths = np.array([len(row) for row in rows])
    return torch.from_numpy((np.arange(lengths.max()) < lengths[:, None]).astype(np.int64))


def texts(rows: Dataset, column: str) -> list[str]:
    """A column of text. Errors never quote a row: an institution's are read by the coordinator.

    Raises:
        RecipeError: the column is missing or a row holds no text.
    """
    if column not in rows.column_names:
        have = ", ".join(rows.column_names)
        raise RecipeError(f"The rows have no column '{column}'; they have {have}. Set it in task.")
    values = list(rows[column])
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str) or not value.strip():
            what = "an empty text" if isinstance(value, str) else type(value).__name__
            raise RecipeError(f"Row {number}: column '{column}' must be text, not {what}.")
    return values
