"""Whole runs of every strategy: through messages or without, and stopped or not, the same bytes."""

import pytest
from flwr.app import Context, Message

from clients import client as clients
from clients.app import app as client_app
from clients.cohort import CohortGrid
from fedtune import models, parts
from fedtune.adapter import State, add, digest
from fedtune.combine import Mean
from fedtune.config import Experiment
from fedtune.strategies import STRATEGIES
from fedtune.strategies.strategy import ClientInfo, Update
from fedtune.wire import Address
from server import checkpoint
from server.app import app as server_app

names = pytest.mark.parametrize("name", sorted(STRATEGIES))


def recipe(tiny: Experiment, name: str, folder: str) -> Experiment:
    """Two rounds of the tiny experiment, with clients of mixed ranks where they may have them."""
    ranks = "2,1" if STRATEGIES[name].mixed_ranks else ""
    return tiny.replace(
        name=folder,
        strategy=name,
        rounds=2,
        adapter__ranks=ranks,
        train__steps=2,
        evaluation__every=2,
    )


def play(experiment: Experiment, stop: int = 0) -> int:
    """Run it, stopped as by Ctrl-C at its training message `stop`; how many there were."""
    seen = 0

    def answer(message: Message, context: Context) -> Message:
        nonlocal seen
        seen += message.metadata.message_type == "train"
        if stop and seen == stop:
            raise KeyboardInterrupt
        return client_app(message, context)

    grid = CohortGrid(answer, experiment.flat())
    server_app(grid, grid.server_context({"arms": ""}))
    return seen


def files(experiment: Experiment) -> dict[str, bytes]:
    """Every tensor that a run leaves: the coordinator's state, the clients' own, the result."""
    folder = parts.folder_of(experiment)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


@names
def test_a_resumed_run_leaves_the_bytes_of_an_uninterrupted_one(
    tiny: Experiment, name: str
) -> None:
    """Killed at the last client of round 2, when the others have kept and sent theirs."""
    whole, stopped = recipe(tiny, name, "whole"), recipe(tiny, name, "stopped")
    messages = play(whole)
    with pytest.raises(KeyboardInterrupt):
        play(stopped, stop=messages)
    assert play(stopped) == messages // 2
    assert files(stopped) == files(whole)
    assert len(files(whole)) > 0


def by_hand(experiment: Experiment) -> State:
    """The coordinator's last state without coordinator, messages and gate: two halves in a loop."""
    resolved = parts.resolve(experiment)
    strategy = resolved.strategy
    population = clients.simulated(experiment)
    dealt = [] if strategy.pools else experiment.adapter.dealt()
    model = next(iter(population.values())).model
    start = models.initial(model, experiment.seed, principal=strategy.begins == "principal")
    server: State = {**strategy.start(start["adapter"]), "head": start["head"]}
    for round in range(1, experiment.rounds + 1):
        updates = []
        for number, (name, client) in enumerate(sorted(population.items())):
            rank = dealt[number % len(dealt)] if dealt else 0
            info = ClientInfo(name, len(client.shard.train), round - 1, rank)
            info = ClientInfo(name, info.examples, round - 1, strategy.client_rank(server, info))
            sent = {**strategy.broadcast(server, info, round), "head": server["head"]}
            address = Address("", "", round, name, round - 1, "own", info.rank)
            job = client.prepare(address, sent)
            trained = client.train(job).state
            updates.append(Update(name, float(info.examples), client.finish(job, trained)))
        after = strategy.aggregate(server, updates, Mean(), round)
        if all("head" in update.state for update in updates):
            weights = [update.weight for update in updates]
            mean = Mean()([update.state["head"] for update in updates], weights)
            after = {**after, "head": add(server["head"], mean)}
        server = after
    return server


@names
def test_messages_change_nothing(tiny: Experiment, name: str) -> None:
    """Bit for bit what the same clients give when states are handed over as they are."""
    through = recipe(tiny, name, "through")
    play(through)
    read = checkpoint.latest(parts.folder_of(through) / "checkpoint", through)
    assert read is not None
    server = by_hand(recipe(tiny, name, "by-hand"))
    assert {g: digest({g: t}) for g, t in read.state.items()} == {
        g: digest({g: t}) for g, t in server.items()
    }
