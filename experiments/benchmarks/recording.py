"""One real round, written down: what the server had, and what every client ended with.

Clients train by FedTune's own engine on real text for a few rounds; the updates of the last one are
kept. With one rank they are FedIT's, with several FlexLoRA's, since FedIT has no mixed ranks.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from clients.app import app as client_app
from clients.cohort import CohortGrid
from fedtune.adapter import Adapter, State
from fedtune.combine import Combine
from fedtune.config import Experiment
from fedtune.strategies import STRATEGIES
from fedtune.strategies.fedit import FedIT
from fedtune.strategies.flexlora import FlexLoRA
from fedtune.strategies.strategy import Strategy, Update
from server.coordinator import Coordinator


@dataclass(frozen=True)
class Client:
    """One client of a recorded round.

    Attributes:
        name: its name.
        weight: its training rows.
        ended: its adapter after training, at its own rank.
    """

    name: str
    weight: float
    ended: Adapter


@dataclass(frozen=True)
class Recorded:
    """A round's beginning and its clients.

    Attributes:
        round: from 1.
        before: the adapter that all began from; one of fewer ranks, from the first of them.
        clients: sorted by name.
        ranks: what `adapter.ranks` was, "" for one rank.
        scaling: alpha / rank.
        recipe: how it was made, as TOML.
    """

    round: int
    before: Adapter
    clients: list[Client]
    ranks: str
    scaling: float
    recipe: str


def write(folder: Path, before: Adapter, clients: Sequence[Client], round: int) -> None:
    """Keep a round's tensors, in the place of an earlier one's."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(before, folder / "before.safetensors")
    for client in clients:
        save_file(
            {name: tensor.contiguous() for name, tensor in client.ended.items()},
            folder / f"{client.name}.safetensors",
        )
    told = {"round": round, "weights": {client.name: client.weight for client in clients}}
    (folder / "round.json").write_text(json.dumps(told), encoding="utf-8")


def read(folder: Path) -> Recorded:
    """The round that `record` left in a folder."""
    told = json.loads((folder / "round.json").read_text(encoding="utf-8"))
    experiment = Experiment.load(folder / "experiment.toml")
    clients = [
        Client(name, weight, load_file(folder / f"{name}.safetensors"))
        for name, weight in sorted(told["weights"].items())
    ]
    return Recorded(
        round=int(told["round"]),
        before=load_file(folder / "before.safetensors"),
        clients=clients,
        ranks=experiment.adapter.ranks,
        scaling=experiment.adapter.alpha / experiment.adapter.rank,
        recipe=experiment.text(),
    )


def record(experiment: Experiment, folder: Path) -> None:
    """Train the experiment's rounds, with FedIT or FlexLoRA, and keep the last one's updates."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.toml").write_text(experiment.text(), encoding="utf-8")
    kind: type[Strategy] = FlexLoRA if experiment.adapter.ranks else FedIT

    @dataclass(frozen=True)
    class Recording(kind):  # type: ignore[valid-type, misc]
        def aggregate(
            self, server: State, updates: Sequence[Update], combine: Combine, round: int
        ) -> State:
            ended = [
                Client(update.client, update.weight, self.contribution(server, update, round))
                for update in updates
            ]
            write(folder, server["adapter"], ended, round)
            after: State = super().aggregate(server, updates, combine, round)
            return after

    with _known("recording", Recording), tempfile.TemporaryDirectory(prefix="replay-") as scratch:
        recording = experiment.replace(strategy="recording", references="none", output=scratch)
        grid = CohortGrid(client_app, recording.flat(), together=0)
        Coordinator(recording, "", grid).run()


@contextmanager
def _known(name: str, kind: type[Strategy]) -> Iterator[None]:
    """Let a recipe name a strategy for a while."""
    STRATEGIES[name] = kind
    try:
        yield
    finally:
        del STRATEGIES[name]
