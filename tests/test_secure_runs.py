"""Whole runs with masked updates: the plain run's result, whoever drops out, in every engine."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import classification_rows, write_jsonl
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from safetensors.torch import load_file

from clients import client as clients
from clients.app import app as client_app
from clients.cohort import CohortGrid
from fedtune import launch, parts, processes, wire
from fedtune.config import Experiment
from fedtune.errors import RecipeError, RunError
from fedtune.wire import Address
from server.app import app as server_app

Answer = Callable[[Message, Context], Message]
SIZES = {"east": 11, "north": 24, "south": 17, "west": 9}
FOLDER = Path(__file__).parent.parent / "experiments" / "benchmarks"
LEGS = ("keys", "shares", "masked", "sign", "reveal")


@pytest.fixture(scope="module")
def four_clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    for split, seed in (("train", 0), ("test", 1)):
        counts = SIZES if split == "train" else dict.fromkeys(SIZES, 5)
        rows = [row for name, n in counts.items() for row in classification_rows(n, seed, name)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture
def four(tiny: Experiment, four_clients: Path) -> Experiment:
    """Four clients, two rounds, updates in clear."""
    source = f"jsonl(train='{four_clients}/train.jsonl', test='{four_clients}/test.jsonl')"
    return tiny.replace(data__source=source, rounds=2)


def masked(experiment: Experiment, **changes: bool | int | float | str) -> Experiment:
    return experiment.replace(**{"name": "masked", "secure_aggregation": "masked", **changes})


def play(experiment: Experiment, client: Answer = client_app, together: int = 1) -> Path:
    grid = CohortGrid(client, experiment.flat(), together=together)
    server_app(grid, grid.server_context({"arms": ""}))
    return parts.folder_of(experiment)


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def state(folder: Path, round: int) -> dict[str, torch.Tensor]:
    found = sorted((folder / "checkpoint" / f"round-{round:06d}").glob("*.safetensors"))
    assert found
    return {f"{path.stem}/{name}": t for path in found for name, t in load_file(path).items()}


def step_of(experiment: Experiment, rows: int) -> float:
    """The largest error of a round's mean: n / s, over the share of the cap that the rows are."""
    settings = parts.resolve(experiment).secure
    grid = settings.grid(len(SIZES), experiment.weighting)  # type: ignore[attr-defined]
    scale: float = grid.scale * (rows / grid.cap)
    return len(SIZES) / scale


def close(one: Path, other: Path, round: int, tolerance: float) -> None:
    first, second = state(one, round), state(other, round)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize(
    ("strategy", "together"),
    [("fedit", 1), ("fedit", 8), ("rolora", 8), ("fedsa_lora", 8), ("scaffold", 8)],
)
def test_the_result_is_that_of_the_plain_run_to_the_grid(
    four: Experiment, strategy: str, together: int
) -> None:
    """Round 1 begins from the same model, so it differs by the bound; rounding of float32 is
    1e-7 beside it. Later rounds train on what differs already."""
    weighting = "uniform" if strategy == "scaffold" else "examples"
    plain = four.replace(strategy=strategy, weighting=weighting)
    secure = masked(plain)
    one, other = play(plain, together=together), play(secure, together=together)
    rows = len(SIZES) if weighting == "uniform" else sum(SIZES.values())
    close(one, other, 1, step_of(secure, rows) + 2e-7)
    close(one, other, 2, 2e-3)
    for clear, sums in zip(records(one)[1:2], records(other)[1:2], strict=True):
        (total,) = sums["train"].values()  # type: ignore[attr-defined]
        for name, values in total.items():
            exact = np.sum([c[name] for c in clear["train"].values()], axis=0)  # type: ignore
            np.testing.assert_allclose(values, exact, rtol=0, atol=len(SIZES) * 2.0**-20)
        assert sums["tokens"] == clear["tokens"]
        assert sums["rejected"] == clear["rejected"] == []


def test_the_same_bytes_twice_and_whoever_answers(four: Experiment) -> None:
    """Keys are fresh in every run, but the sum does not depend on them."""
    first = masked(four)
    folder = play(first)
    again = play(first.replace(name="again"))
    assert state(folder, 2).keys() == state(again, 2).keys()
    for name, tensor in state(folder, 2).items():
        assert torch.equal(tensor, state(again, 2)[name])


