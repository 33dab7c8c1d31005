"""Whole runs that are private for records: what leaves a client, what is repeated, what is paid."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from safetensors.torch import load_file

from clients.app import app as client_app
from clients.client import Client, simulated
from clients.cohort import CohortGrid
from fedtune import models, parts
from fedtune.adapter import State
from fedtune.config import Experiment
from fedtune.errors import BudgetError, RecipeError
from fedtune.privacy import ledger, mechanism, verifying
from fedtune.privacy.ledger import KEY
from fedtune.wire import Address
from server.app import app as server_app

SECRET = bytes(range(32))
NAMES = ("north", "south", "west")


@pytest.fixture
def record(tiny: Experiment) -> Experiment:
    return tiny.replace(
        rounds=2, strategy="ffa_lora", privacy__mode="record", privacy__noise=0.5, train__steps=3
    )


def keyed(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / KEY).write_bytes(SECRET)
    (folder / KEY).chmod(0o600)


def play(experiment: Experiment, client: Any = client_app, together: int = 0) -> Path:
    """Run it with known secrets: with new ones every run would differ."""
    folder = parts.folder_of(experiment)
    for own in (folder, *(folder / "clients" / name for name in NAMES)):
        if not (own / KEY).exists():
            keyed(own)
    grid = CohortGrid(client, experiment.flat(), together=together)
    server_app(grid, grid.server_context({"arms": ""}))
    return folder


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def elsewhere(experiment: Experiment, name: str) -> Experiment:
    return experiment.replace(output=f"{experiment.output}-{name}")


def test_nothing_but_noised_tensors_and_counts_leaves_a_client(record: Experiment) -> None:
    """And the certificate's numbers are those of the events."""
    told: list[dict[str, Any]] = []

    def watching(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            told.append({name: dict(record) for name, record in reply.content.items()})
        return reply

    folder = play(record, watching, together=1)
    assert len(told) == 6
    for content in told:
        assert set(content["metrics"]) == {"num-examples"}
        assert set(content) == {"config", "metrics", "delta", "head"}
    verifying.verify(folder)
    charges = [line for line in ledger.read(folder) if line["kind"] == "charge"]
    assert [sorted(line["clients"]) for line in charges] == [sorted(NAMES)] * 2
    for name in NAMES:
        key = folder / "clients" / name / KEY
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    written = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != KEY)
    assert SECRET not in written
    assert SECRET.hex().encode() not in written


def test_engines_agree_and_the_secret_matters(record: Experiment) -> None:
    record = record.replace(rounds=1)  # a last bit of it would draw round 2 anew
    alone = adapter_of(play(elsewhere(record, "alone"), together=1))
    together = adapter_of(play(elsewhere(record, "together"), together=3))
    other = elsewhere(record, "other")
    folder = parts.folder_of(other) / "clients" / "north"
    keyed(folder)
    (folder / KEY).write_bytes(bytes(32))
    others = adapter_of(play(other, together=3))
    for name, tensor in alone.items():
        assert torch.allclose(tensor, together[name], atol=2e-4)
    assert any(not torch.allclose(together[name], others[name], atol=2e-3) for name in others)


def test_a_run_that_was_stopped_repeats_its_bytes_and_pays_once(record: Experiment) -> None:
    whole = elsewhere(record, "whole")
    expected = adapter_of(play(whole))
    stopped = 0

    def dying(message: Message, context: Context) -> Message:
        nonlocal stopped
        reply = client_app(message, context)
        stopped += message.metadata.message_type.startswith("train")
        if stopped == 2:
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        play(record, dying, together=3)
    folder = play(record, together=3)
    for name, tensor in adapter_of(folder).items():
        assert torch.equal(tensor, expected[name])
    for own in (folder, *(folder / "clients" / name for name in NAMES)):
        charges = [line for line in ledger.read(own) if line["kind"] == "charge"]
        assert [line["round"] for line in charges] == [1, 2]


def north_of(experiment: Experiment) -> tuple[Client, State]:
    client = simulated(experiment)["north"]
    keyed(client.state)
    received = models.initial(client.model, 0)
    return client, received


def test_other_inputs_have_other_batches_and_other_noise(record: Experiment) -> None:
    client, received = north_of(record)
    address = Address("run", "", 1, "north")
    first, again = (client.prepare(address, received).work for _ in range(2))
    assert first == again
    nudged = {**received, "head": {n: t + 1e-6 for n, t in received["head"].items()}}
    other = client.prepare(address, nudged).work
    later = client.prepare(Address("run", "", 2, "north"), received).work
    zeros = {"w": torch.zeros(4)}
    seen = []
    for work in (first, other, later):
        assert work.private
        seen.append((work.private.units, work.private.noised(zeros, 0)["w"].tolist()))
    assert seen[0][0] != seen[1][0] != seen[2][0] != seen[0][0]
    assert seen[0][1] != seen[1][1] != seen[2][1] != seen[0][1]


