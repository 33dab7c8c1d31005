"""Rows for a measurement: JSON lines with text, label and client, the same for all competitors."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spec import Size

DATA = Path(__file__).resolve().parents[2] / "data"
CLASSES = 4
MARKS = 8  # how often a row says its label: enough to learn it in a few steps
NOISE = 0.25  # rows that say another label, so that losses end near one value and can be compared

Row = dict[str, str]


class MissingError(Exception):
    """The data set is not here."""


def write(folder: Path, size: Size, tokenizer: Any) -> tuple[int, int]:
    """Write train.jsonl and test.jsonl; returns (training rows, their tokens without padding).

    Raises:
        MissingError: the data set's folder is not here.
        ValueError: a made row has another number of tokens than asked.
    """
    train, test = _read(size) if size.data else _made(size, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    encoded = tokenizer([row["text"] for row in train], truncation=True, max_length=size.tokens)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    if not size.data and set(lengths) != {size.tokens}:
        raise ValueError(f"rows have {min(lengths)} to {max(lengths)} tokens, not {size.tokens}")
    return len(train), sum(lengths)


def client_of(number: int) -> str:
    """A client's name; they sort as their numbers."""
    return f"client-{number:04}"


def _made(size: Size, tokenizer: Any) -> tuple[list[Row], list[Row]]:
    """Rows of random words, each of them one token, among which one says the label."""
    draw = random.Random(0)
    words = sorted(w for w in tokenizer.get_vocab() if w.isascii() and w.isalpha() and w.islower())
    draw.shuffle(words)
    marks, words = words[:CLASSES], words[CLASSES : CLASSES + 5000]
    length = size.tokens - len(tokenizer("")["input_ids"])
    times = min(MARKS, length // 2)

    def row(client: int) -> Row:
        label = draw.randrange(CLASSES)
        said = draw.randrange(CLASSES) if draw.random() < NOISE else label
        text = [marks[said]] * times + draw.choices(words, k=length - times)
        draw.shuffle(text)
        return {"text": " ".join(text), "label": f"label-{label}", "client": client_of(client)}

    def rows(each: int) -> list[Row]:
        return [row(client) for client in range(size.clients) for _ in range(each)]

    train, test = rows(size.rows), rows(size.test_rows)
    # Whatever was drawn, training rows name every class.
    for number, one in zip(range(CLASSES), train, strict=False):
        one["label"] = f"label-{number}"
    return train, test


def _read(size: Size) -> tuple[list[Row], list[Row]]:
    """A data set's rows dealt to clients at random, equally many to each."""
    if not (DATA / size.data / "train.jsonl").exists():
        raise MissingError(f"{DATA / size.data} is missing: see experiments/README.md for the data")
    train = _lines(DATA / size.data / "train.jsonl", size)
    random.Random(0).shuffle(train)
    train = train[: size.rows] if size.rows else train
    known = {row["label"] for row in train}
    test = [row for row in _lines(DATA / size.data / "test.jsonl", size) if row["label"] in known]
    random.Random(1).shuffle(test)
    return list(_dealt(train, size.clients)), list(
        _dealt(test[: size.test_rows * size.clients], size.clients)
    )


def _lines(path: Path, size: Size) -> list[Row]:
    parsed = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [{"text": str(row[size.text]), "label": str(row[size.label])} for row in parsed]


def _dealt(rows: Sequence[Row], clients: int) -> Iterator[Row]:
    for number, row in enumerate(rows):
        yield {**row, "client": client_of(number % clients)}
