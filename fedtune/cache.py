"""Where FedTune keeps what it can make again: $FEDTUNE_CACHE, or ~/.cache/fedtune.

What lies there comes from rows that may be private, so folders and files are their owner's alone.
"""

import math
import os
from pathlib import Path

from fedtune.errors import RecipeError

GIGABYTES = 4.0


def cache_folder(name: str = "") -> Path:
    """The cache's folder, or the one named so inside it; nothing is made."""
    root = Path(os.environ.get("FEDTUNE_CACHE") or Path.home() / ".cache" / "fedtune")
    return (root / name).absolute()


def cache_limit() -> int:
    """Bytes that each folder inside the cache may hold: $FEDTUNE_CACHE_GB, 4 unless told.

    Raises:
        RecipeError: the variable is no number, or below 0.
    """
    told = os.environ.get("FEDTUNE_CACHE_GB", "")
    try:
        gigabytes = float(told) if told else GIGABYTES
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes < math.inf:
        raise RecipeError(
            f"FEDTUNE_CACHE_GB = '{told}' must be a number of gigabytes, as in 4 or 0.5; "
            "0 keeps nothing."
        )
    return int(gigabytes * 1e9)


def private_folder(folder: Path) -> Path:
    """The folder, made if it is not there, readable by its owner alone.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
