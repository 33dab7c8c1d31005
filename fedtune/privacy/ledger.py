"""The ledger: what was charged, one line after another, chained and signed.

A line is JSON in one canonical spelling. It holds its number, the SHA-256 of the line before it and
an Ed25519 signature, whose key is derived from the run's secret and whose public half stands in
every "begin" line. `ledger.head` names the last line, so that lines cut from the end are missed
too. Whoever holds the secret can write another ledger: it shows tampering by anybody else.

A line is on the disk before what it announces happens. After a crash the file may have one line
more than the head, or a part of one; nothing had followed from either.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedtune.errors import RunError
from fedtune.privacy.noise import subkey

SCHEMA = 1
FILE, HEAD, KEY = "ledger.jsonl", "ledger.head", "noise.key"
BEGIN = "begin"
Line: TypeAlias = dict[str, Any]


class LedgerError(RunError):
    """A ledger that is not what was written."""


class Ledger:
    """A run's ledger, open for writing.

    Args:
        folder: of the run, or of a client's account.
        key: its secret.

    Raises:
        LedgerError: what is there was altered, or belongs to another key.
    """

    def __init__(self, folder: Path, key: bytes) -> None:
        self.folder = folder
        self._signer = Ed25519PrivateKey.from_private_bytes(subkey(key, "ledger"))
        self.public_key = self._signer.public_key().public_bytes_raw().hex()
        _drop_torn_line(folder)
        self.lines = read(folder) if (folder / FILE).exists() else []
        self._last = _hash((folder / FILE).read_bytes().splitlines()[-1]) if self.lines else ""
        if any(
            line["public_key"] != self.public_key for line in self.lines if "public_key" in line
        ):
            raise LedgerError(
                f"{folder / FILE} is signed with another key than the one beside it. Bring back "
                "whichever is not the right one; a run can also start over with --overwrite."
            )
        if self.lines:
            self._write_head()

    def append(self, kind: str, **fields: Any) -> Line:
        """Write a line and wait until the disk has it."""
        line: Line = {
            "schema": SCHEMA,
            "seq": len(self.lines),
            "prev": self._last,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "kind": kind,
            **fields,
        }
        if kind == BEGIN:
            line["public_key"] = self.public_key
        line["sig"] = self._signer.sign(_canonical(line)).hex()
        data = _canonical(line)
        with (self.folder / FILE).open("ab") as file:
            file.write(data + b"\n")
            file.flush()
            os.fsync(file.fileno())
        # Read back, so that a resumed run goes on from the same values.
        line = json.loads(data)
        self.lines.append(line)
        self._last = _hash(data)
        self._write_head()
        return line

    def _write_head(self) -> None:
        fresh = self.folder / f"{HEAD}.tmp"
        with fresh.open("w", encoding="utf-8") as file:
            file.write(f"{len(self.lines) - 1} {self._last}\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.folder / HEAD)


def read(folder: Path) -> list[Line]:
    """The lines of a run's ledger, after every number, hash and signature was checked.

    Raises:
        LedgerError: it is missing or not what was written; the first line at fault is named.
    """
    try:
        data = (folder / FILE).read_bytes()
        head = (folder / HEAD).read_text(encoding="ascii") if (folder / HEAD).exists() else ""
    except (OSError, ValueError) as error:
        raise LedgerError(f"{folder} has no readable ledger: {error}.") from error
    if not data.endswith(b"\n"):
        raise _altered(folder, data.count(b"\n"), "does not end with a line's end")
    raw = data[:-1].split(b"\n")
    lines: list[Line] = []
    previous, key = "", ""
    for number, text in enumerate(raw):
        line = _parsed(folder, number, text)
        key = str(line.get("public_key", key))
        if number == 0 and line.get("kind") != BEGIN:
            raise _altered(folder, number, "does not begin the ledger")
        if line.get("seq") != number or line.get("prev") != previous:
            raise _altered(folder, number, "does not follow the line before it")
        if not _signed(line, key) or (lines and key != lines[0]["public_key"]):
            raise _altered(folder, number, "has a wrong signature")
        previous = _hash(text)
        lines.append(line)
    # The head is written after the line, so it may be one behind.
    if head not in _heads(raw):
        raise _altered(folder, len(raw), f"is missing, or {HEAD} is wrong")
    return lines


def _heads(raw: Sequence[bytes]) -> list[str]:
    behind = [f"{number} {_hash(raw[number])}\n" for number in range(len(raw))[-2:]]
    return behind if len(raw) > 1 else ["", *behind]


def _parsed(folder: Path, number: int, text: bytes) -> Line:
    try:
        line: Line = json.loads(text)
        if not isinstance(line, dict) or _canonical(line) != text:
            raise _altered(folder, number, "is not spelled as it was written")
    except (ValueError, RecursionError) as error:
        raise _altered(folder, number, "is no JSON") from error
    return line


def _signed(line: Mapping[str, Any], key: str) -> bool:
    unsigned = {name: value for name, value in line.items() if name != "sig"}
    try:
        signature = bytes.fromhex(line["sig"])
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(
            signature, _canonical(unsigned)
        )
    except (KeyError, TypeError, ValueError, InvalidSignature):
        return False
    return bool(signature.hex() == line["sig"])


def _drop_torn_line(folder: Path) -> None:
    """Cut off what a crash left of a line; a whole last line that lost its end stays and fails."""
    path = folder / FILE
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    raw = whole[:-1].split(b"\n") if whole else []
    head = (folder / HEAD).read_text("utf-8", "replace") if (folder / HEAD).exists() else ""
    if len(whole) < len(data) and head == (f"{len(raw) - 1} {_hash(raw[-1])}\n" if raw else ""):
        with path.open("r+b") as file:
            file.truncate(len(whole))
            os.fsync(file.fileno())
        if not whole:
            path.unlink()


def _altered(folder: Path, number: int, how: str) -> LedgerError:
    return LedgerError(
        f"Line {number + 1} of {folder / FILE} {how}: the ledger is not what was written, so what "
        "was spent is not known. Bring the file back from a copy; a run can also start over with "
        "--overwrite."
    )


def _canonical(line: Mapping[str, Any]) -> bytes:
    text = json.dumps(line, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
