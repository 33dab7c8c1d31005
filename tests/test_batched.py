"""A whole run whose clients are trained together is the run whose clients are trained in turn."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message
from safetensors.torch import load_file

from clients.app import app as client_app
from clients.client import Client, Job
from clients.cohort import CohortGrid
from fedtune import parts
from fedtune.adapter import State
from fedtune.config import Experiment
from fedtune.strategies import STRATEGIES
from fedtune.wire import Address
from server.app import app as server_app

# What they keep, at the coordinator or at clients, is more than an adapter.
KEEPING = ["fed_sb", "fedalt", "feddpa", "fedsa_lora", "pf2lora", "ravan", "scaffold"]


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_the_batched_engine_gives_the_same_run(tiny: Experiment, strategy: str) -> None:
    """Unequal clients, every strategy; what each keeps to itself and what all share."""
    folders = []
    for batched in (False, True):
        name = f"{strategy}-{batched}".lower()
        e = tiny.replace(name=name, strategy=strategy, model__dtype="float64")
        grid = CohortGrid(client_app, e.flat(), together=0 if batched else 1)
        server_app(grid, grid.server_context({"arms": ""}))
        folders.append(parts.folder_of(e))
    assert_equal_runs(*folders)


@pytest.mark.parametrize("strategy", [n for n, s in STRATEGIES.items() if s.mixed_ranks])
def test_clients_of_mixed_ranks_give_the_same_run(tiny: Experiment, strategy: str) -> None:
    folders = []
    for batched in (False, True):
        name = f"{strategy}-{batched}".lower()
        e = tiny.replace(name=name, strategy=strategy, model__dtype="float64", adapter__ranks="2,1")
        grid = CohortGrid(client_app, e.flat(), together=0 if batched else 1)
        server_app(grid, grid.server_context({"arms": ""}))
        folders.append(parts.folder_of(e))
        lines = (folders[-1] / "rounds.jsonl").read_text().splitlines()
        assert not any(json.loads(line)["rejected"] for line in lines)
    assert_equal_runs(*folders)


def assert_equal_runs(one: Path, other: Path) -> None:
    files = [sorted(folder.rglob("*.safetensors")) for folder in (one, other)]
    assert len(files[0]) == len(files[1]) > 0
    for left, right in zip(*files, strict=True):
        first, second = load_file(left), load_file(right)
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-7, atol=1e-9)


def test_a_failing_client_of_the_batched_engine_is_set_aside(
    tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Client.prepare

    def failing(self: Client, address: Address, received: State) -> Job:
        if (self.shard.name, address.round) == ("south", 2):
            raise FloatingPointError("no luck")
        return whole(self, address, received)

    monkeypatch.setattr(Client, "prepare", failing)
    grid = CohortGrid(client_app, tiny.flat(), together=0)
    server_app(grid, grid.server_context({"arms": ""}))
    lines = (parts.folder_of(tiny) / "rounds.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["rejected"]) for line in lines] == [0, 0, 1, 0]


def test_what_cannot_be_trained_together_is_said_once(
    tiny: Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    grid = CohortGrid(client_app, tiny.replace(adapter__dora=True).flat(), together=0)
    server_app(grid, grid.server_context({"arms": ""}))
    told = [r for r in caplog.records if "one after another" in r.getMessage()]
    assert len(told) == 1
    assert "adapter.dora" in told[0].getMessage()


@pytest.mark.parametrize("strategy", KEEPING)
def test_a_run_that_was_stopped_ends_with_the_same_bytes(tiny: Experiment, strategy: str) -> None:
    """Whatever a strategy keeps, at the coordinator or at its clients; stopped in round 3 of 4."""
    folders = []
    for stopped in (False, True):
        e = tiny.replace(name=f"{strategy}-{stopped}".lower(), strategy=strategy, rounds=4)
        folders.append(parts.folder_of(e))

        def stopping(message: Message, context: Context) -> Message:
            if message.metadata.group_id == "3":
                raise KeyboardInterrupt
            return client_app(message, context)

        def run(e: Experiment, client: Callable[[Message, Context], Message]) -> None:
            grid = CohortGrid(client, e.flat(), together=0)
            server_app(grid, grid.server_context({"arms": ""}))

        if stopped:
            with pytest.raises(KeyboardInterrupt):
                run(e, stopping)
        run(e, client_app)
    files = [sorted(folder.rglob("*.safetensors")) for folder in folders]
    assert [len(found) for found in files] == [len(files[0])] * 2
    for left, right in zip(*files, strict=True):
        assert left.read_bytes() == right.read_bytes()