@pytest.mark.skipif(not processes.can_fork(1), reason="workers are forked on Linux only")
def test_any_worker_may_answer_any_leg(four: Experiment) -> None:
    """With its references, which are masked too, but for the one that has one client."""
    secure = masked(four, references="local_only,centralized,ffa_lora", model__dtype="float64")
    done = launch.run(secure, workers=3)
    assert set(done.references) == {"local_only", "centralized", "ffa_lora"}
    alone = secure.replace(name="sequential")
    launch.run(alone, engine="sequential")
    for part in ("", "references/ffa_lora"):
        one, other = (parts.folder_of(e) / part for e in (secure, alone))
        close(one, other, 1, step_of(secure, sum(SIZES.values())) + 2e-7)
        assert (one / "secure" / "pending.json").exists()
    assert not (parts.folder_of(secure) / "references" / "centralized" / "secure").exists()


def test_stopping_anywhere_and_going_on_gives_the_same_bytes(four: Experiment) -> None:
    """In each leg, and after every single message while some have revealed and some have not."""
    secure = masked(four, rounds=1)
    whole = state(play(secure), 1)
    messages = 0

    def counting(message: Message, context: Context) -> Message:
        nonlocal messages
        messages += 1
        return client_app(message, context)

    play(secure.replace(name="counted"), counting)
    before, legs = 1 + 4, len(LEGS) * 4  # the roster and the evaluation of round 0
    assert messages == before + legs + 4
    for stop in (2, 7, 10, 14, 16, 17, 18, 19, 20, 22):
        seen = 0

        def stopping(message: Message, context: Context, stop: int = stop) -> Message:
            nonlocal seen
            seen += 1
            reply = client_app(message, context) if seen % 2 else None
            if seen == before + stop:
                raise KeyboardInterrupt  # before or after the client has answered
            return reply or client_app(message, context)

        again = secure.replace(name=f"stopped-{stop}")
        with pytest.raises(KeyboardInterrupt):
            play(again, stopping)
        found = state(play(again), 1)
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.items()), stop


def failing(leg: str, *names: str) -> Answer:
    """The ClientApp, where these clients fail at a leg."""

    def answer(message: Message, context: Context) -> Message:
        asked = message.metadata.message_type == f"train.{leg}"
        if asked and Address.of(message.content).client in names:
            raise ValueError("the power is out")
        return client_app(message, context)

    return answer


@pytest.mark.parametrize("leg", ["shares", "masked", "sign", "reveal"])
def test_the_survivors_sum_is_exact_whoever_drops_out(four: Experiment, leg: str) -> None:
    """A plain run in which the same client fails gives the mean of the other three."""
    secure = masked(four, rounds=1)
    folder = play(secure, failing(leg, "north"))
    out = {"north"} if leg in LEGS[:3] else set[str]()

    def plain(message: Message, context: Context) -> Message:
        asked = message.metadata.message_type == "train"
        if asked and Address.of(message.content).client in out:
            raise ValueError("the power is out")
        return client_app(message, context)

    rows = sum(n for name, n in SIZES.items() if name not in out)
    close(play(four.replace(rounds=1), plain), folder, 1, step_of(secure, rows) + 2e-7)
    record = records(folder)[1]
    assert [r["client"] for r in record["rejected"]] == ["north"]  # type: ignore
    (total,) = record["train"].values()  # type: ignore[attr-defined]
    assert total["loss"][1] == rows
    assert set(record["train"]) == {f"sum of {4 - len(out)}"}  # type: ignore[call-overload]


@pytest.mark.parametrize("leg", ["keys", "masked", "reveal"])
def test_below_the_threshold_nothing_is_revealed_and_the_run_can_go_on(
    four: Experiment, leg: str
) -> None:
    secure, revealed = masked(four, rounds=1), list[str]()
    broken = failing(leg, "north", "south")

    def watching(message: Message, context: Context) -> Message:
        reply = broken(message, context)
        if message.metadata.message_type == "train.reveal":
            revealed.append(Address.of(message.content).client)
        return reply

    with pytest.raises(RunError, match=f"2 clients are left after leg '{leg}'.*3 are needed") as e:
        play(secure, watching)
    assert "north: ValueError: the power is out" in str(e.value)
    assert "run the same command again" in str(e.value)
    assert leg == "reveal" or not revealed
    whole = state(play(secure.replace(name="whole")), 1)
    found = state(play(secure), 1)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def _flipped_word(reply: Message) -> Message:
    words = reply.content[wire.WORDS][wire.WORDS].numpy().copy()  # type: ignore[index,union-attr]
    words[5] ^= 1
    reply.content[wire.WORDS] = ArrayRecord({wire.WORDS: Array(words)})
    return reply


def _with_metrics(reply: Message) -> Message:
    reply.content[wire.METRICS] = wire.metrics_record({"loss": [1.0, 2.0]}, 5)
    return reply


