"""Runs whose clients live in worker processes: the same bytes twice, and deaths set aside."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from flwr.app import Context, Message
from safetensors.torch import load_file

from clients import app, client, pool
from fedtune import launch, parts, wire
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.processes import can_fork
from server.app import app as server_app

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not can_fork(1), reason="workers are forked on Linux only")


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def tensors(folder: Path) -> dict[str, bytes]:
    """Everything a run made, by file."""
    found = sorted([*folder.rglob("adapter_model.safetensors"), *folder.rglob("clients/**/*.s*s")])
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def play(
    experiment: Experiment, answer: Callable[[Message, Context], Message], *, fork: bool = True
) -> Path:
    """Run the recipe's own strategy on two workers; returns the run's folder."""
    if fork:
        client.warm(experiment, [""])
    with pool.Pool(pool.Job(answer, experiment.flat(), 2), fork=fork) as workers:
        grid = pool.PoolGrid(workers, 0)
        server_app(grid, grid.server_context({"arms": ""}))
    return parts.folder_of(experiment)


def test_two_runs_and_an_interrupted_one_give_the_same_bytes(
    tiny: Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C after so many replies of all arms, whichever they are, then the same run again."""
    whole = tiny.replace(references="local_only,centralized")
    launch.run(whole, workers=2)
    first = tensors(parts.folder_of(whole))
    assert len(first) == 2 + 9 * 2  # adapters; adapter and head of three clients, three rounds
    launch.run(whole.replace(name="again"), workers=2)
    assert tensors(parts.folder_of(whole.replace(name="again"))) == first

    class Interrupting(logging.Handler):
        left = 0

        def emit(self, record: logging.LogRecord) -> None:
            self.left -= getattr(record, "event", {}).get("event") == "reply"
            if not self.left:
                self.left = -1
                os.kill(os.getpid(), signal.SIGINT)

    caplog.set_level(logging.INFO, "fedtune")
    handler = Interrupting()
    logging.getLogger("fedtune").addHandler(handler)
    try:
        for replies in (9, 20):
            stopped = whole.replace(name=f"stopped-{replies}")
            handler.left = replies
            with pytest.raises(KeyboardInterrupt):
                launch.run(stopped, workers=2)
            launch.run(stopped, workers=2)
            assert tensors(parts.folder_of(stopped)) == first
    finally:
        logging.getLogger("fedtune").removeHandler(handler)
    assert not [t for t in threading.enumerate() if "run_arm" in t.name or "_serve" in t.name]


def test_the_number_of_workers_changes_rounding_only(tiny: Experiment) -> None:
    folders = []
    for engine, workers in (("sequential", 0), ("batched", 1), ("batched", 2), ("batched", 3)):
        e = tiny.replace(name=f"{engine}-{workers}", model__dtype="float64")
        launch.run(e, engine=engine, workers=workers)
        folders.append(parts.folder_of(e))
    first = load_file(folders[0] / "adapter" / "adapter_model.safetensors")
    for folder in folders[1:]:
        other = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert first.keys() == other.keys()
        for name in first:
            torch.testing.assert_close(first[name], other[name], rtol=1e-8, atol=1e-10)
        for one, two in zip(records(folders[0]), records(folder), strict=True):
            for key in ("cohort", "bytes_down", "bytes_up", "bytes_evaluation", "rejected"):
                assert one[key] == two[key]
            assert one["tokens"][0] == two["tokens"][0]  # type: ignore[index]


def dying(message: Message, context: Context) -> Message:
    """The ClientApp, whose process is killed in south's second round."""
    if message.metadata.message_type == "train.cohort":
        turns = [wire.Address.of(turn) for turn in wire.unbundle(message.content)]
        if any((turn.client, turn.round) == ("south", 2) for turn in turns):
            os.kill(os.getpid(), signal.SIGKILL)
    return app.answer(message, context)


def test_a_worker_that_dies_is_replaced_and_its_clients_set_aside(tiny: Experiment) -> None:
    """Two workers, so north (24 rows) is alone and south (17) and west (9) are lost together."""
    rounds = records(play(tiny, dying))
    rejected = [[(r["client"], r["code"]) for r in line["rejected"]] for line in rounds]  # type: ignore
    assert rejected == [[], [], [("south", "E_CLIENT"), ("west", "E_CLIENT")], []]
    assert "SIGKILL" in rounds[2]["rejected"][0]["reason"]  # type: ignore[index]
    assert [sorted(line["train"]) for line in rounds[2:]] == [["north"], ["north", "south", "west"]]  # type: ignore


def mute(message: Message, context: Context) -> Message:
    """The ClientApp, of which one node cannot describe its clients."""
    if message.metadata.message_type == "query.describe" and context.node_config["partition-id"]:
        raise RecipeError("a row is wrong")
    return app.answer(message, context)


def test_a_simulation_never_goes_on_with_a_part_of_its_clients(tiny: Experiment) -> None:
    with pytest.raises(RecipeError, match="a row is wrong"):
        play(tiny, mute)
    assert not (parts.folder_of(tiny) / "rounds.jsonl").exists()


def test_what_every_worker_warns_of_is_told_once(
    tiny: Experiment, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    launch.run(tiny.replace(adapter__dora=True, name="warned"), workers=2)
    told = [r for r in caplog.records if "one after another" in r.getMessage()]
    assert len(told) == 1
    assert capfd.readouterr() == ("", "")


def test_an_error_of_a_reference_is_raised_and_stops_the_rest(tiny: Experiment) -> None:
    long = tiny.replace(references="local_only", rounds=200)
    taken = parts.folder_of(parts.reference(long, "local_only"))
    taken.mkdir(parents=True)
    with FileLock(taken / ".lock"), pytest.raises(RecipeError, match="in use by another process"):
        launch.run(long, workers=2)
    assert len(records(parts.folder_of(long))) < 200


def test_workers_end_with_their_parent(tiny: Experiment) -> None:
    """The standard output that they share with it is closed once the last of them is gone."""
    program = (
        "import sys, signal, os\n"
        "from clients import app, pool\n"
        "with pool.Pool(pool.Job(app.answer, {}, 3), fork=True) as workers:\n"
        "    print('started', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "started\n")


@pytest.mark.slow
def test_spawned_workers_give_the_same_bytes(tiny: Experiment) -> None:
    folders = [
        play(tiny.replace(name=f"fork-{fork}".lower()), app.answer, fork=fork)
        for fork in (True, False)
    ]
    assert tensors(folders[0]) == tensors(folders[1])
    assert len(tensors(folders[0])) == 1
