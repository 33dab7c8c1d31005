"""What the audits of a run found, kept in its folder: one file, each audit's newest finding."""

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedtune.audits.finding import Finding
from fedtune.errors import RunError

FILE = "audit.json"
SCHEMA = 1
ORDER = ("mechanism", "tokens", "membership", "canaries", "extraction")


def read(folder: Path) -> dict[str, Finding]:
    """What the run's audits found, by name and in their order; {} without any.

    Raises:
        RunError: the file is damaged, or of another version.
    """
    return {
        name: Finding.from_json(entry["finding"])
        for name, entry in sorted(_entries(folder).items(), key=lambda item: _place(item[0]))
    }


def missing(folder: Path, names: Iterable[str]) -> list[str]:
    """The audits of `names` that this version of them has not yet made of the run."""
    entries = _entries(folder)
    return [name for name in names if entries.get(name, {}).get("code") != code()]


def add(folder: Path, finding: Finding) -> None:
    """Keep a finding beside the others, in one step: a reader sees the old file or the new."""
    entries = {**_entries(folder), finding.audit: {"code": code(), "finding": finding.to_json()}}
    ordered = {name: entries[name] for name in sorted(entries, key=_place)}
    text = json.dumps({"schema": SCHEMA, "audits": ordered}, indent=1, ensure_ascii=False)
    fresh = folder / f"{FILE}.tmp"
    fresh.write_text(text + "\n", encoding="utf-8")
    fresh.replace(folder / FILE)


@functools.cache
def code() -> str:
    """A digest of the audits' own sources."""
    sha = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sha.update(path.name.encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:20]


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["schema"] != SCHEMA:
            raise ValueError(f"its schema is {kept['schema']}, expected {SCHEMA}")
        for entry in kept["audits"].values():
            Finding.from_json(entry["finding"])
        return dict(kept["audits"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} is damaged: {error}. Delete it; `fedtune audit {folder}` writes it again."
        ) from error


def _place(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)
