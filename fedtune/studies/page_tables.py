"""Cells of a page's tables: text for a person, and beside it the number to sort by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedtune.config import Leaf
from fedtune.studies.comparison import Interval

NONE, MINUS = "–", "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: shown.
        value: to sort by, None where there is none: the text then, or last if `missing`.
        small: shown smaller beside or below the text.
        mark: class of its colour, "" for none.
        missing: whether it stands for no value.
    """

    text: str
    value: float | None = None
    small: str = ""
    mark: str = ""
    missing: bool = False


@dataclass(frozen=True)
class Column:
    """A header.

    Attributes:
        title: of it.
        help: what it means, for a tooltip.
        text: whether it holds words, not numbers.
        first: which order the first click gives.
        now: which order the rows have, "" for that of the study.
    """

    title: str
    help: str = ""
    text: bool = False
    first: str = "descending"
    now: str = ""


@dataclass(frozen=True)
class Row:
    """Its cells, the first being its header, and its class."""

    cells: list[Cell]
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose groups are sorted each for itself.

    Attributes:
        title: its caption.
        note: below the caption.
        columns: its headers.
        groups: title, "" for none, and rows of each.
    """

    title: str
    note: str
    columns: list[Column]
    groups: list[tuple[str, list[Row]]] = field(default_factory=list)


ABSENT = Cell(NONE, missing=True)


def brackets(interval: Interval | None, form: Callable[[float], str]) -> str:
    """An interval, "" for none."""
    return f"[{form(interval.low)}, {form(interval.high)}]" if interval else ""


def fixed(value: float) -> str:
    """Three decimals, with a true minus sign."""
    return f"{value:.3f}".replace("-", MINUS)


def signed(value: float) -> str:
    """A difference: always with its sign."""
    return f"{value:+.3f}".replace("-", MINUS)


def p_value(value: float | None) -> Cell:
    """A p value."""
    if value is None:
        return ABSENT
    return Cell("< 0.001" if value < 0.001 else f"{value:.3f}", value)


def number(value: float | None, form: str) -> Cell:
    """A number in a format like "{:.3f}"."""
    return ABSENT if value is None else Cell(form.format(value).replace("-", MINUS), value)


def leaf(value: Leaf | None) -> Cell:
    """A recipe's value."""
    if value is None:
        return ABSENT
    if isinstance(value, bool | str):
        return Cell(str(value))
    return Cell(f"{value:.4g}", float(value))


def averaged(values: Sequence[float | None], form: Callable[[float], str]) -> Cell:
    """The mean of what there is, and how much is missing."""
    known = [value for value in values if value is not None]
    if not known:
        return Cell("not reached", missing=True) if values else ABSENT
    mean = sum(known) / len(known)
    part = "" if len(known) == len(values) else f"{len(known)} of {len(values)} seeds"
    return Cell(form(mean), mean, part)
