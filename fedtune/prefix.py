"""Kept activations of a frozen prefix: a store on disk that rounds, runs and processes share.

The layers below the first adapter give the same activations for the same tokens for ever. A store
holds them under a key (which model, which layer: the caller's business) and finds an example's by a
digest of its tokens. It is two files that only grow:

    <key>.data    the activations, (tokens, width), one example after another
    <key>.index   a record an example: its digest, its first token, how many, a checksum of these

Data are written and flushed before their index record, so that a record never points at what is not
there, wherever a process is killed. What a killed process left behind its last whole record is
overwritten by the next one that appends. Readers take no lock: they look whether the index grew.
"""

import contextlib
import errno
import hashlib
import os
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from fedtune.cache import cache_folder, private_folder

if sys.platform != "win32":
    import fcntl

FORMAT = 1  # of both files; another number leaves old ones unused
DIGEST = 16  # bytes
RECORD = np.dtype(
    [("digest", f"V{DIGEST}"), ("start", "<u8"), ("length", "<u4"), ("checksum", "<u4")]
)
# Bits are kept, whatever they mean: NumPy knows no bfloat16.
BITS: dict[int, tuple[torch.dtype, Any]] = {
    1: (torch.uint8, np.uint8),
    2: (torch.int16, np.int16),
    4: (torch.int32, np.int32),
    8: (torch.int64, np.int64),
}


def digest_of(tokens: Sequence[int], *others: bytes) -> bytes:
    """The digest of an example: its token ids, and whatever else its activations depend on."""
    digest = hashlib.blake2b(np.asarray(tokens, dtype="<i8").tobytes(), digest_size=DIGEST)
    for other in others:
        digest.update(len(other).to_bytes(8, "little") + other)
    return digest.digest()


def prefix_folder() -> Path:
    """Where stores lie unless told otherwise."""
    return cache_folder("prefix")


@dataclass(frozen=True)
class Usage:
    """What a folder of stores takes.

    Attributes:
        stores: how many keys.
        bytes: of all files.
    """

    stores: int
    bytes: int


def usage(folder: Path) -> Usage:
    """What the stores in a folder take, nothing where there is no folder."""
    sizes = _sizes(folder)
    return Usage(len({path.stem for path in sizes}), sum(sizes.values()))


def _sizes(folder: Path) -> dict[Path, int]:
    sizes = {}
    for path in [*folder.glob("*.data"), *folder.glob("*.index")]:
        with contextlib.suppress(FileNotFoundError):  # evicted at this moment
            sizes[path] = path.stat().st_size
    return sizes


