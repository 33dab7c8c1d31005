"""Who holds which rows: the partitions of a simulation.

The partitioners that draw are those of flwr-datasets; here they are only given a seed, a strict
minimum and good errors. They are imported where they are used: with them come seaborn, matplotlib
and scipy, two seconds of every process. What needs no draw but the order of rows does without.

Every training row goes to exactly one client. Test rows follow the training rows: by the same
column, by the client's own mix of labels, or in proportion to its size.
"""

import contextlib
import io
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from fedtune.dealing import (
    TEST,
    TRAIN,
    Held,
    Value,
    alike,
    deal,
    deal_labels,
    names_of,
    permutation,
    values_of,
)
from fedtune.errors import RecipeError
from fedtune.seeds import seed_of

FEWER = "Lower data.clients or data.minimum"
DRAWS = 100  # of labels for clients, until every label has a client


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
        return _named([partitioner.load_partition(part)["row"] for part in range(count)])


def _named(divided: Sequence[Sequence[int]]) -> Held:
    width = max(2, len(str(len(divided) - 1)))
    return {f"client-{part:0{width}}": sorted(rows) for part, rows in enumerate(divided)}


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
        order = np.array(permutation(len(rows), seed, "partition"))
        return _named([own.tolist() for own in np.array_split(order, clients)])


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
        return deal_labels(self.column, test, train, held, seed)


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
        return deal_labels(self.column, test, train, held, seed)


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
        values = values_of(rows, self.column, TRAIN)
        names = names_of(values)
        held: Held = {}
        for row, value in enumerate(values):
            held.setdefault(names[value], []).append(row)
        kept = sorted(held, key=lambda name: (-len(held[name]), name))
        return {name: held[name] for name in kept[: self.largest or None]}

    def assign(self, test: Dataset, train: Dataset, held: Held, seed: int) -> Held:
        known, asked = alike(self.column, train, test)
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
