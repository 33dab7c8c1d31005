"""The ledger: no byte of it can be changed unseen, and no crash makes it wrong."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.privacy import ledger
from fedtune.privacy.ledger import FILE, HEAD, Ledger, LedgerError

KEY = bytes(32)


def small(folder: Path) -> Ledger:
    """Three lines."""
    folder.mkdir(parents=True, exist_ok=True)
    written = Ledger(folder, KEY)
    written.append("begin", run="small")
    written.append("charge", round=1, cost={"eps_pld": 1.5})
    written.append("release", round=1, outcome="released")
    return written


def test_what_is_written_is_read(tmp_path: Path) -> None:
    lines = small(tmp_path).lines
    assert ledger.read(tmp_path) == lines
    assert [line["seq"] for line in lines] == [0, 1, 2]
    again = Ledger(tmp_path, KEY)
    again.append("stop", round=2)
    assert ledger.read(tmp_path)[:3] == lines


def test_flipping_any_byte_is_seen(tmp_path: Path) -> None:
    """Every byte of the ledger, by its lowest bit and by the one that changes a letter's case."""
    small(tmp_path)
    path = tmp_path / FILE
    whole = path.read_bytes()
    assert len(whole) > 900
    for position in range(len(whole)):
        for bit in (1, 32):
            changed = bytearray(whole)
            changed[position] ^= bit
            path.write_bytes(changed)
            with pytest.raises(LedgerError, match="not what was written"):
                ledger.read(tmp_path)
    path.write_bytes(whole)
    assert len(ledger.read(tmp_path)) == 3


def test_lines_cannot_be_removed_moved_or_repeated(tmp_path: Path) -> None:
    small(tmp_path)
    path = tmp_path / FILE
    a, b, c = path.read_bytes().splitlines(keepends=True)
    for changed in (
        [a, b], [a], [], [b, c], [a, c], [a, c, b], [b, a, c], [a, b, b, c], [a, b, c, c]
    ):  # fmt: skip
        path.write_bytes(b"".join(changed))
        with pytest.raises(LedgerError):
            ledger.read(tmp_path)
        with pytest.raises(LedgerError):
            Ledger(tmp_path, KEY)


def test_another_hand_cannot_add_a_line(tmp_path: Path) -> None:
    """A line that follows, with a right hash, but signed with another key."""
    small(tmp_path)
    (tmp_path / "other").mkdir()
    forger = Ledger(tmp_path / "other", b"another key of thirty-two bytes!")
    own = (tmp_path / FILE).read_bytes()
    (tmp_path / "other" / FILE).write_bytes(own)
    forger.lines, forger._last = ledger.read(tmp_path), ledger._hash(own.splitlines()[-1])
    forger.append("charge", round=2)
    for name in (FILE, HEAD):
        (tmp_path / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(LedgerError, match=r"Line 4 .* has a wrong signature"):
        ledger.read(tmp_path)


def test_another_key_is_refused(tmp_path: Path) -> None:
    small(tmp_path)
    with pytest.raises(LedgerError, match="signed with another key"):
        Ledger(tmp_path, bytes(31) + b"1")


@given(st.integers(0, 400))
def test_a_crash_while_a_line_is_written_leaves_a_ledger_that_goes_on(
    tmp_path_factory: pytest.TempPathFactory, length: int
) -> None:
    """Any beginning of a fourth line, the head still naming the third; or all of it."""
    folder = tmp_path_factory.mktemp("crash")
    written = small(folder)
    head = (folder / HEAD).read_bytes()
    before = (folder / FILE).read_bytes()
    written.append("charge", round=2, cost={"eps_pld": 2.5})
    after = (folder / FILE).read_bytes()
    cut = min(len(after), len(before) + length)
    (folder / FILE).write_bytes(after[:cut])
    (folder / HEAD).write_bytes(head)
    again = Ledger(folder, KEY)
    assert len(again.lines) == (4 if cut == len(after) else 3)
    again.append("release", round=2)
    assert len(ledger.read(folder)) == len(again.lines)


def test_a_crash_in_the_first_line_leaves_none(tmp_path: Path) -> None:
    small(tmp_path)
    first = (tmp_path / FILE).read_bytes().splitlines()[0]
    (tmp_path / HEAD).unlink()
    (tmp_path / FILE).write_bytes(first[:100])
    assert Ledger(tmp_path, KEY).lines == []
    (tmp_path / FILE).write_bytes(first + b"\n")
    assert len(Ledger(tmp_path, KEY).lines) == 1


def test_cut_ends_are_missed_even_after_the_torn_line(tmp_path: Path) -> None:
    """A whole last line without its end is no crash: the head names it already."""
    small(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-1])
    with pytest.raises(LedgerError, match="does not end with"):
        Ledger(tmp_path, KEY)
    assert (tmp_path / FILE).read_bytes() == whole[:-1]
