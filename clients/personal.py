"""What a client keeps to itself between rounds: one safetensors file a group, one folder a round.

It never leaves the client. The coordinator says which round was the client's last accepted one, and
exactly that state is read: so a round that is repeated after a crash begins from the same bytes,
and a reply that was set aside leaves no trace.
"""

import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialized

from fedtune.adapter import State
from fedtune.errors import RunError

KEPT = 3  # rounds; a coordinator can go back by one or two checkpoints


def _folder(root: Path, round: int) -> Path:
    return root / f"round-{round:06d}"


def load(root: Path, round: int) -> State:
    """What the client kept in `round`, {} where it kept nothing or `round` is 0.

    Raises:
        RunError: a file of it is damaged; it is never taken for nothing.
    """
    folder = _folder(root, round)
    try:
        return {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    except (OSError, SafetensorError) as error:
        raise RunError(f"The personal state in {folder} cannot be read: {error}.") from error


def save(root: Path, round: int, state: State) -> None:
    """Keep `state` as that of `round`, replacing an earlier try at the same round."""
    if not state:
        return
    folder, fresh = _folder(root, round), root / f"round-{round:06d}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for group, adapter in state.items():
        whole = {name: tensor.contiguous() for name, tensor in adapter.items()}
        (fresh / f"{group}.safetensors").write_bytes(serialized(whole))
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    older = sorted(path for path in root.glob("round-??????") if path <= folder)
    for path in older[:-KEPT]:
        shutil.rmtree(path)
