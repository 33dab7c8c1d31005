"""A committed round is whole, whatever happens; a damaged or foreign one is noticed."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedtune.adapter import digest
from fedtune.config import Experiment
from fedtune.errors import RecipeError, RunError
from server.checkpoint import Checkpoint, commit, latest, unwritable

E = Experiment()


def checkpoint_of(round: int) -> Checkpoint:
    draws = torch.Generator().manual_seed(round)
    state = {
        "adapter": {"A": torch.randn(3, 2, generator=draws), "B": torch.randn(4, generator=draws)},
        "head": {"W": torch.randn(2, dtype=torch.float64, generator=draws)},
    }
    return Checkpoint(round, state, {"north": round})


def test_what_is_committed_is_read_back_bitwise(tmp_path: Path) -> None:
    for round in range(4):
        commit(tmp_path, checkpoint_of(round), E)
        read = latest(tmp_path, E)
        assert read is not None
        assert (read.round, read.last_rounds) == (round, {"north": round})
        assert digest(read.state) == digest(checkpoint_of(round).state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["HEAD", "round-000002", "round-000003"]
    assert (tmp_path / "HEAD").read_text() == "3\n"


def test_a_strategy_may_return_views_of_other_tensors(tmp_path: Path) -> None:
    wide = torch.arange(12.0).reshape(3, 4)
    state = {"adapter": {"A": wide.T, "B": wide[:, :2], "C": wide}}
    commit(tmp_path, Checkpoint(1, state, {}), E)
    read = latest(tmp_path, E)
    assert read is not None
    assert digest(read.state) == digest(state)


def test_there_is_none_before_the_first(tmp_path: Path) -> None:
    assert latest(tmp_path / "nothing", E) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "manifest cut"])
def test_a_damaged_round_is_passed_over(tmp_path: Path, damage: str) -> None:
    commit(tmp_path, checkpoint_of(1), E)
    commit(tmp_path, checkpoint_of(2), E)
    file = tmp_path / "round-000002" / "adapter.safetensors"
    manifest = tmp_path / "round-000002" / "manifest.json"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-3])
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:-20])
    read = latest(tmp_path, E)
    assert read is not None
    assert read.round == 1
    assert digest(read.state) == digest(checkpoint_of(1).state)


def test_when_every_round_is_damaged_the_run_stops(tmp_path: Path) -> None:
    commit(tmp_path, checkpoint_of(1), E)
    (tmp_path / "round-000001" / "head.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"No checkpoint in .* is whole .*--overwrite"):
        latest(tmp_path, E)


def test_another_recipes_checkpoint_is_refused_with_the_difference(tmp_path: Path) -> None:
    commit(tmp_path, checkpoint_of(1), E)
    with pytest.raises(RecipeError, match=r"another recipe: seed was 0 and is 1\..*name=second"):
        latest(tmp_path, E.replace(seed=1))


def test_where_a_run_lies_and_how_long_it_waits_may_change(tmp_path: Path) -> None:
    commit(tmp_path, checkpoint_of(1), E)
    moved = E.replace(output="elsewhere", name="x", coordinator__timeout_seconds=1.0)
    read = latest(tmp_path, moved)
    assert read is not None
    assert read.round == 1


def test_a_leftover_of_a_crash_does_not_count(tmp_path: Path) -> None:
    commit(tmp_path, checkpoint_of(1), E)
    (tmp_path / "round-000002.tmp").mkdir()
    (tmp_path / "round-000002.tmp" / "adapter.safetensors").write_bytes(b"half")
    read = latest(tmp_path, E)
    assert read is not None
    assert read.round == 1
    commit(tmp_path, checkpoint_of(2), E)
    assert not (tmp_path / "round-000002.tmp").exists()


def test_a_full_disk_leaves_the_round_before_intact(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the same call fails half way."""
    commit(tmp_path, checkpoint_of(1), E)
    script = (
        "import resource, signal, sys; from pathlib import Path;"
        "sys.path.insert(0, sys.argv[2]); import torch;"
        "from server.checkpoint import *; from fedtune.config import Experiment;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "state = {'adapter': {'A': torch.zeros(100000)}};"
        "commit(Path(sys.argv[1]), Checkpoint(2, state, {}), Experiment())"
    )
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), root],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "RunError: Cannot write to" in done.stderr
    assert "Round 1 is intact" in done.stderr
    read = latest(tmp_path, E)
    assert read is not None
    assert digest(read.state) == digest(checkpoint_of(1).state)


def test_a_full_disk_is_called_by_its_name(tmp_path: Path) -> None:
    error = unwritable(tmp_path, OSError(errno.ENOSPC, "No space left on device"), 4)
    assert "the disk is full. Round 4 is intact. Make room and run the same command again" in str(
        error
    )
