"""What decides a cell's result: its recipe, and the sources that run it."""

import functools
import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path

from fedtune.config import Experiment

# Sources that only read what cells have written; a change of them leaves cells as they are.
READERS = (
    *("fedtune/audits/*.py", "fedtune/cli.py", "fedtune/page*.py", "fedtune/planning.py"),
    "fedtune/studies/*.py",
)
ROOT = Path(__file__).parents[2]


def key_of(experiment: Experiment) -> str:
    """The hash of everything that decides a cell's result."""
    text = json.dumps([experiment.identity(), code()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def reads_only(path: Path) -> bool:
    """Whether the source at `path`, relative to the packages, has no part in a run."""
    return any(fnmatch(path.as_posix(), pattern) for pattern in READERS)


@functools.cache
def code(root: Path = ROOT) -> str:
    """A digest of the sources that a run depends on: fedtune, clients and server."""
    digest = hashlib.sha256()
    for top in ("fedtune", "clients", "server"):
        for path in sorted((root / top).rglob("*.py")):
            if reads_only(path.relative_to(root)):
                continue
            name = path.relative_to(root).as_posix().encode()
            for part in (name, path.read_bytes()):
                digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:20]
