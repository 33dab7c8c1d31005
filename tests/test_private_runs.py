"""Whole private runs: what is charged and when, what is repeated, where they stop."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message

from clients.app import app as client_app
from clients.cohort import CohortGrid
from fedtune import cli, page, parts, report, wire
from fedtune.adapter import State
from fedtune.config import Experiment
from fedtune.errors import BudgetError, RecipeError
from fedtune.privacy import certificate, ledger, noise, spending, verifying
from fedtune.privacy.ledger import FILE, KEY, LedgerError, Line
from server import private
from server.app import app as server_app
from server.checkpoint import latest
from server.roster import Member, Roster

SECRET = bytes(range(32))
Answer = Callable[[Message, Context], Message]


def play(experiment: Experiment, client: Answer = client_app) -> Path:
    """Run it with a known secret: with a new one every run would differ."""
    folder = parts.folder_of(experiment)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / KEY).exists():
        (folder / KEY).write_bytes(SECRET)
        (folder / KEY).chmod(0o600)
    grid = CohortGrid(client, experiment.flat())
    server_app(grid, grid.server_context({"arms": ""}))
    return folder


def elsewhere(experiment: Experiment, name: str) -> Experiment:
    """The same run in another folder: the name is part of what noise depends on."""
    return experiment.replace(output=f"{experiment.output}-{name}")


@pytest.fixture
def central(tiny: Experiment) -> Experiment:
    return tiny.replace(
        rounds=2,
        strategy="ffa_lora",
        cohort="poisson(rate=0.8)",
        weighting="uniform",
        privacy__mode="client",
        privacy__noise=0.5,
        privacy__clip=0.5,
        privacy__minimum_clients=2,
    )


def final(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def of(folder: Path, kind: str) -> list[Line]:
    return [line for line in ledger.read(folder) if line["kind"] == kind]


def test_a_round_is_charged_on_the_disk_before_anybody_is_asked(central: Experiment) -> None:
    folder = parts.folder_of(central)
    seen = []

    def watching(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            round = message.content["config"]["round"]
            seen.append((round, [line["round"] for line in of(folder, "charge")]))
            # What a client tells beside its clipped change would be a release that nobody pays.
            assert dict(reply.content["metrics"]) == {"num-examples": 1}
        return reply

    play(central, watching)
    assert seen
    assert all(charged == list(range(1, round + 1)) for round, charged in seen)
    verified = verifying.verify(folder)
    assert verified.rounds == 2
    assert verified.accounts[""].rounds == 2
    assert [line["outcome"] for line in of(folder, "release")] == ["released", "released"]
    record = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])
    assert all(sums == {} for sums in record["train"].values())
    assert record["aggregation"] == {}


def test_stopping_anywhere_repeats_the_noise_and_charges_once(central: Experiment) -> None:
    """F23, F29, F30: a process that ends at any message goes on with the same bytes and bill."""
    whole = play(central)
    bill = spending.of(ledger.read(whole)).accounts
    messages = 0

    def counting(message: Message, context: Context) -> Message:
        nonlocal messages
        messages += 1
        return client_app(message, context)

    play(elsewhere(central, "counted"), counting)
    for stop in range(4, messages + 1, 3):
        seen = 0

        def stopping(message: Message, context: Context, stop: int = stop) -> Message:
            nonlocal seen
            seen += 1
            if seen == stop:
                raise KeyboardInterrupt
            return client_app(message, context)

        again = elsewhere(central, f"stopped-{stop}")
        with pytest.raises(KeyboardInterrupt):
            play(again, stopping)
        folder = play(again)
        assert final(folder) == final(whole)
        assert spending.of(ledger.read(folder)).accounts == bill
        assert verifying.verify(folder).rounds == 2


def evaluating(message: Message, context: Context) -> Message:
    """A process that ends after the first noisy sum was written down and before its commit."""
    kind = message.metadata.message_type
    if kind == "evaluate" and message.content["config"]["round"] == 1:
        raise KeyboardInterrupt
    return client_app(message, context)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_any_message_neither_loses_nor_doubles_a_charge(central: Experiment) -> None:
    """F31, F32: a child process is killed at every second message; the next one goes on."""
    whole = play(central)
    bill = spending.of(ledger.read(whole)).accounts
    again = elsewhere(central, "killed")
    kills = 0
    for stop in range(3, 40, 2):
        seen = 0

        def dying(message: Message, context: Context, stop: int = stop) -> Message:
            nonlocal seen
            seen += 1
            if seen == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            return client_app(message, context)

        child = os.fork()
        if not child:
            code = 1
            try:
                play(again, dying)
                code = 0
            finally:
                os._exit(code)  # pytest goes on in the parent alone
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
    folder = parts.folder_of(again)
    assert kills > 2
    assert final(folder) == final(whole)
    assert spending.of(ledger.read(folder)).accounts == bill
    assert verifying.verify(folder).rounds == 2


def test_a_round_repeated_with_other_replies_is_charged_again(central: Experiment) -> None:
    """F29: two noisy sums of different inputs are two releases."""
    everybody = central.replace(cohort="all", rounds=1)
    with pytest.raises(KeyboardInterrupt):
        play(everybody, evaluating)
    folder = parts.folder_of(everybody)
    assert len(of(folder, "charge")) == len(of(folder, "release")) == 1
    shutil.copytree(folder, f"{folder}-same")

    def failing(message: Message, context: Context) -> Message:
        address = message.content["config"]
        if message.metadata.message_type == "train" and address["client"] == "south":
            raise RuntimeError("the GPU fell out")
        return client_app(message, context)

    play(everybody, failing)
    assert [line["why"] for line in of(folder, "charge")] == ["round", "other inputs"]
    assert [line["outcome"] for line in of(folder, "release")] == ["released", "released"]
    assert verifying.verify(folder).accounts[""].rounds == 2

    shutil.rmtree(folder)
    shutil.move(f"{folder}-same", folder)
    play(everybody)
    assert [line["outcome"] for line in of(folder, "release")] == ["released", "replayed"]
    assert verifying.verify(folder).accounts[""].rounds == 1


def test_a_run_stops_before_a_round_over_its_budget(central: Experiment) -> None:
    """F23: with exit code 3, nothing sent, and the model of the last round kept."""
    twice = play(central)
    spent = verifying.verify(twice).accounts[""].epsilon
    limited = elsewhere(central, "limited").replace(
        rounds=3, train__schedule="constant", privacy__epsilon=spent * 1.01
    )
    asked: list[int] = []

    def watching(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            asked.append(int(message.content["config"]["round"]))
        return client_app(message, context)

    for _ in range(2):
        with pytest.raises(BudgetError, match="Round 3 would bring the epsilon to") as error:
            play(limited, watching)
        assert error.value.exit_code == 3
    folder = parts.folder_of(limited)
    assert set(asked) == {1, 2}
    kept = latest(folder / "checkpoint", limited)
    assert kept is not None
    assert kept.round == 2
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert len(of(folder, "stop")) == 1
    verified = verifying.verify(folder)
    assert verified.accounts[""].epsilon == pytest.approx(spent)


def test_an_epsilon_is_enough_for_all_rounds(
    central: Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    """And that noise drowns what three clients say is told at once."""
    calibrated = central.replace(privacy__noise=0.0, privacy__epsilon=20.0, rounds=3)
    folder = play(calibrated)
    assert [r.message for r in caplog.records if "the model may learn nothing" in r.message]
    verified = verifying.verify(folder)
    assert verified.rounds == 3
    assert 19.8 < verified.accounts[""].epsilon <= 20.0


def test_an_empty_cohort_releases_noise(central: Experiment) -> None:
    """F26: a round without anybody moves the model, or it would tell that nobody was there."""
    folder = play(central.replace(cohort="poisson(rate=1e-9)", privacy__clip=1e-9))
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [record["cohort"] for record in records] == [[], [], []]
    assert all(record["update_norm"] > 0 for record in records[1:])
    assert len(of(folder, "charge")) == len(of(folder, "release")) == 2


def test_who_takes_part_follows_from_the_secret_and_not_from_the_seed(
    central: Experiment,
) -> None:
    def cohorts(folder: Path) -> list[list[str]]:
        lines = (folder / "rounds.jsonl").read_text().splitlines()
        return [json.loads(line)["cohort"] for line in lines]

    recipe = central.replace(cohort="poisson(rate=0.5)", rounds=6, privacy__clip=1e-6)
    first = cohorts(play(recipe))
    other = elsewhere(recipe, "other")
    parts.folder_of(other).mkdir(parents=True)
    noise.load_key(parts.folder_of(other) / KEY)
    assert cohorts(play(elsewhere(recipe, "same"))) == first
    assert cohorts(play(other)) != first


def test_a_moving_clip_is_kept_and_the_run_resumes(central: Experiment) -> None:
    moving = central.replace(privacy__clip_quantile=0.5, privacy__noise=0.1, cohort="all")
    whole = play(moving)
    clips = [line["clip"] for line in of(whole, "release")]
    assert clips[0] == 0.5
    assert clips[1] != 0.5
    again = elsewhere(moving, "again")
    with pytest.raises(KeyboardInterrupt):
        play(again, evaluating)
    assert final(play(again)) == final(whole)


def test_a_client_that_does_not_clip_is_set_aside(central: Experiment) -> None:
    def loud(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            state = wire.unpack(reply.content)
            louder = {g: {n: t * 100 + 1 for n, t in ts.items()} for g, ts in state.items()}
            for group, record in wire.pack(louder).items():
                reply.content[group] = record
        return reply

    with pytest.raises(Exception, match="its change is larger than the clip"):
        play(central.replace(cohort="all"), loud)


def test_local_noise_is_charged_to_each_client(central: Experiment) -> None:
    local = central.replace(privacy__mode="local", cohort="fixed(size=2)", strategy="fedit")
    folder = play(local)
    verified = verifying.verify(folder)
    assert sum(account.rounds for account in verified.accounts.values()) == 4
    keys = sorted((folder / "clients").rglob(KEY))
    assert len({key.read_bytes() for key in keys}) == len(keys) == len(verified.accounts)
    made = certificate.of(folder, verified)
    assert made["neighbouring"] == "replace one client"
    assert {row["client"] for row in made["clients"]} == {"north", "south", "west"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weighting": "examples"}, "Set weighting = 'uniform'"),
        ({"combine": "multi_krum(chosen=3)", "cohort": "all"}, "Set combine = 'mean'"),
        ({"strategy": "flora"}, "more of the clients than the sum"),
        ({"strategy": "flexlora"}, "more of the clients than the sum"),
        ({"strategy": "scaffold(population=3)"}, "would pass without noise"),
        ({"strategy": "local_only"}, "which joins nothing"),
        ({"privacy__unit": "client"}, "needs privacy.mode = 'record'"),
        ({"privacy__mode": "local", "privacy__clip_quantile": 0.5}, "mode = 'client', not 'local'"),
        ({"privacy__noise": 0.0}, "needs privacy.epsilon"),
        ({"privacy__noise": -1.0}, "privacy.noise = -1.0 must be"),
        ({"privacy__epsilon": -1.0}, "privacy.epsilon = -1.0 must be"),
        ({"privacy__delta": 1.0}, "privacy.delta = 1.0 must be"),
    ],
)  # fmt: skip
def test_what_has_no_guarantee_is_refused(
    central: Experiment, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError) as error:
        parts.resolve(central.replace(**changes))  # type: ignore[arg-type]
    assert message in str(error.value)


def test_too_few_clients_and_too_large_a_delta_are_refused(central: Experiment) -> None:
    with pytest.raises(RecipeError, match=r"with 3 clients, where privacy.minimum_clients = 50"):
        play(central.replace(privacy__minimum_clients=50))
    with pytest.raises(RecipeError, match=r"privacy.delta = 0.5 must be below 1 / 3"):
        play(central.replace(privacy__delta=0.5))


def test_a_run_with_an_altered_ledger_does_not_go_on(central: Experiment) -> None:
    """F24."""
    with pytest.raises(KeyboardInterrupt):
        play(central, evaluating)
    folder = parts.folder_of(central)
    path = folder / FILE
    whole = path.read_text()
    path.write_text(whole.replace('"why":"round"', '"why":"Round"'))
    with pytest.raises(LedgerError, match="not what was written"):
        play(central)
    path.write_text(whole)
    play(central)
    cut = path.read_bytes().splitlines(keepends=True)[:-2]
    path.write_bytes(b"".join(cut))
    last = f"{len(cut) - 1} {ledger._hash(cut[-1][:-1])}\n"
    (folder / ledger.HEAD).write_text(last)
    with pytest.raises(LedgerError, match=r"Round 2 of .* was committed, but its ledger"):
        verifying.verify(folder)
    path.unlink()
    with pytest.raises(LedgerError, match="its ledger is gone"):
        verifying.verify(folder)


def roster(sizes: dict[str, int]) -> Roster:
    members = {n: Member(n, 1, size, 1, None, (), size) for n, size in sizes.items()}
    return Roster(members)


def test_record_level_charges_each_client_for_its_own_records(
    tiny: Experiment, tmp_path: Path
) -> None:
    """The worst off is the headline; who is asked again for the same state costs nothing."""
    recipe = tiny.replace(privacy__mode="record", privacy__noise=1.0, rounds=4, train__batch_size=8)
    resolved = parts.resolve(recipe)
    sizes = {"large": 800, "small": 80}

    def opened(of: dict[str, int] = sizes) -> private.Charging:
        return private.Charging(recipe, resolved, recipe.run_id, roster(of), tmp_path)

    state: State = {"adapter": {"b": torch.zeros(1)}}
    guard = opened()
    guard.charge(state, ["large"], 1)
    guard.charge(state, ["large", "small"], 1)
    opened().charge(state, ["large", "small"], 1)
    accounts = spending.of(ledger.read(tmp_path)).accounts
    assert {name: account.rounds for name, account in accounts.items()} == {"large": 1, "small": 1}
    assert spending.worst(accounts) == "small"
    assert of(tmp_path, "charge")[-1]["worst"] == "small"
    # The same round from another state: its batches and noise are others.
    opened().charge({"adapter": {"b": torch.ones(1)}}, ["small"], 1)
    assert spending.of(ledger.read(tmp_path)).accounts["small"].rounds == 2
    # A client that lost records has another rate from then on.
    opened({"large": 800, "small": 40}).charge(state, ["small"], 2)
    assert len(spending.of(ledger.read(tmp_path)).accounts["small"].events) == 2
    assert len(of(tmp_path, "begin")) == 2


def test_the_certificate_is_in_the_report_and_on_the_command_line(
    central: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = play(central)
    for command, expected in (
        ("verify", "The ledger holds: 5 lines"),
        ("report", "NIST SP 800-226"),
    ):
        code = cli.guarded(
            lambda command=command: cli.app(
                ["privacy", command, str(folder)], standalone_mode=False
            ),
            debug=True,
        )
        assert code == 0
        assert expected in capsys.readouterr().out
    made = json.loads((folder / "privacy.json").read_text())
    assert made["unit"] == "client"
    assert made["eps_rdp"] > made["eps_pld"] > 0
    assert made["eps_observes_participation"] > made["eps_final_model_only"]
    assert any("hyper-parameters" in item for item in made["not_covered"])
    assert "differentially private" in (folder / "privacy.md").read_text()
    page.write(report.read(folder), folder / "report.html")
    html = (folder / "report.html").read_text()
    assert made["statement"].split(" under ")[0] in html
    data = bytearray((folder / FILE).read_bytes())
    data[100] ^= 1
    (folder / FILE).write_bytes(data)
    page.write(report.read(folder), folder / "report.html")
    assert "No promise can be shown" in (folder / "report.html").read_text()
    with pytest.raises(LedgerError):
        cli.guarded(
            lambda: cli.app(["privacy", "verify", str(folder)], standalone_mode=False), debug=True
        )


def test_a_run_that_promises_nothing_has_nothing_to_verify(tiny: Experiment) -> None:
    grid = CohortGrid(client_app, tiny.replace(rounds=1).flat())
    server_app(grid, grid.server_context({"arms": ""}))
    with pytest.raises(RecipeError, match=r"its privacy.mode is 'none'"):
        verifying.verify(parts.folder_of(tiny))
    with pytest.raises(RecipeError, match="holds no run"):
        verifying.verify(parts.folder_of(tiny) / "nothing")