def test_the_work_is_what_the_ledger_is_told(record: Experiment) -> None:
    client, received = north_of(record)
    promised = mechanism.record(record, client.units)
    work = client.prepare(Address("run", "", 1, "north"), received).work
    assert work.private
    assert len(work.batches) == len(work.rates) == promised.steps == 3
    assert work.private.sigma == promised.sigma == 0.5
    assert work.private.denominator == promised.batch == 4
    assert work.private.clip == promised.clip


def test_a_client_refuses_what_its_budget_does_not_cover(record: Experiment) -> None:
    """A coordinator that asks again and again with other models gets the promised rounds only."""
    recipe = record.replace(privacy__noise=0.0, privacy__epsilon=4.0)
    client, received = north_of(recipe)

    def ask(round: int, shift: float) -> None:
        head = {n: t + shift for n, t in received["head"].items()}
        client.prepare(Address("run", "", round, "north"), {**received, "head": head})

    ask(1, 0.0)
    ask(1, 0.0)
    ask(1, 0.1)
    with pytest.raises(BudgetError, match=r"above privacy\.epsilon = 4"):
        ask(2, 0.0)


def test_a_unit_is_all_rows_of_one_value(record: Experiment, three_clients: Path) -> None:
    """Two patients, one with most rows: a step takes all of a patient's rows or none."""
    recipe = record.replace(privacy__unit="label", train__batch_size=2, privacy__unit_rows=3)
    client, received = north_of(recipe)
    labels = client.shard.train["label"]
    assert client.units == len(set(labels)) == 3
    work = client.prepare(Address("run", "", 1, "north"), received).work
    assert work.private
    assert work.private.units is not None
    for batch, units in zip(work.batches, work.private.units, strict=True):
        for unit in set(units):
            own = [e["label"] for e, u in zip(batch, units, strict=True) if u == unit]
            assert len(own) == min(3, labels.count(labels[0])) or len(own) <= 3
            assert len({tuple(label) for label in own}) == 1
    with pytest.raises(RecipeError, match=r"privacy\.unit: .* no column 'patient'"):
        _ = simulated(record.replace(privacy__unit="patient"))["north"].units


def test_windows_of_a_long_text_are_one_record(
    tiny_llama: Path, three_clients: Path, record: Experiment
) -> None:
    recipe = record.replace(
        task="causal_lm", model__name=str(tiny_llama), model__max_length=3, train__batch_size=4
    )
    client = simulated(recipe)["north"]
    units = client.rows.units(client.number, client.model, "")
    assert len(units) == client.units == len(client.shard.train)
    assert [example for own in units for example in own] == list(range(len(client.examples)))
    assert max(map(len, units)) > 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"adapter__dora": True, "strategy": "fedit"}, r"adapter\.dora = true does not go with"),
        ({"train__group_by_length": True}, r"train\.group_by_length = true does not go with"),
        ({"strategy": "lora_a2"}, "its provisional pass would learn"),
        ({"privacy__unit_rows": 2}, r"privacy\.unit_rows = 2 bounds the rows of one unit"),
    ],
)
def test_what_would_break_the_promise_is_refused(
    record: Experiment, changes: dict[str, Any], reason: str
) -> None:
    parts.resolve(record)
    with pytest.raises(RecipeError, match=reason):
        parts.resolve(record.replace(**changes))


def test_more_in_a_batch_than_there_are_records_is_refused(record: Experiment) -> None:
    with pytest.raises(RecipeError, match=r"train\.batch_size = 16 is more than the 9 records"):
        play(record.replace(train__batch_size=16))


@pytest.mark.parametrize("strategy", ["fedit", "scaffold", "hetlora", "fedsvd", "ravan", "fedalt"])
def test_strategies_run_with_noisy_steps(record: Experiment, strategy: str) -> None:
    """Everybody's reply is accepted, and what is kept of the run is checked line by line."""
    rank = {"hetlora": 4}.get(strategy, 2)
    folder = play(record.replace(strategy=strategy, adapter__rank=rank, rounds=1))
    verifying.verify(folder)
    last = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])
    assert (sorted(last["cohort"]), last["rejected"], last["round"]) == (sorted(NAMES), [], 1)
