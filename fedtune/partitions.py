"""Who holds which rows: the partitions of a simulation.

The partitioners are those of flwr-datasets; here they are only given a seed, a strict minimum and
good errors. Every training row goes to exactly one client. Test rows follow the training rows: by
the same column, by the client's own mix of labels, or in proportion to its size.
"""

import contextlib
import io
import re
import unicodedata
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
from datasets import Dataset

from fedtune.config import NAME
from fedtune.errors import RecipeError
from fedtune.files import require
from fedtune.seeds import seed_of

Held: TypeAlias = dict[str, list[int]]  # client -> the numbers of its rows, ascending
Value: TypeAlias = str | int

TRAIN, TEST = "The training rows", "The test rows"
FEWER = "Lower data.clients or data.minimum"
DRAWS = 100  # of labels for clients, until every label has a client


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The partitioners warn of what is an error here, and draw progress bars.
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        np.errstate(all="ignore"),
    ):
        warnings.simplefilter("ignore")
        yield


def _divided(partitioner: Any, seed: int, length: int, values: Sequence[Value] = ()) -> Held:
    """The rows of each part. The partitioner sees them in an order drawn from the seed.

    Without that it would hand out neighbours, and neighbours in a file are often alike. Values are
    replaced by their ranks: the partitioner's NumPy arrays compare integers faster than text.

    Raises:
        ValueError: the partitioner finds no division.
    """
    order = permutation(length, seed, "partition")
    slim = {"row": order}
    if values:
        ranks = {value: rank for rank, value in enumerate(sorted(set(values)))}
        slim["value"] = [ranks[values[row]] for row in order]
    with _quiet():
        partitioner.dataset = Dataset.from_dict(slim)
        count = partitioner.num_partitions
        width = max(2, len(str(count - 1)))
        return {
            f"client-{part:0{width}}": sorted(partitioner.load_partition(part)["row"])
            for part in range(count)
        }


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


def _alike(column: str, train: Dataset, test: Dataset) -> tuple[list[Value], list[Value]]:
    known, asked = values_of(train, column, TRAIN), values_of(test, column, TEST)
    if known and asked and type(known[0]) is not type(asked[0]):
        kinds = f"{type(known[0]).__name__} in the training rows, {type(asked[0]).__name__} in the"
        raise RecipeError(f"Column '{column}' is {kinds} test rows. Write both the same way.")
    return known, asked


def _deal_labels(column: str, test: Dataset, train: Dataset, held: Held, seed: int) -> Held:
    known, asked = _alike(column, train, test)
    return deal(asked, known, held, seed)


class Partition(ABC):
    """Who holds which rows: a frozen dataclass whose fields are its parameters."""

    counted: ClassVar[bool] = True  # whether data.clients says how many clients there are
    remedy: ClassVar[str] = f"{FEWER}."

    @abstractmethod
    def split(self, rows: Dataset, clients: int, minimum: int, seed: int) -> Held:
        """The training rows of each client, each row once.

        The caller refuses a client with fewer than `minimum`; a partition that draws may use it.

        Raises:
            RecipeError: there is no such division.
        """

    def assign(self, test: Dataset, train: Dataset, held: Held, seed: int) -> Held:
        """The test rows of each client: here in proportion to its training rows."""
        return deal([0] * len(test), [0] * len(train), held, seed)


@dataclass(frozen=True)
class Iid(Partition):
    """Rows dealt at random, equally many to each."""

    def split(self, rows: Dataset, clients: int, minimum: int, seed: int) -> Held:
        from flwr_datasets.partitioner import IidPartitioner  # a second of matplotlib and pandas

        return _divided(IidPartitioner(clients), seed, len(rows))


@dataclass(frozen=True)
class Dirichlet(Partition):
    """Each label divided by proportions drawn from Dirichlet(alpha).

    Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", 2019,
    arXiv:1905.12022. A small alpha gives each label to few clients.
    """

    alpha: float = 0.5
    column: str = "label"
    remedy: ClassVar[str] = f"{FEWER}, or raise alpha."

    def __post_init__(self) -> None:
        """Refuse an alpha at which the draw is no longer a number."""
        if not 1e-6 <= self.alpha <= 1e6:
            raise ValueError(f"alpha = {self.alpha} must be between 1e-6 and 1e6")

    def split(self, rows: Dataset, clients: int, minimum: int, seed: int) -> Held:
        from flwr_datasets.partitioner import DirichletPartitioner

        values = values_of(rows, self.column, TRAIN)
        # The library takes an int for another kind of alpha than a float.
        partitioner = DirichletPartitioner(
            clients, "value", float(self.alpha), minimum, seed=seed_of(seed, "dirichlet")
        )
        try:
            return _divided(partitioner, seed, len(rows), values)
        except ValueError as error:
            raise RecipeError(
                f"dirichlet(alpha={self.alpha}): in each of 11 draws one of {clients} clients had "
                f"fewer than {minimum} of the {len(rows)} rows, which data.minimum asks for. "
                f"{self.remedy}"
            ) from error

    def assign(self, test: Dataset, train: Dataset, held: Held, seed: int) -> Held:
        return _deal_labels(self.column, test, train, held, seed)


