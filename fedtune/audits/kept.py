"""What the audits of a run found, kept in its folder: one file, each audit's newest finding."""

import json
from pathlib import Path

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
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["schema"] != SCHEMA:
            raise ValueError(f"its schema is {kept['schema']}, expected {SCHEMA}")
        found = {name: Finding.from_json(value) for name, value in kept["findings"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} is damaged: {error}. Delete it; `fedtune audit {folder}` writes it again."
        ) from error
    return {name: found[name] for name in sorted(found, key=_place)}


def write(folder: Path, findings: dict[str, Finding]) -> None:
    """Keep the findings in the run's folder, in one step: a reader sees the old or the new."""
    kept = {name: findings[name].to_json() for name in sorted(findings, key=_place)}
    text = json.dumps({"schema": SCHEMA, "findings": kept}, indent=1, ensure_ascii=False)
    fresh = folder / f"{FILE}.tmp"
    fresh.write_text(text + "\n", encoding="utf-8")
    fresh.replace(folder / FILE)


def _place(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)
