"""What a run writes down beside its checkpoints: a line a round, and samples of its answers."""

import json
from collections.abc import Mapping
from pathlib import Path

from flwr.app import RecordDict

from fedtune import wire
from fedtune.records import RoundRecord
from server import checkpoint


def keep(folder: Path, last: int) -> None:
    """Drop records of rounds after `last`: they were not committed and will be run again."""
    path = folder / "rounds.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            committed = json.loads(line)["round"] <= last
        except (ValueError, KeyError):
            continue  # cut short by a crash
        if committed:
            kept.append(line + "\n")
    checkpoint.replace_text(path, "".join(kept))


def append(folder: Path, record: RoundRecord) -> None:
    """Write a round's record.

    Raises:
        RunError: the disk is full or cannot be written; the round before is intact.
    """
    try:
        with (folder / "rounds.jsonl").open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")
    except OSError as error:
        raise checkpoint.unwritable(folder, error, record.round - 1) from error


def write_samples(folder: Path, contents: Mapping[str, RecordDict]) -> None:
    """Keep the generated answers in replies, by client name; nothing where there are none."""
    samples = [
        {"client": name, "prompt": prompt, "answer": answer, "reference": reference}
        for name, content in sorted(contents.items())
        for prompt, answer, reference in wire.samples_of(content)
    ]
    if samples:
        checkpoint.write_json(folder / "samples.json", list(samples))