class PrefixStore:
    """The activations of one key; one object a process and thread.

    Args:
        folder: of all stores; made if it is not there, for its owner alone.
        key: names what the activations depend on beside the example.
        width: numbers a token.
        dtype: of the activations.
        limit_bytes: that all stores in the folder may take together; 0 only reads.

    Raises:
        OSError: the folder cannot be written; the caller works without a store then.
    """

    def __init__(
        self, folder: Path, key: str, width: int, dtype: torch.dtype, limit_bytes: int
    ) -> None:
        self.folder, self.width, self.dtype, self.limit = folder, width, dtype, limit_bytes
        about = f"{FORMAT} {width} {dtype} {key}"
        name = hashlib.sha256(about.encode()).hexdigest()[:32]
        private_folder(folder)
        self._index_path, self._data_path = folder / f"{name}.index", folder / f"{name}.data"
        self._index = _held(self._index_path)
        self._data = os.open(self._data_path, os.O_RDWR | os.O_CREAT, 0o600)
        os.utime(self._index)  # the least recently opened store is the first to be evicted
        self._places: dict[bytes, tuple[int, int]] = {}
        self._records, self._tokens = 0, 0
        self._bits, self._numbers = BITS[dtype.itemsize]
        self._map: NDArray[Any] = np.zeros((0, width), dtype=self._numbers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others evict it."""
        for descriptor in (self._index, self._data):
            os.close(descriptor)
        self._map = self._map[:0].copy()

    @property
    def examples(self) -> int:
        """How many examples are known to be there."""
        return len(self._places)

    def lookup(self, digests: Sequence[bytes]) -> list[bool]:
        """Which examples are there, in the order asked."""
        self._refresh()
        return [digest in self._places for digest in digests]

    def read(self, digests: Sequence[bytes]) -> Tensor:
        """The rows of these examples, one after another: (tokens of all, width), on the CPU.

        Raises:
            KeyError: an example is not there.
        """
        if any(digest not in self._places for digest in digests):
            self._refresh()
        places = [self._places[digest] for digest in digests]
        end = max((start + length for start, length in places), default=0)
        if end > len(self._map):
            self._map = np.memmap(
                self._data_path, dtype=self._numbers, mode="r", shape=(self._tokens, self.width)
            )
        rows = torch.empty((sum(n for _, n in places), self.width), dtype=self._bits)
        target, at = rows.numpy(), 0
        for start, length in places:
            target[at : at + length] = self._map[start : start + length]
            at += length
        return rows.view(self.dtype)

    def append(self, digests: Sequence[bytes], lengths: Sequence[int], rows: Tensor) -> int:
        """Keep examples that are not there yet, as long as there is room.

        Args:
            digests: of the examples.
            lengths: their tokens, at least 1 each.
            rows: (tokens of all, width), one example after another.

        Returns:
            How many were written; the others were there already or found no room.

        Raises:
            ValueError: shapes, dtype or digests are not as said.
        """
        self._require(digests, lengths, rows)
        content = rows.detach().cpu().contiguous().view(self._bits).numpy()
        ends = np.cumsum(lengths).tolist()
        with FileLock(self.folder / ".lock", mode=0o600):
            self._refresh()
            fresh = dict(zip(digests, zip(ends, lengths, strict=True), strict=True))
            new = {d: (e - n, e) for d, (e, n) in fresh.items() if d not in self._places}
            room = self._room(sum(self._cost(b - a) for a, b in new.values()))
            kept = {}
            for digest, (a, b) in new.items():
                room -= self._cost(b - a)
                if room < 0:
                    break
                kept[digest] = content[a:b]
            try:
                self._write(kept)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                return 0  # the disk is full before the limit; nothing points at what was written
            self._refresh()
            return len(kept)

    def _require(self, digests: Sequence[bytes], lengths: Sequence[int], rows: Tensor) -> None:
        if len(digests) != len(lengths) or any(len(digest) != DIGEST for digest in digests):
            raise ValueError(f"expected {len(lengths)} digests of {DIGEST} bytes, one a length")
        if min(lengths, default=1) < 1:
            raise ValueError("an example has at least one token")
        expected = (sum(lengths), self.width)
        if tuple(rows.shape) != expected or rows.dtype != self.dtype:
            raise ValueError(
                f"rows must be {expected} of {self.dtype}, not {tuple(rows.shape)} of {rows.dtype}"
            )

    def _cost(self, tokens: int) -> int:
        return tokens * self.width * self.dtype.itemsize + RECORD.itemsize

    def _refresh(self) -> None:
        """Learn the records that were added, up to the first that is torn."""
        size = os.fstat(self._index).st_size
        count = size // RECORD.itemsize - self._records
        if count <= 0:
            return
        begin = self._records * RECORD.itemsize
        raw = os.pread(self._index, count * RECORD.itemsize, begin)
        raw = raw[: len(raw) - len(raw) % RECORD.itemsize]
        tokens = os.fstat(self._data).st_size // (self.width * self.dtype.itemsize)
        for number, record in enumerate(np.frombuffer(raw, dtype=RECORD)):
            at = number * RECORD.itemsize
            start, length = int(record["start"]), int(record["length"])
            sound = zlib.crc32(raw[at : at + RECORD.itemsize - 4]) == record["checksum"]
            if not sound or start != self._tokens or start + length > tokens:
                return
            self._places[raw[at : at + DIGEST]] = (start, length)
            self._records += 1
            self._tokens += length

    def _write(self, kept: dict[bytes, NDArray[Any]]) -> None:
        """Data, then index; the caller holds the lock and has read the index to its end."""
        if not kept:
            return
        begin = self._records * RECORD.itemsize
        # First, lest a torn record seem sound to a reader as soon as the data grow.
        os.ftruncate(self._index, begin)
        at = self._tokens * self.width * self.dtype.itemsize
        for rows in kept.values():
            at += _write_at(self._data, rows.data.cast("B"), at)
        os.ftruncate(self._data, at)
        os.fsync(self._data)
        records = np.zeros(len(kept), dtype=RECORD)
        start = self._tokens
        for record, (digest, rows) in zip(records, kept.items(), strict=True):
            record["digest"], record["start"], record["length"] = digest, start, len(rows)
            record["checksum"] = zlib.crc32(record.tobytes()[:-4])
            start += len(rows)
        _write_at(self._index, memoryview(records.tobytes()), begin)

    def _room(self, wanted: int) -> int:
        """Bytes that may be added, after stores that nobody has open made room for `wanted`."""
        sizes = _sizes(self.folder)
        room = self.limit - sum(sizes.values())
        others = [path for path in sizes if path.suffix == ".index" and path != self._index_path]
        for index in sorted(others, key=lambda path: path.stat().st_mtime):
            if room >= wanted or wanted > self.limit:
                break
            if _evicted(index):
                room += sizes[index] + sizes.get(index.with_suffix(".data"), 0)
        return room


def _held(path: Path) -> int:
    """A descriptor of the file, shared with other users of it and closed to eviction."""
    if sys.platform == "win32":
        raise OSError(errno.ENOSYS, "Windows has no locks that several processes share")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        os.close(descriptor)  # evicted between opening and locking


def _evicted(index: Path) -> bool:
    """Remove a store, unless a process has it open."""
    if sys.platform == "win32":
        return False
    descriptor = os.open(index, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        index.with_suffix(".data").unlink(missing_ok=True)
        index.unlink()
        return True
    finally:
        os.close(descriptor)


def _write_at(descriptor: int, content: memoryview, at: int) -> int:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], at + done)
    return done
