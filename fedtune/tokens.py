"""Encoded rows, kept: what one process has tokenised, every later arm, process and run finds.

Examples lie in Arrow files, mapped into memory, so that processes share them. A file's name is a
digest of everything that decides its content: the rows themselves, the tokenizer, the task. Hence
nothing ever has to be invalidated, and a file that is missing, damaged or unwritable costs the time
to encode again and nothing else.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from datasets import Dataset
from filelock import FileLock
from numpy.typing import NDArray

from fedtune.cache import cache_folder, cache_limit, private_folder
from fedtune.tasks.task import Example

FORMAT = 1  # of the files; another number leaves old ones unused
BATCH = 10_000  # rows that are hashed at once
SEAL = 64  # bytes before Arrow's own: the SHA-256 of those, in hexadecimal


class Examples(Sequence[Example]):
    """Encoded rows in flat arrays: 4 bytes a token instead of a Python object.

    An item is the dict of lists that tasks collate; a slice is another view of the same arrays.

    Args:
        columns: name -> (all values, one after another; where each example begins, and the end).
        start: the first example of the view.
        stop: the one after its last.
    """

    def __init__(
        self, columns: dict[str, tuple[NDArray[np.int32], NDArray[np.int64]]], start: int, stop: int
    ) -> None:
        self._columns, self._start, self._stop = columns, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return [self[i] for i in range(start, stop, step)]
            return Examples(self._columns, self._start + start, self._start + max(start, stop))
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        row = self._start + index % len(self)
        return {
            name: values[bounds[row] : bounds[row + 1]].tolist()
            for name, (values, bounds) in self._columns.items()
        }

    @property
    def rows(self) -> NDArray[np.int64]:
        """The number in its dataset of the row that each example was made from."""
        if "row" not in self._columns:
            return np.arange(len(self))
        values, bounds = self._columns["row"]
        return values[bounds[self._start : self._stop]].astype(np.int64)

    @property
    def digest(self) -> bytes:
        """The SHA-256 of all examples."""
        sha = hashlib.sha256()
        for name, (values, bounds) in sorted(self._columns.items()):
            own = bounds[self._start : self._stop + 1]
            sha.update(f"{name}:{len(self)}:".encode())
            sha.update((own - own[0]).astype("<i8").tobytes())
            sha.update(values[own[0] : own[-1]].astype("<i4").tobytes())
        return sha.digest()

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each example."""
        if not self:
            return np.zeros(0, dtype=np.int64)
        return np.diff(self._columns["input_ids"][1][self._start : self._stop + 1])


@dataclass(frozen=True, eq=False)
class Encoded:
    """Several datasets' examples in one place.

    Attributes:
        whole: those of all datasets, one after another.
        parts: those of each dataset, views of `whole`.
    """

    whole: Examples
    parts: tuple[Examples, ...]


def load(
    datasets: Sequence[Dataset], encode: Callable[[int], list[Example]], identity: str
) -> Encoded:
    """The examples of some datasets: read from the cache, or encoded and left there.

    Args:
        datasets: rows, which the key is made of.
        encode: makes the examples of the dataset of this number; its errors are raised here.
        identity: of everything else that decides the examples; "" never uses the cache.
    """
    limit = cache_limit()
    if not (identity and limit):
        return _encoded(*_tables(datasets, encode))
    file = cache_folder("tokens") / f"{_key(datasets, identity)}.arrow"
    found = _read(file)
    if found:
        return found
    try:
        lock = FileLock(private_folder(file.parent) / ".lock", mode=0o600)
        lock.acquire()
    except OSError:  # a read-only or foreign folder: there is no cache then
        return _encoded(*_tables(datasets, encode))
    try:
        found = _read(file)  # made by somebody else while this process waited
        if found is None:
            made = _tables(datasets, encode)
            _write(file, *made, limit)
            found = _read(file) or _encoded(*made)
        return found
    finally:
        lock.release()


def _key(datasets: Sequence[Dataset], identity: str) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, identity]).encode())
    for rows in datasets:
        digest.update(_content(rows))
    return digest.hexdigest()


def _content(rows: Dataset) -> bytes:
    """The SHA-256 of the rows' columns; other columns than the task's only cost a second key."""
    sink = _Digest()
    stream = pa.PythonFile(sink, mode="w")
    # Batches, so that a dataset larger than memory can be hashed too.
    for batch in rows.with_format("arrow").iter(batch_size=BATCH):
        table = batch.replace_schema_metadata(None).combine_chunks()
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
    return sink.sha256.digest()


class _Digest(io.RawIOBase):
    """A file that keeps the digest of what was written."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return len(data)


def _tables(
    datasets: Sequence[Dataset], encode: Callable[[int], list[Example]]
) -> tuple[pa.Table, list[int]]:
    """All examples as one table, and how many each dataset has."""
    tables, counts = [], []
    for number in range(len(datasets)):
        examples = encode(number)
        counts.append(len(examples))
        if examples:
            columns = {
                name: pa.array([e[name] for e in examples], pa.large_list(pa.int32()))
                for name in sorted(examples[0])
            }
            tables.append(pa.table(columns))
    return pa.concat_tables(tables).combine_chunks() if tables else pa.table({}), counts


def _encoded(table: pa.Table, counts: Sequence[int]) -> Encoded:
    columns = {}
    for name in table.column_names:
        (chunk,) = table[name].chunks
        bounds = chunk.offsets.to_numpy()
        columns[name] = (chunk.values.to_numpy(), bounds)
    ends = [0, *itertools.accumulate(counts)]
    parts = tuple(Examples(columns, a, b) for a, b in itertools.pairwise(ends))
    return Encoded(Examples(columns, 0, ends[-1]), parts)


def _read(file: Path) -> Encoded | None:
    """What a file holds; None if there is none or it is damaged."""
    try:
        content = pa.memory_map(str(file)).read_buffer()
        # Before Arrow looks at anything: a wrong byte may end the process there.
        if content[:SEAL].to_pybytes() != _seal(content[SEAL:]):
            return None
        table = pa.ipc.open_file(content[SEAL:]).read_all()
    except (OSError, pa.ArrowException):
        return None
    with contextlib.suppress(OSError):  # somebody else's file, or just removed
        os.utime(file)  # the least recently used file is the first to go
    return _encoded(table, json.loads(table.schema.metadata[b"counts"]))


def _seal(content: Any) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _write(file: Path, table: pa.Table, counts: list[int], limit: int) -> None:
    """Leave the file whole or not at all; the caller holds the folder's lock."""
    table = table.replace_schema_metadata({"counts": json.dumps(counts)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue()
    if SEAL + content.size > limit:
        return
    part = file.with_suffix(".part")
    try:
        part.unlink(missing_ok=True)  # of a process that was killed
        _make_room(file.parent, limit - SEAL - content.size)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(_seal(content))
            stream.write(content)
        part.replace(file)
    except OSError:  # a full disk: what is not kept is encoded again
        part.unlink(missing_ok=True)


def _make_room(folder: Path, limit: int) -> None:
    """Remove the least recently used files until the others have at most `limit` bytes."""
    about = [(path.stat(), path) for path in folder.iterdir() if path.name != ".lock"]
    for about_one, path in sorted(about, key=lambda item: item[0].st_mtime, reverse=True):
        limit -= about_one.st_size
        if limit < 0:
            path.unlink()
