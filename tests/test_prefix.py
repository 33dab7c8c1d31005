"""What was appended is read back to the bit, by whoever asks and whatever happened in between."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedtune.prefix import PrefixStore, Usage, digest_of, usage

ROOT = Path(__file__).parent.parent
PLENTY = 10**9
WIDTH = 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def example(number: int, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> Tensor:
    """Activations that tell which example they are of; 1 to 4 tokens."""
    drawn = torch.Generator().manual_seed(number)
    return torch.randn((1 + number % 4, width), generator=drawn, dtype=torch.float64).to(dtype)


def digest(number: int) -> bytes:
    return digest_of([number])


def append(store: PrefixStore, numbers: list[int], dtype: torch.dtype = torch.float32) -> int:
    rows = [example(number, dtype) for number in numbers]
    joined = torch.cat(rows) if rows else torch.empty((0, WIDTH), dtype=dtype)
    return store.append([digest(n) for n in numbers], [len(r) for r in rows], joined)


def require(store: PrefixStore, numbers: list[int], dtype: torch.dtype = torch.float32) -> None:
    """The store has these examples in this order, bit by bit."""
    assert all(store.lookup([digest(n) for n in numbers]))
    read = store.read([digest(n) for n in numbers])
    expected = [example(n, dtype) for n in numbers]
    assert read.dtype == dtype
    assert torch.equal(read, torch.cat(expected) if expected else read[:0])


def opened(
    folder: Path, key: str = "key", dtype: torch.dtype = torch.float32, limit: int = PLENTY
) -> PrefixStore:
    return PrefixStore(folder, key, WIDTH, dtype, limit)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name) / "prefix"


some = st.lists(st.integers(0, 12), max_size=6)


@given(st.lists(st.tuples(st.integers(0, 1), some, some), max_size=8), st.sampled_from(DTYPES))
def test_two_stores_on_one_folder_see_what_either_appended(
    steps: list[tuple[int, list[int], list[int]]], dtype: torch.dtype
) -> None:
    with tempfile.TemporaryDirectory() as name:
        stores = [opened(Path(name), dtype=dtype) for _ in range(2)]
        there: set[int] = set()
        for who, added, asked in steps:
            assert append(stores[who], added, dtype) == len(set(added) - there)
            there |= set(added)
            other = stores[1 - who]
            assert other.lookup([digest(n) for n in asked]) == [n in there for n in asked]
            require(other, [n for n in asked if n in there], dtype)
        assert stores[0].examples <= len(there)
        for store in stores:
            store.close()
        with opened(Path(name), dtype=dtype) as third:
            require(third, sorted(there), dtype)
            assert third.examples == len(there)


@given(st.data())
def test_wherever_a_file_is_cut_whole_examples_remain_and_more_can_be_added(
    data: st.DataObject,
) -> None:
    """A process killed between any two bytes; the rest of a block may be there as zeros."""
    with tempfile.TemporaryDirectory() as name:
        with opened(Path(name)) as store:
            for number in range(5):
                append(store, [number])
        (path,) = Path(name).glob(data.draw(st.sampled_from(["*.data", "*.index"])))
        sound = path.read_bytes()
        cut = data.draw(st.integers(0, len(sound)))
        path.write_bytes(sound[:cut] + bytes(data.draw(st.integers(0, 100))))
        with opened(Path(name)) as store:
            there = store.lookup([digest(n) for n in range(5)])
            count = sum(there)
            assert there == [True] * count + [False] * (5 - count)
            if path.suffix == ".index":
                require(store, list(range(count)))
                assert count == cut // 32
            assert append(store, [7, *range(5)]) == 1 + 5 - count
            require(store, [*range(count, 5), 7])
        with opened(Path(name)) as store:
            require(store, [*range(count, 5), 7])


@given(st.integers(0, 5 * 32 - 1), st.integers(1, 255))
def test_a_wrong_byte_in_the_index_is_noticed(at: int, flipped: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        with opened(Path(name)) as store:
            append(store, list(range(5)))
        (path,) = Path(name).glob("*.index")
        content = bytearray(path.read_bytes())
        content[at] ^= flipped
        path.write_bytes(content)
        with opened(Path(name)) as store:
            require(store, list(range(at // 32)))
            assert store.examples == at // 32


def test_keys_widths_and_dtypes_do_not_meet(folder: Path) -> None:
    with opened(folder) as store:
        append(store, [1])
        for other in (
            opened(folder, "other"),
            opened(folder, dtype=torch.float16),
            PrefixStore(folder, "key", WIDTH + 1, torch.float32, PLENTY),
        ):
            with other:
                assert other.lookup([digest(1)]) == [False]
        with pytest.raises(KeyError):
            store.read([digest(2)])


def test_a_digest_is_of_the_tokens_and_of_all_else() -> None:
    told = [
        digest_of([1, 2]),
        digest_of([2, 1]),
        digest_of([1]),
        digest_of([1, 2], b"ab"),
        digest_of([1, 2], b"a", b"b"),
        digest_of([1, 2], b"", b"ab"),
    ]
    assert len(set(told)) == len(told)
    assert {len(one) for one in told} == {16}


def test_what_does_not_fit_together_is_refused(folder: Path) -> None:
    rows = example(3)
    with opened(folder) as store:
        for digests, lengths, given_rows in (
            ([digest(3)], [3], rows),
            ([digest(3)], [4], rows.double()),
            ([digest(3)], [4], rows[:, :2]),
            ([digest(3), digest(4)], [4], rows),
            ([b"short"], [4], rows),
            ([digest(3), digest(4)], [4, 0], rows),
        ):
            with pytest.raises(ValueError, match=r"rows must be|expected|at least one"):
                store.append(digests, lengths, given_rows)
        assert store.examples == 0


def test_files_are_their_owners_alone(folder: Path) -> None:
    with opened(folder) as store:
        append(store, [1])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def size(tokens: int) -> int:
    return 32 + tokens * WIDTH * 4


def test_nothing_is_appended_beyond_the_limit(folder: Path) -> None:
    """Examples 0, 1, 2 have 1, 2, 3 tokens; there is room for the first two to the byte."""
    with opened(folder, limit=size(1) + size(2)) as store:
        assert append(store, [0, 1, 2]) == 2
        assert append(store, [4]) == 0
        require(store, [0, 1])
        assert store.lookup([digest(2), digest(4)]) == [False, False]
    assert usage(folder) == Usage(1, size(1) + size(2))
    with opened(folder, limit=0) as reader:
        assert append(reader, [4]) == 0
        require(reader, [0, 1])


def test_the_longest_unused_store_makes_room_and_an_open_one_never(folder: Path) -> None:
    for age, key in enumerate(("oldest", "open", "younger")):
        with opened(folder, key) as store:
            append(store, [3])
            os.utime(store._index_path, (age + 1, age + 1))
    in_use = opened(folder, "open")
    os.utime(in_use._index_path, (0, 0))
    limit = 3 * size(4)
    with opened(folder, "new", limit=limit) as store:
        assert append(store, [7]) == 1
        assert usage(folder) == Usage(3, limit)
        require(in_use, [3])
        with opened(folder, "oldest", limit=limit) as gone:
            assert gone.lookup([digest(3)]) == [False]
        assert append(store, [11, 15]) == 1  # the younger one goes; the open one stays
        assert append(store, [15]) == 0
        require(store, [7, 11])
        require(in_use, [3])
    in_use.close()


def test_usage_of_no_folder_is_nothing(tmp_path: Path) -> None:
    assert usage(tmp_path / "none") == Usage(0, 0)


def test_a_folder_that_cannot_be_made_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        opened(tmp_path / "file" / "prefix")


WRITER = """
import sys
from pathlib import Path
from tests.test_prefix import append, opened, require
folder, begin, step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with opened(folder) as store:
    for number in range(begin, 200, step):
        append(store, [number, number + 1])
        require(store, [number, number + 1])
"""


def test_two_processes_append_at_once(folder: Path) -> None:
    """One upwards in twos, one in threes: many examples are asked for by both."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(begin), str(step)], cwd=ROOT
        )
        for begin, step in ((0, 2), (1, 3))
    ]
    with opened(folder) as reader:
        while any(process.poll() is None for process in processes):
            there = reader.lookup([digest(n) for n in range(200)])
            require(reader, [n for n in range(200) if there[n]])
        assert [process.returncode for process in processes] == [0, 0]
        require(reader, list(range(200)))
    records = sum(path.stat().st_size for path in folder.glob("*.index"))
    assert records == 32 * reader.examples  # no example twice