@dataclass(frozen=True)
class ByLabel(Partition):
    """Each client holds rows of `labels` labels only.

    Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study", 2022,
    arXiv:2102.02079. The labels are drawn again where one of them would belong to no client, since
    its rows would be lost.
    """

    labels: int = 2
    column: str = "label"

    def __post_init__(self) -> None:
        """Refuse clients without labels."""
        if self.labels < 1:
            raise ValueError(f"labels = {self.labels} must be at least 1")

    def split(self, rows: Dataset, clients: int, minimum: int, seed: int) -> Held:
        from flwr_datasets.partitioner import PathologicalPartitioner

        values = values_of(rows, self.column, TRAIN)
        counts = Counter(values)
        if not self.labels <= len(counts) <= self.labels * clients:
            raise RecipeError(
                f"by_label(labels={self.labels}) with data.clients = {clients} does not fit the "
                f"{len(counts)} labels of column '{self.column}': each client needs that many, and "
                "each label a client. Change labels or data.clients."
            )
        for draw in range(DRAWS):
            partitioner = PathologicalPartitioner(
                clients,
                "value",
                self.labels,
                "first-deterministic",
                seed=seed_of(seed, "by_label", draw),
            )
            with contextlib.suppress(ValueError):  # more clients than rows of some label
                held = _divided(partitioner, seed, len(rows), values)
                if sum(map(len, held.values())) == len(rows):
                    return held
        rarest, count = min(counts.items(), key=lambda item: item[1])
        raise RecipeError(
            f"by_label(labels={self.labels}): in none of {DRAWS} draws did every label belong to a "
            f"client and every client get a row of each of its labels ({len(counts)} labels, "
            f"{clients} clients; '{rarest}' has {count} rows). Raise labels so that none is left "
            "over, or lower data.clients so that rows suffice."
        )

    def assign(self, test: Dataset, train: Dataset, held: Held, seed: int) -> Held:
        return _deal_labels(self.column, test, train, held, seed)


@dataclass(frozen=True)
class BySize(Partition):
    """Rows dealt at random; client i of 1 ... n holds a share growing with i, i^2 or e^i."""

    growth: str = "linear"
    remedy: ClassVar[str] = f"{FEWER}, or take a gentler growth."

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        if self.growth not in ("linear", "square", "exponential"):
            raise ValueError(f"growth = '{self.growth}' must be linear, square or exponential")

    def split(self, rows: Dataset, clients: int, minimum: int, seed: int) -> Held:
        from flwr_datasets import partitioner

        kind = getattr(partitioner, f"{self.growth.capitalize()}Partitioner")
        try:
            return _divided(kind(clients), seed, len(rows))
        except ValueError as error:
            raise RecipeError(
                f"by_size(growth='{self.growth}') leaves some of {clients} clients without any of "
                f"the {len(rows)} rows. {self.remedy}"
            ) from error


@dataclass(frozen=True)
class ByColumn(Partition):
    """One client for each value of a column: a speaker, a shop, a package.

    Attributes:
        column: whose values are the clients.
        largest: keep only so many clients, those with the most rows; 0 keeps all.
    """

    column: str = "client"
    largest: int = 0
    counted: ClassVar[bool] = False
    remedy: ClassVar[str] = "Lower data.minimum, or keep large clients only: by_column(largest=N)."

    def __post_init__(self) -> None:
        """Refuse a negative number."""
        if self.largest < 0:
            raise ValueError(f"largest = {self.largest} must be at least 0")

    def split(self, rows: Dataset, clients: int, minimum: int, seed: int) -> Held:
        from flwr_datasets.partitioner import NaturalIdPartitioner

        values = values_of(rows, self.column, TRAIN)
        names = names_of(values)
        parts = _divided(NaturalIdPartitioner("value"), seed, len(rows), values).values()
        held = {names[values[part[0]]]: part for part in parts}
        kept = sorted(held, key=lambda name: (-len(held[name]), name))
        return {name: held[name] for name in kept[: self.largest or None]}

    def assign(self, test: Dataset, train: Dataset, held: Held, seed: int) -> Held:
        known, asked = _alike(self.column, train, test)
        names = {known[rows[0]]: name for name, rows in held.items()}
        assigned: Held = {name: [] for name in held}
        for row, value in enumerate(asked):
            if value in names:
                assigned[names[value]].append(row)
            elif not self.largest:
                raise RecipeError(
                    f"{TEST}, row {row + 1}: column '{self.column}' names client '{value}', which "
                    "has no training rows. Give it some, or remove its test rows."
                )
        return assigned


PARTITIONS: dict[str, type[Partition]] = {
    "iid": Iid,
    "dirichlet": Dirichlet,
    "by_column": ByColumn,
    "by_label": ByLabel,
    "by_size": BySize,
}
