"""Whole private runs: what is charged, what is repeated, where they stop."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Context, Message

from clients.app import app as client_app
from clients.cohort import CohortGrid
from fedtune import parts
from fedtune.config import Experiment
from fedtune.errors import BudgetError, RecipeError
from fedtune.privacy import ledger
from server.app import app as server_app


def play(
    experiment: Experiment, client: Callable[[Message, Context], Message] = client_app
) -> Path:
    grid = CohortGrid(client, experiment.flat())
    server_app(grid, grid.server_context({"arms": ""}))
    return parts.folder_of(experiment)


def central(tiny: Experiment, **changes: object) -> Experiment:
    settings = {
        "privacy__mode": "client",
        "privacy__noise": 1.0,
        "privacy__clip": 0.5,
        "privacy__minimum_clients": 2,
        "weighting": "uniform",
        "strategy": "ffa_lora",
        "cohort": "poisson(rate=0.6)",
    }
    return tiny.replace(**(settings | changes))  # type: ignore[arg-type]


def final(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def kinds(folder: Path) -> list[tuple[str, int | None]]:
    return [(line["kind"], line.get("round")) for line in ledger.read(folder)]


def test_first(tiny):
    folder = play(central(tiny))
    for line in ledger.read(folder): print(json.dumps(line)[:3000])
    assert 0
