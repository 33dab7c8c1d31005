"""Whole runs in this process: the same bytes twice, faults set aside, folders protected."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from flwr.app import Array, Context, Message
from safetensors.torch import load_file

from clients.app import app as client_app
from clients.cohort import CohortGrid
from fedtune import launch, parts
from fedtune.config import Experiment
from fedtune.errors import RecipeError, RunError
from server.app import app as server_app
from server.checkpoint import latest


def play(
    experiment: Experiment, client: Callable[[Message, Context], Message] = client_app
) -> Path:
    """Run the recipe's own strategy on a grid of `client`; returns the run's folder."""
    grid = CohortGrid(client, experiment.flat())
    server_app(grid, grid.server_context({"arms": ""}))
    return parts.folder_of(experiment)


def final(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_one_engine_gives_the_same_bytes_twice(tiny: Experiment) -> None:
    first, second = play(tiny), play(tiny.replace(name="second"))
    assert final(first) == final(second)
    assert final(first) != final(play(tiny.replace(name="third", seed=1)))


def test_training_helps_and_every_round_is_recorded(tiny: Experiment) -> None:
    folder = play(tiny.replace(rounds=6, train__epochs=3))
    rounds = records(folder)
    assert [r["round"] for r in rounds] == list(range(7))
    correct = [sum(c["accuracy"][0] for c in r["evaluation"]["own"].values()) for r in rounds]  # type: ignore
    assert correct[-1] >= 20 > correct[0]  # of 24
    assert all(r["bytes_up"] > 0 for r in rounds[1:])  # type: ignore[operator]
    assert rounds[0]["bytes_up"] == 0


def test_stopping_anywhere_and_going_on_gives_the_same_bytes(tiny: Experiment) -> None:
    """A client that raises KeyboardInterrupt stops the process as Ctrl-C does, once a message."""
    whole = play(tiny)
    messages = 0

    def counting(message: Message, context: Context) -> Message:
        nonlocal messages
        messages += 1
        return client_app(message, context)

    play(tiny.replace(name="counted"), counting)
    for stop in range(2, messages + 1, 3):
        seen = 0

        def stopping(message: Message, context: Context, stop: int = stop) -> Message:
            nonlocal seen
            seen += 1
            if seen == stop:
                raise KeyboardInterrupt
            return client_app(message, context)

        again = tiny.replace(name=f"stopped-{stop}")
        with pytest.raises(KeyboardInterrupt):
            play(again, stopping)
        folder = play(again)
        assert final(folder) == final(whole)
        assert [r["round"] for r in records(folder)] == [0, 1, 2, 3]


def test_personal_models_survive_a_stop_too(tiny: Experiment) -> None:
    local = tiny.replace(strategy="local_only")

    def kept(folder: Path) -> dict[str, bytes]:
        return {
            str(p.relative_to(folder)): p.read_bytes()
            for p in sorted((folder / "clients").rglob("*.safetensors"))
        }

    whole = play(local)
    assert {name.split("/")[1] for name in kept(whole)} == {"north", "south", "west"}
    seen = 0

    def stopping(message: Message, context: Context) -> Message:
        nonlocal seen
        seen += 1
        if seen == 10:  # in the middle of round 2: one client has kept it already
            raise KeyboardInterrupt
        return client_app(message, context)

    with pytest.raises(KeyboardInterrupt):
        play(local.replace(name="stopped"), stopping)
    assert kept(play(local.replace(name="stopped"))) == kept(whole)


def spoiled(
    client: str, round: int, spoil: Callable[[Message], Message]
) -> Callable[[Message, Context], Message]:
    """The ClientApp, one client's reply to one round's training spoiled."""

    def answer(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type != "train":
            return reply
        address = message.content["config"]
        return spoil(reply) if (address["client"], address["round"]) == (client, round) else reply

    return answer


def _nan(reply: Message) -> Message:
    name = next(iter(reply.content["delta"]))
    shape = tuple(reply.content["delta"][name].shape)
    reply.content["delta"][name] = Array(np.full(shape, np.nan, np.float32))
    return reply


def _raise(reply: Message) -> Message:
    raise RuntimeError("the GPU fell out")


def _truncated(reply: Message) -> Message:
    reply.content["delta"].popitem()
    return reply


@pytest.mark.parametrize(
    ("spoil", "code", "reason"),
    [
        (_nan, "E_NONFINITE", "holds NaN"),
        (_raise, "E_CLIENT", "the GPU fell out"),
        (_truncated, "E_SCHEMA", "1 tensors missing"),
    ],
)
def test_a_bad_reply_is_set_aside_and_the_round_goes_on(
    tiny: Experiment, spoil: Callable[[Message], Message], code: str, reason: str
) -> None:
    """The model is then exactly that of a round in which the client did not take part."""
    folder = play(tiny.replace(rounds=1), spoiled("south", 1, spoil))
    (rejected,) = records(folder)[1]["rejected"]  # type: ignore[misc]
    assert (rejected["client"], rejected["code"]) == ("south", code)
    assert reason in rejected["reason"]

    absent = tiny.replace(name="absent", rounds=1)
    reference = play(absent, spoiled("south", 1, _raise))
    assert final(folder) == final(reference)
    assert final(folder) != final(play(tiny.replace(name="whole", rounds=1)))


def test_too_few_replies_stop_the_run_and_keep_what_was_committed(tiny: Experiment) -> None:
    demanding = tiny.replace(coordinator__minimum_replies=3)
    with pytest.raises(RunError, match="Round 2: 2 of 3 replies were accepted, 3 are needed"):
        play(demanding, spoiled("west", 2, _raise))
    read = latest(parts.folder_of(demanding) / "checkpoint", demanding)
    assert read is not None
    assert read.round == 1
    assert final(play(demanding)) == final(play(tiny.replace(name="whole")))


def test_a_clients_failure_in_one_round_does_not_touch_its_personal_state(tiny: Experiment) -> None:
    """The reply of round 2 was set aside, so round 3 begins from the state of round 1."""
    local = tiny.replace(strategy="local_only", rounds=3)
    folder = play(local, spoiled("north", 2, _raise))
    checkpoint = latest(folder / "checkpoint", local)
    assert checkpoint is not None
    assert checkpoint.last_rounds == {"north": 3, "south": 3, "west": 3}
    told = json.loads((folder / "rounds.jsonl").read_text().splitlines()[2])
    assert [r["client"] for r in told["rejected"]] == ["north"]


@pytest.mark.parametrize("head", ["local", "frozen"])
def test_a_head_that_is_not_averaged_is_not_sent(tiny: Experiment, head: str) -> None:
    seen: set[str] = set()

    def watching(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            seen.update(reply.content)
        return reply

    folder = play(tiny.replace(task=f"classification(head='{head}')", rounds=2), watching)
    assert seen == {"config", "metrics", "delta"}
    heads = sorted((folder / "clients").rglob("head.safetensors"))
    assert len(heads) == (6 if head == "local" else 0)
    start = latest(
        folder / "checkpoint", tiny.replace(task=f"classification(head='{head}')", rounds=2)
    )
    assert start is not None
    assert len({path.read_bytes() for path in heads}) == len(heads)


def test_what_a_client_keeps_never_leaves_it(tiny: Experiment) -> None:
    """local_only: no tensor of any reply, and none of a broadcast after the first."""
    arrays = []

    def watching(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        arrays.append((len(message.content.array_records), len(reply.content.array_records)))
        return reply

    play(tiny.replace(strategy="local_only"), watching)
    assert all(up == 0 for _, up in arrays)
    assert sum(down > 0 for down, _ in arrays) == 6  # untuned, then round 1


def test_an_empty_poisson_round_changes_nothing(tiny: Experiment) -> None:
    folder = play(tiny.replace(cohort="poisson(rate=1e-12)", rounds=2))
    rounds = records(folder)
    assert [r["cohort"] for r in rounds] == [[], [], []]
    assert rounds[0]["evaluation"] == rounds[2]["evaluation"]
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert not any(bool(t.any()) for name, t in tensors.items() if "lora_B" in name)


def test_uniform_weights_are_not_the_default(tiny: Experiment) -> None:
    assert final(play(tiny)) != final(play(tiny.replace(name="uniform", weighting="uniform")))


def test_running_it_whole_gives_references_and_a_report(tiny: Experiment) -> None:
    done = launch.run(tiny.replace(references="local_only,centralized"))
    folder = parts.folder_of(tiny)
    assert (folder / "report.html").stat().st_size > 10_000
    assert set(done.references) == {"local_only", "centralized"}
    assert (folder / "references" / "centralized" / "adapter").is_dir()
    assert not (folder / "references" / "local_only" / "adapter").exists()
    assert torch.get_num_threads() == 1


def test_a_pooling_reference_needs_one_client(tiny: Experiment) -> None:
    three = tiny.replace(coordinator__minimum_clients=3, coordinator__minimum_replies=3)
    assert play(parts.reference(three, "centralized")).name == "centralized"
    with pytest.raises(RunError, match="3 clients on 1 nodes; 4 clients on 1 nodes are needed"):
        play(tiny.replace(name="four", coordinator__minimum_clients=4))


def test_a_finished_run_is_never_overwritten_unasked(tiny: Experiment) -> None:
    launch.run(tiny)
    folder = parts.folder_of(tiny)
    before = final(folder)
    with pytest.raises(RecipeError, match=r"holds a finished run.*name=second.*--overwrite"):
        launch.run(tiny)
    stamp = (folder / "rounds.jsonl").stat().st_mtime_ns
    launch.run(tiny, resume=True)
    assert (folder / "rounds.jsonl").stat().st_mtime_ns == stamp
    launch.run(tiny, overwrite=True)
    assert (folder / "rounds.jsonl").stat().st_mtime_ns > stamp
    assert final(folder) == before


def test_resume_begins_where_there_is_nothing(tiny: Experiment) -> None:
    launch.run(tiny, resume=True)
    assert final(parts.folder_of(tiny))


def test_an_unfinished_run_of_another_recipe_is_refused(tiny: Experiment) -> None:
    launch.run(tiny)
    with pytest.raises(RecipeError, match="another recipe: seed was 0 and is 4"):
        launch.run(tiny.replace(seed=4), resume=True)


def test_a_folder_that_is_no_run_is_left_alone(tiny: Experiment) -> None:
    folder = parts.folder_of(tiny)
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(RecipeError, match=r"is no run of FedTune \(it holds thesis.txt\)"):
            launch.run(tiny, overwrite=overwrite)
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_a_run_in_use_is_left_alone(tiny: Experiment) -> None:
    launch.run(tiny)
    folder = parts.folder_of(tiny)
    before = final(folder)
    with FileLock(folder / ".lock"):
        with pytest.raises(RecipeError, match="is in use by another process"):
            launch.run(tiny, overwrite=True)
        (folder / "report.html").unlink()
        with pytest.raises(RecipeError, match="is in use by another process"):
            launch.run(tiny)
    assert final(folder) == before


def test_every_node_must_agree_with_the_recipe_before_anything_is_loaded(tiny: Experiment) -> None:
    with pytest.raises(RecipeError, match=r"no column 'speaker'.*text, label, client"):
        play(tiny.replace(data__partition="by_column(column='speaker')"))
    assert not (parts.folder_of(tiny) / "experiment.toml").exists()


def test_a_run_without_test_rows_is_refused_before_it_trains(
    tiny: Experiment, three_clients: Path
) -> None:
    source = f"jsonl(train='{three_clients}/train.jsonl')"
    with pytest.raises(RecipeError, match="No client has test rows"):
        play(tiny.replace(data__source=source, data__test_fraction=0.0))
    assert not (parts.folder_of(tiny) / "rounds.jsonl").exists()
