"""Sources: where rows come from, as Hugging Face datasets.

A source gives training rows and, where it has them, test rows. What a column means is the task's
business, and who holds which row the partition's.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import Dataset

from fedtune import docstrings
from fedtune.dealing import permutation
from fedtune.errors import RecipeError
from fedtune.files import read_csv, read_jsonl, read_parquet


@dataclass(frozen=True)
class Rows:
    """What a source gives; `test` is None where it has no test rows."""

    train: Dataset
    test: Dataset | None


class Source(ABC):
    """Where rows come from: a frozen dataclass whose fields are its parameters."""

    @abstractmethod
    def load(self) -> Rows:
        """All rows.

        Raises:
            RecipeError: there are none, or they are not as expected.
        """


def _from_files(read: Callable[[str | Path], Dataset], train: str, test: str, limit: int) -> Rows:
    rows = read(train)
    if 0 < limit < len(rows):
        # The same rows for every seed of a run: a study varies seeds, and not its data.
        rows = rows.select(sorted(permutation(len(rows), "limit", limit)[:limit]))
    return Rows(rows, read(test) if test else None)


@dataclass(frozen=True)
class _Files(Source):
    """Files of training and of test rows.

    Attributes:
        train: of the training rows.
        test: of the test rows; without it the partition holds some out.
        limit: training rows that are kept, drawn at random once and for all; 0 for all.
    """

    train: str
    test: str = ""
    limit: int = 0

    def __post_init__(self) -> None:
        """Refuse a limit that keeps nothing."""
        if self.limit < 0:
            raise ValueError("limit must be at least 0")


@dataclass(frozen=True)
class Jsonl(_Files):
    """Files with one JSON object a line; without `test`, the partition holds test rows out."""

    def load(self) -> Rows:
        return _from_files(read_jsonl, self.train, self.test, self.limit)


@dataclass(frozen=True)
class Csv(_Files):
    """Comma-separated files with a header."""

    def load(self) -> Rows:
        return _from_files(read_csv, self.train, self.test, self.limit)


@dataclass(frozen=True)
class Parquet(_Files):
    """Parquet files."""

    def load(self) -> Rows:
        return _from_files(read_parquet, self.train, self.test, self.limit)


@dataclass(frozen=True)
class Quickstart(Source):
    """The small corpus that comes with FedTune: text, label, client."""

    language: str = "en"

    def load(self) -> Rows:
        from fedtune import corpus  # thousands of sentences, made for this source only

        train, test = corpus.rows(self.language)
        return Rows(Dataset.from_list(list(train)), Dataset.from_list(list(test)))


@dataclass(frozen=True)
class Docstrings(Source):
    """First paragraphs of the docstrings in installed packages: client, name, kind, text.

    Attributes:
        packages: distributions, "numpy,rich"; empty for those with the most docstrings.
        kind: all, module, class or function.
        largest: how many packages, where `packages` is empty.
        limit: rows of a package.
    """

    packages: str = ""
    kind: str = "all"
    largest: int = 8
    limit: int = 500

    def __post_init__(self) -> None:
        """Refuse unknown kinds and empty choices."""
        if self.kind not in docstrings.KINDS:
            raise ValueError(f"kind must be one of {', '.join(docstrings.KINDS)}")
        if min(self.largest, self.limit) < 1:
            raise ValueError("largest and limit must be at least 1")

    def load(self) -> Rows:
        names = [name.strip() for name in self.packages.split(",") if name.strip()]
        return Rows(read_jsonl(docstrings.cached(names, self.kind, self.largest, self.limit)), None)


@dataclass(frozen=True)
class Hub(Source):
    """A dataset of the Hugging Face hub; `config`, `revision` and the splits as it names them."""

    path: str
    config: str = ""
    revision: str = "main"
    split: str = "train"
    test_split: str = ""

    def load(self) -> Rows:
        test = self._split(self.test_split) if self.test_split else None
        return Rows(self._split(self.split), test)

    def _split(self, split: str) -> Dataset:
        try:
            rows = datasets.load_dataset(
                self.path, self.config or None, split=split, revision=self.revision
            )
        except Exception as error:  # of a dozen unrelated classes: network, hub, Arrow, builders
            reason = next(iter(str(error).splitlines()), "")
            raise RecipeError(
                f"Cannot load split '{split}' of the hub's dataset '{self.path}' (config "
                f"'{self.config}', revision '{self.revision}'): {type(error).__name__}: {reason} "
                "Check the names on huggingface.co/datasets. To run offline, load it once with a "
                "network and then set HF_HUB_OFFLINE=1, or use files of your own: "
                "jsonl(train='...')."
            ) from error
        if not len(rows):
            raise RecipeError(f"Split '{split}' of the hub's dataset '{self.path}' has no rows.")
        return rows


SOURCES: dict[str, type[Source]] = {
    "quickstart": Quickstart,
    "docstrings": Docstrings,
    "jsonl": Jsonl,
    "csv": Csv,
    "parquet": Parquet,
    "hub": Hub,
}
