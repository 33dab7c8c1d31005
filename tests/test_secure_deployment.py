"""A SuperLink and four SuperNodes on loopback, one of which is killed in the middle of a round."""

import json
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch
from conftest import LABELS, classification_rows, write_jsonl
from safetensors.torch import load_file
from superlink import kill, superlink, supernode

from clients.app import app as client_app
from clients.cohort import CohortGrid
from fedtune import launch, parts
from fedtune.adapter import State
from fedtune.config import Experiment
from fedtune.privacy.identity import line_of, new_key
from fedtune.privacy.stages import Waiting
from server.app import app as server_app

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="kills a process group"),
]
SIZES = {"east": 11, "north": 24, "south": 17, "west": 9}
KILLED = "west"


def kill_once_masking(kept: Path, started: "subprocess.Popen[bytes]") -> None:
    """Kill it when its client has opened the others' shares and trains: it is in U2, not in U3."""
    while started.poll() is None:
        with suppress(FileNotFoundError):  # replaced between two looks
            for stage in kept.glob("*/*/secure/stage"):
                if stage.read_bytes().startswith(Waiting.__name__.encode()):
                    kill(started)
                    return
        time.sleep(0.005)


def final(folder: Path) -> State:
    found = (folder / "checkpoint" / "round-000001").glob("*.safetensors")
    return {path.stem: load_file(path) for path in found}


def survivors_only(experiment: Experiment, folder: Path) -> State:
    """The plain mean of the clients that stayed, in this process."""
    rows = folder / "rows"
    rows.mkdir()
    for split in ("train", "test"):
        own = [(folder / f"{name}-{split}.jsonl").read_text() for name in SIZES if name != KILLED]
        (rows / f"{split}.jsonl").write_text("".join(own))
    plain = experiment.replace(
        name="plain",
        secure_aggregation="none",
        data__source=f"jsonl(train='{rows}/train.jsonl', test='{rows}/test.jsonl')",
        coordinator__minimum_clients=3,
    )
    grid = CohortGrid(client_app, plain.flat())
    server_app(grid, grid.server_context({"arms": ""}))
    return final(parts.folder_of(plain))


def test_a_supernode_killed_in_the_middle_leaves_the_exact_sum_of_the_others(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact: the sum's integers are whole, so the mean times their weight lies on the grid, and
    each within n of the plain sum of the three; metrics of the three add up to the last unit."""
    for split, seed in (("train", 0), ("test", 1)):
        for name, count in SIZES.items():
            write_jsonl(tmp_path / f"{name}-{split}.jsonl", classification_rows(count, seed, name))
    keys = {name: new_key(tmp_path / f"{name}.key") for name in SIZES}
    lines = [line_of(name, key) for name, key in keys.items()]
    (tmp_path / "roster.toml").write_text("\n".join(["[keys]", *lines]) + "\n")
    experiment = tiny.replace(
        name="deployed",
        rounds=1,
        task=f"classification(classes='{','.join(sorted(LABELS))}')",
        secure_aggregation="masked",
        model__dtype="float64",
        data__source="jsonl(train='read/by/nobody.jsonl')",
        coordinator__minimum_clients=4,
        coordinator__timeout_seconds=240.0,
    )
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "cli"))
    with ExitStack() as stack:
        port = stack.enter_context(superlink(tmp_path))
        for name in SIZES:
            config = {
                "shard": tmp_path / f"{name}-train.jsonl",
                "test": tmp_path / f"{name}-test.jsonl",
                "state": tmp_path / "kept",
                "identity": tmp_path / f"{name}.key",
                "roster": tmp_path / "roster.toml",
            }
            node = stack.enter_context(supernode(tmp_path, name, port, **config))
            if name == KILLED:
                watched = (tmp_path / "kept" / name, node)
                threading.Thread(target=kill_once_masking, args=watched, daemon=True).start()
        launch.run(experiment, engine="loopback")
    folder = parts.folder_of(experiment)
    record = json.loads((folder / "rounds.jsonl").read_text().splitlines()[1])
    assert KILLED in {r["client"] for r in record["rejected"]}
    (total,) = record["train"].values()
    rows = sum(n for name, n in SIZES.items() if name != KILLED)
    assert set(record["train"]) == {"sum of 3"}
    assert total["loss"][1] == rows
    roster = json.loads((folder / "roster.json").read_text())
    assert [client["examples"] for client in roster["clients"]] == [None] * 4
    before = (folder / "checkpoint" / "round-000000").glob("*.safetensors")
    start = {path.stem: load_file(path) for path in before}
    grid = parts.resolve(experiment).secure.grid(4, "examples")  # type: ignore[attr-defined]
    units = grid.scale * rows / grid.cap  # of the grid, in the mean
    wanted = survivors_only(experiment, tmp_path)
    for group_, tensors in final(folder).items():
        for name, tensor in tensors.items():
            moved = (tensor.double() - start[group_][name].double()) * units
            plain = (wanted[group_][name].double() - start[group_][name].double()) * units
            # Adapters are float32 on the coordinator: a step of 2^-24 of a value below 1.
            slack = units * 2.0**-23
            assert float((moved - moved.round()).abs().max()) <= slack
            assert float((moved - plain).abs().max()) < 3 + slack
            assert torch.isfinite(tensor).all()
