"""Save and resume a run exactly.

A commit writes the round's state into a temporary folder, flushes it to the disk, renames it, and
then moves HEAD, also by a rename: whenever a process is killed, HEAD names a whole round. Every
file's SHA-256 stands in the manifest; a damaged round is noticed and the one before it used.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from fedtune.adapter import State
from fedtune.config import Experiment, Leaf
from fedtune.errors import FedTuneError, RecipeError, RunError

log = logging.getLogger("fedtune")
KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A committed round.

    Attributes:
        round: from 0, the state before round 1.
        state: the coordinator's.
        last_rounds: client -> the last round whose reply was accepted.
    """

    round: int
    state: State
    last_rounds: dict[str, int]


def commit(folder: Path, checkpoint: Checkpoint, experiment: Experiment) -> None:
    """Make `checkpoint` the run's last round.

    Raises:
        RunError: the disk is full or cannot be written; the round before is intact.
    """
    final = folder / f"round-{checkpoint.round:06d}"
    fresh = final.with_suffix(".tmp")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for group, adapter in checkpoint.state.items():
            whole = {name: tensor.contiguous() for name, tensor in adapter.items()}
            (fresh / f"{group}.safetensors").write_bytes(save(whole))
        manifest = {
            "round": checkpoint.round,
            "experiment": experiment.identity(),
            "last_rounds": checkpoint.last_rounds,
            "files": {file.name: _sha256(file) for file in sorted(fresh.glob("*.safetensors"))},
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        (fresh / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        for file in [*fresh.iterdir(), fresh]:
            flush(file)
        shutil.rmtree(final, ignore_errors=True)
        fresh.rename(final)
        replace_text(folder / "HEAD", f"{checkpoint.round}\n")
    except OSError as error:
        raise unwritable(folder, error, checkpoint.round - 1) from error
    for old in sorted(folder.glob("round-??????"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def unwritable(folder: Path, error: OSError, last: int) -> FedTuneError:
    """What to tell when a run's folder cannot be written."""
    reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
    state = f"Round {last} is intact. " if last >= 0 else ""
    return RunError(
        f"Cannot write to {folder}: {reason}. {state}Make room and run the same command again; "
        "it goes on from there."
    )


def latest(folder: Path, experiment: Experiment) -> Checkpoint | None:
    """The last committed round, or None before the first commit.

    Raises:
        RecipeError: the checkpoint belongs to a run of another recipe.
        RunError: no kept round is whole.
    """
    rounds = sorted(folder.glob("round-??????"), reverse=True)
    faults = []
    for candidate in rounds:
        try:
            checkpoint, theirs = _read(candidate)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            faults.append(f"{candidate.name}: {error}")
            continue
        ours = experiment.identity()
        if odd := [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]:
            changed = ", ".join(
                f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}" for key in sorted(odd)
            )
            raise RecipeError(
                f"{folder.parent} holds a run of another recipe: {changed}. Give this one another "
                "name (name=second), or start over with --overwrite."
            )
        for fault in faults:
            log.warning("checkpoint %s is damaged; going back to %s", fault, candidate.name)
        return checkpoint
    if faults:
        raise RunError(
            f"No checkpoint in {folder} is whole ({'; '.join(faults)}). "
            "Start over with --overwrite."
        )
    return None


def _read(folder: Path) -> tuple[Checkpoint, dict[str, Leaf]]:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, sha256 in manifest["files"].items():
        if _sha256(folder / name) != sha256:
            raise ValueError(f"{name} is not what was written")
    state = {Path(name).stem: load_file(folder / name) for name in manifest["files"]}
    last_rounds = {str(k): int(v) for k, v in manifest["last_rounds"].items()}
    return Checkpoint(int(manifest["round"]), state, last_rounds), dict(manifest["experiment"])


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step: after a crash it holds the old text or the new."""
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(text, encoding="utf-8")
    flush(fresh)
    fresh.replace(path)
    flush(path.parent)


def write_json(path: Path, value: Mapping[str, object] | list[object]) -> None:
    """A JSON file, written in one step."""
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def flush(path: Path) -> None:
    """Have the operating system put a file or a folder's entries on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