def _short(reply: Message) -> Message:
    words = reply.content[wire.WORDS][wire.WORDS].numpy()  # type: ignore[index,union-attr]
    reply.content[wire.WORDS] = ArrayRecord({wire.WORDS: Array(words[:-1].copy())})
    return reply


def _floats(reply: Message) -> Message:
    words = reply.content[wire.WORDS][wire.WORDS].numpy()  # type: ignore[index,union-attr]
    reply.content[wire.WORDS] = ArrayRecord({wire.WORDS: Array(words.astype(np.float32))})
    return reply


def _no_letter(reply: Message) -> Message:
    reply.content[wire.LETTER] = wire.letter_record(b"", b"")
    return reply


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (_flipped_word, "E_AUTH"),
        (_with_metrics, "E_SCHEMA"),
        (_short, "E_SCHEMA"),
        (_floats, "E_DTYPE"),
        (_no_letter, "E_AUTH"),
    ],
)
def test_a_spoiled_answer_is_set_aside_and_the_round_goes_on(
    four: Experiment, spoil: Callable[[Message], Message], code: str
) -> None:
    def answer(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        asked = message.metadata.message_type == "train.masked"
        return spoil(reply) if asked and Address.of(message.content).client == "east" else reply

    folder = play(masked(four, rounds=1), answer)
    rejected = records(folder)[1]["rejected"]
    assert [(r["client"], r["code"]) for r in rejected] == [("east", code)]  # type: ignore


def test_a_masked_answer_holds_words_a_letter_and_an_address_only(four: Experiment) -> None:
    """No metrics, no counts; neither the update nor what the client keeps is in its bytes."""
    secure = masked(four, rounds=1, strategy="fedsa_lora")
    answers: dict[str, RecordDict] = {}

    def watching(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train.masked":
            answers[Address.of(message.content).client] = reply.content
        return reply

    folder = play(secure, watching)
    assert answers.keys() == SIZES.keys()
    for name, content in answers.items():
        assert set(content) == {wire.CONFIG, wire.LETTER, wire.WORDS}
        assert set(content[wire.CONFIG]) == set(vars(Address("", "", 1, "")))
        letter = json.loads(wire.letter_of(content)[0])
        assert set(letter) == {"session", "client", "senders", "broadcast", "words"}
        body = content[wire.WORDS][wire.WORDS].data  # type: ignore[index,union-attr]
        kept = load_file(folder / "clients" / name / "round-000001" / "adapter.safetensors")
        for tensor in kept.values():
            raw = tensor.numpy().tobytes()
            assert not any(
                raw[i : i + 8] in body for i in range(0, len(raw) - 8, 4) if any(raw[i:])
            )


def test_a_client_that_masks_answers_no_plain_question(four: Experiment) -> None:
    secure = masked(four, rounds=1)
    reasons: list[str] = []

    def asking(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train.masked":
            message.metadata.__dict__["_message_type"] = "train"
        try:
            return client_app(message, context)
        except RecipeError as error:
            reasons.append(str(error))
            raise

    with pytest.raises(RunError, match="0 clients are left after leg 'masked'"):
        play(secure, asking)
    assert len(reasons) == 4
    assert all("sends masked updates only" in reason for reason in reasons)


def test_a_leg_cannot_be_asked_twice(four: Experiment) -> None:
    """The second answer would be the same mask on another vector, or other survivors."""
    reasons: list[str] = []

    def twice(message: Message, context: Context) -> Message:
        content = RecordDict(dict(message.content))
        reply = client_app(message, context)
        if message.metadata.message_type.startswith("train."):
            again = Message(content, metadata=message.metadata)  # type: ignore[call-overload]
            try:
                second = client_app(again, context)
                assert wire.letter_of(second.content) == wire.letter_of(reply.content)
                reasons.append("the same")
            except Exception as error:
                reasons.append(str(error))
        return reply

    play(masked(four, rounds=1), twice)
    found = [" ".join(reason.split()[:5]) for reason in reasons]
    assert found[0:4] == ["E_REPLAY: run masked-" + found[0].split("-", 1)[1]] * 4
    for leg, kept in ((1, "Dealt"), (2, "Waiting"), (3, "Committed")):
        assert all(f"{kept} is kept" in reason for reason in reasons[4 * leg : 4 * leg + 4])
    assert reasons[16:] == ["the same"] * 4


def test_what_is_kept_between_legs_is_private_and_goes(four: Experiment) -> None:
    """Own secrets are gone once the vector is masked, everything once shares are revealed."""
    secure = masked(four, rounds=1)
    folder = parts.folder_of(secure) / "clients" / "north" / "secure"
    seen: list[str] = []

    def watching(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        stage = folder / "stage"
        if stage.exists() and Address.of(message.content).client == "north":
            assert stage.stat().st_mode & 0o777 == 0o600
            kind, _, body = stage.read_bytes().partition(b"\n")
            seen.append(kind.decode())
            assert (b"mask_secret" in body) == (kind in (b"Keyed", b"Dealt"))
        return reply

    play(secure, watching)
    assert seen == ["Keyed", "Dealt", "Waiting", "Committed"]
    assert {path.name for path in folder.iterdir()} - {".lock"} == {"revealed"}
    assert (folder / "revealed").stat().st_mode & 0o777 == 0o600


def test_a_round_that_was_revealed_is_never_summed_again(four: Experiment) -> None:
    """The coordinator starts over, the clients do not forget."""
    secure = masked(four, rounds=1)
    folder = play(secure)
    for path in ("checkpoint", "secure"):
        for file in sorted((folder / path).rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
    with pytest.raises(RunError, match=r"has revealed the sum of round 1 already.*name=second"):
        play(secure)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "flora"}, "strategy = 'flora', which needs each client's"),
        ({"strategy": "centralized"}, "strategy = 'centralized', which needs each"),
        ({"strategy": "scaffold"}, "Set weighting = 'uniform'"),
        ({"strategy": "ffa_lora", "combine": "median"}, "combine = 'median', which compares"),
        ({"strategy": "hetlora_sum", "adapter.ranks": "1,2"}, "only equal tensors add up"),
        ({"attack": "alie"}, "forges replies from others"),
        (
            {"strategy": "ffa_lora", "weighting": "uniform"}
            | {"privacy.mode": "client", "privacy.noise": 1.0},
            "changes that the coordinator sees one by one",
        ),
        ({"secure_aggregation": "masked(threshold=0.5)"}, "between 2/3 and 1"),
        ({"secure_aggregation": "masked(bound=0.0)"}, "bound above 0"),
        ({"secure_aggregation": "mask"}, "Did you mean 'masked'?"),
    ],
)
def test_what_cannot_be_masked_is_refused(
    four: Experiment, changes: dict[str, str | float], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        parts.resolve(Experiment.from_flat(masked(four).flat() | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cohort": "fixed(size=2)"}, "round 1 would ask 2 clients, and 3 are needed"),
        ({"cohort": "poisson(rate=0.5)", "rounds": 20}, "clients, and 3 are needed"),
        ({"secure_aggregation": "masked(cap=1000000000)"}, "does not fit 32 bits"),
    ],
)
def test_a_cohort_that_hides_nobody_is_refused_before_training(
    four: Experiment, changes: dict[str, str | int], message: str
) -> None:
    secure = masked(four).replace(**changes)
    with pytest.raises(RecipeError, match=message):
        play(secure)
    assert not (parts.folder_of(secure) / "rounds.jsonl").exists()


def test_scaffold_counts_clients_and_not_updates(four: Experiment) -> None:
    """control moves by |S| / N of its mean: half of it where eight are said to be there."""
    plain = four.replace(strategy="scaffold(population=8)", weighting="uniform", rounds=1)
    close(play(plain), play(masked(plain)), 1, 1e-6)


@pytest.mark.parametrize("mode", ["record", "local"])
def test_noise_of_clients_goes_into_the_sum_and_metrics_do_not(four: Experiment, mode: str) -> None:
    """What noise is charged for is still the only thing that leaves; the ledger names who was in
    the sum."""
    secure = masked(
        four,
        rounds=1,
        weighting="uniform",
        secure_aggregation="masked(bound=64.0)",
        privacy__mode=mode,
        privacy__noise=1.0,
    )
    folder = play(secure)
    record = records(folder)[1]
    assert (record["train"], record["tokens"], record["rejected"]) == ({}, [0.0, 0.0], [])
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    (released,) = [line for line in lines if line["kind"] == "release"]
    assert released["clients"] == sorted(SIZES)


@pytest.mark.parametrize("count", [4, 32])
def test_traffic_is_at_most_a_tenth_more_than_floats(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serialised messages of all legs, each way, for the parameters of MiniLM's adapter of rank 8,
    against the floats alone; a plain reply has the headers of its tensors beside them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import masking

    row = masking.measured(count, 300_000, gone=0)
    assert 1 < row["up"] <= 1.10
    assert 1 < row["down"] <= 1.10


def test_the_clients_of_a_simulation_have_identities_where_they_mask(four: Experiment) -> None:
    assert {c.identity for c in clients.simulated(four).values()} == {None}
    secure = clients.simulated(masked(four))
    assert {name: c.identity.client for name, c in secure.items() if c.identity} == {
        name: name for name in SIZES
    }
    assert replace(secure["east"], identity=None).identity is None
