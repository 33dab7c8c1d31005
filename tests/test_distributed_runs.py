"""Whole runs in which each client adds a share of the noise before its change is masked."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import classification_rows, write_jsonl
from flwr.app import Context, Message
from safetensors.torch import load_file
from secure import CONFIG, LAYOUT, RUN, refusal, stream

from clients import client as clients
from clients.app import app as client_app
from clients.budget import Book
from clients.cohort import CohortGrid
from clients.demands import Demands
from fedtune import launch, parts, planning, processes, wire
from fedtune.config import Experiment
from fedtune.errors import BudgetError, RecipeError, RunError
from fedtune.privacy import accounting, certificate, ledger, noise, protocol, spending, verifying
from fedtune.privacy.distributed import Shares, lacking
from fedtune.privacy.identity import simulated
from fedtune.privacy.ledger import KEY, Ledger, LedgerError, Line
from fedtune.privacy.letters import Opening, Session
from fedtune.privacy.mechanism import client as mechanism_of
from fedtune.privacy.secure import Noised
from fedtune.privacy.stages import Rules
from fedtune.wire import Address
from server.app import app as server_app

Answer = Callable[[Message, Context], Message]
SIZES = {"east": 11, "north": 24, "south": 17, "west": 9}
SECRET = bytes(range(32))
CLIP, NOISE = 4.0, 0.05  # a clip above every change, and noise that leaves a model


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    for split, seed in (("train", 0), ("test", 1)):
        made = [row for name, n in SIZES.items() for row in classification_rows(n, seed, name)]
        write_jsonl(folder / f"{split}.jsonl", made)
    return folder


@pytest.fixture
def plain(tiny: Experiment, rows: Path) -> Experiment:
    source = f"jsonl(train='{rows}/train.jsonl', test='{rows}/test.jsonl')"
    return tiny.replace(
        data__source=source, rounds=2, strategy="ffa_lora", weighting="uniform", name="plain"
    )


@pytest.fixture
def noisy(plain: Experiment) -> Experiment:
    """Four clients of whom one may drop out; two rounds."""
    return plain.replace(
        name="noisy",
        secure_aggregation="masked",
        privacy__mode="client-distributed",
        privacy__noise=NOISE,
        privacy__clip=CLIP,
        privacy__minimum_clients=3,
    )


def prepare(experiment: Experiment) -> None:
    """Give everybody a known secret: with new ones every run would differ."""
    folder = parts.folder_of(experiment)
    for number, home in enumerate([folder, *(folder / "clients" / name for name in SIZES)]):
        home.mkdir(parents=True, exist_ok=True)
        if not (home / KEY).exists():
            (home / KEY).write_bytes(SECRET[:-1] + bytes([number]))
            (home / KEY).chmod(0o600)


def play(experiment: Experiment, client: Answer = client_app) -> Path:
    if experiment.privacy.mode != "none":
        prepare(experiment)
    grid = CohortGrid(client, experiment.flat())
    server_app(grid, grid.server_context({"arms": ""}))
    return parts.folder_of(experiment)


def elsewhere(experiment: Experiment, name: str) -> Experiment:
    """The same run in another folder: the name is part of what noise depends on."""
    return experiment.replace(output=f"{experiment.output}-{name}")


def of(folder: Path, kind: str) -> list[Line]:
    return [line for line in ledger.read(folder) if line["kind"] == kind]


def flat(folder: Path, round: int) -> torch.Tensor:
    found = sorted((folder / "checkpoint" / f"round-{round:06d}").glob("*.safetensors"))
    named = [t for path in found for _, t in sorted(load_file(path).items())]
    return torch.cat([t.double().flatten() for t in named])


def failing(leg: str, *names: str) -> Answer:
    """The ClientApp, where these clients fail at a leg."""

    def answer(message: Message, context: Context) -> Message:
        asked = message.metadata.message_type == f"train.{leg}"
        if asked and Address.of(message.content).client in names:
            raise ValueError("the power is out")
        return client_app(message, context)

    return answer


def without(*names: str) -> Answer:
    """The ClientApp of a run in clear, where these clients' updates are missing."""

    def answer(message: Message, context: Context) -> Message:
        asked = message.metadata.message_type == "train"
        if asked and Address.of(message.content).client in names:
            raise ValueError("the power is out")
        return client_app(message, context)

    return answer


@pytest.mark.parametrize("gone", [(), ("north",)])
def test_the_result_is_the_plain_mean_and_the_noise_that_the_ledger_tells(
    plain: Experiment, noisy: Experiment, gone: tuple[str, ...]
) -> None:
    """Over the expected size: with one of four gone the plain mean of three, times three quarters.

    The noise's deviation is that of those who stayed, within five standard errors.
    """
    clear, hidden = play(plain.replace(rounds=1), without(*gone)), noisy.replace(rounds=1)
    folder = play(hidden, failing("masked", *gone))
    stayed, before = 4 - len(gone), flat(clear, 0)
    expected = (flat(clear, 1) - before) * stayed / 4
    assert float(expected.norm()) < CLIP
    left = flat(folder, 1) - before - expected
    left = left[expected != 0]  # frozen tensors do not move
    (line,) = of(folder, "release")
    sigma = CLIP * NOISE * math.sqrt(stayed / 3)
    assert line["sigma_abs"] == pytest.approx(sigma, rel=1e-6)
    assert line["noise_norm"] == pytest.approx(sigma * math.sqrt(len(left)) / 4)
    assert float((left * 4 / sigma).std()) == pytest.approx(1, rel=5 / math.sqrt(2 * len(left)))
    assert abs(float((left * 4 / sigma).mean())) < 5 / math.sqrt(len(left))
    assert line["clients"] == sorted(set(SIZES) - set(gone))
    assert (line["shares"]["needed"], line["denominator"], line["clip"]) == (3, 4.0, CLIP)


def test_a_round_is_charged_on_the_disk_before_anybody_is_asked(noisy: Experiment) -> None:
    folder, seen = parts.folder_of(noisy), []

    def watching(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        kind = message.metadata.message_type
        if kind.startswith("train"):
            round = Address.of(message.content).round
            seen.append((round, [line["round"] for line in of(folder, "charge")]))
        if kind == "train.masked":
            assert set(reply.content) == {wire.CONFIG, wire.LETTER, wire.WORDS}
        return reply

    play(noisy, watching)
    assert len(seen) == 2 * 5 * 4
    assert all(charged == list(range(1, round + 1)) for round, charged in seen)
    record = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])
    assert (record["train"], record["tokens"], record["rejected"]) == ({}, [0.0, 0.0], [])
    verified = verifying.verify(folder)
    assert {name: a.rounds for name, a in verified.accounts.items()} == dict.fromkeys(SIZES, 2)
    assert all(line["clients"] == sorted(SIZES) for line in of(folder, "charge"))


def test_each_client_keeps_an_account_of_its_own(noisy: Experiment) -> None:
    folder = play(noisy)
    for name in SIZES:
        own = spending.of(ledger.read(folder / "clients" / name))
        assert own.accounts == {name: verifying.verify(folder).accounts[name]}


def test_the_certificate_says_against_whom_and_what_is_left_out(noisy: Experiment) -> None:
    folder = play(noisy)
    made = certificate.of(folder, verifying.verify(folder))
    assert made["mode"] == "client-distributed"
    assert made["neighbouring"] == "zero out one client"
    assert "a coordinator that keeps to the protocol" in made["statement"]
    assert made["eps_final_model_only"] == made["eps_observes_participation"] == made["eps_rdp"]
    assert made["eps_pld"] is made["rho_zcdp"] is None
    assert any("shares of the noise" in item for item in made["not_covered"])
    answers = {row["item"]: row["answer"] for row in made["checklist"]}
    assert answers["Mechanism"].startswith("Skellam")
    assert answers["Trust model"].startswith("distributed")
    assert "integers" in answers["Floating point"]
    assert "none counted" in answers["Sampling"]
    assert {row["client"] for row in made["clients"]} == set(SIZES)
    assert "client-distributed" not in certificate.markdown(made).split("##")[0]


def test_who_is_asked_in_half_of_the_rounds_pays_for_them(noisy: Experiment) -> None:
    """Sampling amplifies nothing, but a round without a client costs it nothing."""
    folder = play(noisy.replace(cohort="fixed(size=3)", rounds=3))
    verified = verifying.verify(folder)
    asked = [line["clients"] for line in of(folder, "charge")]
    rounds = {name: sum(name in names for names in asked) for name in SIZES}
    assert {name: a.rounds for name, a in verified.accounts.items()} == rounds
    assert sum(rounds.values()) == 9
    assert len({a.epsilon for a in verified.accounts.values()}) == len(set(rounds.values())) > 1
    (mechanism,) = {m.noise for m in spending.mechanisms_of(verified.begin).values()}
    assert mechanism == NOISE
    assert {line["denominator"] for line in of(folder, "release")} == {3.0}


def test_below_the_threshold_nothing_is_revealed_and_the_repeat_costs_nothing(
    noisy: Experiment,
) -> None:
    hidden, revealed = noisy.replace(rounds=1), list[str]()
    broken = failing("masked", "north", "south")

    def watching(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train.reveal":
            revealed.append(Address.of(message.content).client)
        return broken(message, context)

    with pytest.raises(RunError, match=r"2 clients are left after leg 'masked'.*3 are needed"):
        play(hidden, watching)
    folder = parts.folder_of(hidden)
    assert not revealed
    assert not of(folder, "release")
    play(hidden)
    verified = verifying.verify(folder)
    assert {account.rounds for account in verified.accounts.values()} == {1}
    assert torch.equal(flat(folder, 1), flat(play(elsewhere(hidden, "whole")), 1))


def test_stopping_anywhere_repeats_the_noise_and_charges_once(noisy: Experiment) -> None:
    whole, messages = play(noisy), 0
    bill = spending.of(ledger.read(whole)).accounts

    def counting(message: Message, context: Context) -> Message:
        nonlocal messages
        messages += 1
        return client_app(message, context)

    play(elsewhere(noisy, "counted"), counting)
    for stop in range(6, messages + 1, 7):
        seen = 0

        def stopping(message: Message, context: Context, stop: int = stop) -> Message:
            nonlocal seen
            seen += 1
            reply = client_app(message, context)
            if seen == stop:
                raise KeyboardInterrupt
            return reply

        again = elsewhere(noisy, f"stopped-{stop}")
        with pytest.raises(KeyboardInterrupt):
            play(again, stopping)
        folder = play(again)
        assert torch.equal(flat(folder, 2), flat(whole, 2)), stop
        assert spending.of(ledger.read(folder)).accounts == bill
        assert verifying.verify(folder).rounds == 2


def test_another_run_of_the_same_recipe_has_other_noise(noisy: Experiment) -> None:
    """Or two sums of the same changes would differ by single clients' changes."""
    first, second = play(noisy.replace(rounds=1)), play(noisy.replace(rounds=1, name="second"))
    apart = (flat(first, 1) - flat(second, 1)) * 4
    apart = apart[apart != 0]
    sigma = CLIP * NOISE * math.sqrt(2 * 4 / 3)
    assert float(apart.std()) == pytest.approx(sigma, rel=5 / math.sqrt(2 * len(apart)))


def test_noise_comes_from_each_clients_own_secret(noisy: Experiment) -> None:
    """One client's other secret changes the sum, and by its own share alone; the seed is public."""
    first, other = noisy.replace(rounds=1), elsewhere(noisy.replace(rounds=1), "other")
    home = parts.folder_of(other) / "clients" / "west"
    home.mkdir(parents=True)
    noise.load_key(home / KEY)
    apart = (flat(play(first), 1) - flat(play(other), 1)) * 4
    apart = apart[apart != 0]
    sigma = CLIP * NOISE * math.sqrt(2 / 3)
    assert float(apart.std()) == pytest.approx(sigma, rel=5 / math.sqrt(2 * len(apart)))


def test_a_round_is_not_noised_under_another_number_than_it_pays_for(noisy: Experiment) -> None:
    """Else a model that is asked about again as round 1 would be paid for once and noised twice."""

    def answer(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train.masked":
            again = replace(Address.of(message.content), round=1)
            message.content[wire.CONFIG] = again.record()
        return client_app(message, context)

    with pytest.raises(RunError, match="the letter is of round 2, its model of 1"):
        play(noisy, answer)
    kept = ledger.read(parts.folder_of(noisy) / "clients" / "east")
    assert [line["round"] for line in kept if line["kind"] == "charge"] == [1]


def test_a_run_stops_before_a_round_over_its_budget(noisy: Experiment) -> None:
    spent = verifying.verify(play(noisy)).accounts["east"].epsilon
    limited = elsewhere(noisy, "limited").replace(rounds=3, privacy__epsilon=spent * 1.01)
    with pytest.raises(BudgetError, match="Round 3 would bring the epsilon of client 'east'"):
        play(limited)
    assert verifying.verify(parts.folder_of(limited)).rounds == 2


def test_a_client_holds_the_coordinator_to_the_budget(noisy: Experiment) -> None:
    """Its own ledger has rounds that the coordinator's does not know."""
    own = mechanism_of(noisy, parts.resolve(noisy).cohort, 4)
    twice = accounting.epsilon([own.event(2)], own.delta)
    limited = noisy.replace(privacy__epsilon=twice * 1.01)
    own = replace(own, budget=limited.privacy.epsilon)
    prepare(limited)
    for name in SIZES:
        home = parts.folder_of(limited) / "clients" / name
        for round in (7, 8):
            address = Address(limited.run_id, "", round, name)
            key = (home / KEY).read_bytes()
            Book(home).charge(limited.run_id, key, own, address, str(round), solved=False)
    with pytest.raises(RunError, match="the epsilon of this client's records"):
        play(limited)


def test_an_epsilon_is_enough_for_all_rounds(noisy: Experiment) -> None:
    calibrated = noisy.replace(privacy__noise=0.0, privacy__epsilon=30.0)
    folder = play(calibrated)
    verified = verifying.verify(folder)
    assert verified.rounds == 2
    assert {29.9 < a.epsilon <= 30.0 for a in verified.accounts.values()} == {True}


def test_a_coordinator_with_less_noise_in_mind_is_refused() -> None:
    """How much noise a client adds follows from its own recipe and roster alone."""
    names = sorted(SIZES)
    identities = simulated(CONFIG, names)
    settings = Noised(noise=1.0, radius=0.5)
    rules = Rules(identities["east"], RUN, 3, CONFIG, settings, "uniform")

    def opening(noise: float, needed: int) -> Opening:
        grid = Noised(noise=noise, radius=0.5).grid(4, "uniform")
        manifest = identities["east"].manifest.digest()
        session = Session(RUN, 1, 1)
        return Opening(session, tuple(names), needed, CONFIG, manifest, grid.digest(), LAYOUT)

    def asked(noise: float, needed: int = 3) -> str:
        letter = opening(noise, needed)
        found = refusal(lambda: protocol.keys(rules, letter, None, None, stream("keys")))
        return str(found)

    assert asked(1.0) == "None"
    assert "another grid of numbers" in asked(0.5)
    assert "another grid of numbers" in asked(2.0)
    assert "a threshold of 2 for 4 clients" in asked(1.0, needed=2)


@pytest.mark.parametrize("part", ["mean", "steps", "needed", "clients"])
def test_a_release_with_less_noise_than_promised_is_found(noisy: Experiment, part: str) -> None:
    folder = play(noisy.replace(rounds=1))
    lines = ledger.read(folder)
    spent = spending.of(lines)
    line = next(line for line in lines if line["kind"] == "release")
    promised = spent.mechanisms["east"]
    assert lacking(line, promised) == ""
    changed = {**line, "shares": dict(line["shares"])}
    if part == "clients":
        changed["clients"] = line["clients"][:2]
    else:
        changed["shares"][part] += {"mean": -1, "steps": line["shares"]["steps"], "needed": 2}[part]
    assert lacking(changed, promised)
    own = Ledger(folder, (folder / KEY).read_bytes())
    told = {key: changed[key] for key in ("round", "clients", "shares", "inputs")}
    own.append("release", outcome="released", **told)
    with pytest.raises(LedgerError, match="ledger tells of"):
        verifying.verify(folder)


def test_an_institution_can_demand_shares_of_noise(noisy: Experiment) -> None:
    """Who is in no roster makes none, so nothing is promised to it."""
    own = mechanism_of(noisy, parts.resolve(noisy).cohort, 4)
    demands = Demands.of({"privacy": "client-distributed", "noise": NOISE, "clip": CLIP})
    demands.require(noisy, own, own_tests=True)
    with pytest.raises(RecipeError, match=r"demands privacy\.mode = 'client-distributed'"):
        demands.require(noisy, None, own_tests=True)
    with pytest.raises(RecipeError, match="demands a noise multiplier"):
        replace(demands, noise=2 * NOISE).require(noisy, own, own_tests=True)


def test_shares_are_those_of_the_cohort() -> None:
    shares = Shares.of(Noised(noise=2.0, radius=1.0), 100)
    assert shares.needed == 67
    assert shares.sigma(67, 1.0) == pytest.approx(2.0)
    assert shares.sigma(100, 1.0) == pytest.approx(2.0 * math.sqrt(100 / 67))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"secure_aggregation": "none"}, "hides nothing before all shares are summed behind masks"),
        ({"secure_aggregation": "masked(clip=1.0)"}, "which already bounds each update"),
        ({"weighting": "examples"}, "Set weighting = 'uniform'"),
        ({"strategy": "flora"}, "more of the clients than the sum"),
        ({"strategy": "scaffold(population=4)"}, "would pass without noise"),
        ({"attack": "alie"}, "made of others'"),
        ({"combine": "median"}, "Set combine = 'mean'"),
        ({"privacy__clip_quantile": 0.5}, "needs privacy.mode = 'client', not"),
        ({"privacy__unit": "client"}, "needs privacy.mode = 'record'"),
        ({"privacy__noise": 0.0}, "needs privacy.epsilon"),
    ],
)
def test_what_has_no_guarantee_is_refused(
    noisy: Experiment, changes: dict[str, str | float], message: str
) -> None:
    with pytest.raises(RecipeError) as error:
        parts.resolve(noisy.replace(**changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy__minimum_clients": 50}, "mode = 'client-distributed' with 4 clients"),
        ({"privacy__noise": 1e4}, "could wrap around 32 bits"),
        ({"privacy__noise": 1e-7}, "too little to be made of shares"),
        ({"cohort": "fixed(size=2)"}, "round 1 would ask 2 clients"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_training(
    noisy: Experiment, changes: dict[str, float | str], message: str
) -> None:
    refused = noisy.replace(**changes)
    with pytest.raises(RecipeError, match=message):
        play(refused)
    assert not (parts.folder_of(refused) / "rounds.jsonl").exists()


def test_it_is_foretold_with_the_noise_of_all_who_may_stay(noisy: Experiment) -> None:
    foretold = planning.forecast(noisy).privacy
    assert foretold is not None
    assert (foretold.mode, foretold.client) == ("client-distributed", "east")
    sigma = CLIP * NOISE * math.sqrt(4 / 3)
    assert foretold.noise_per_coordinate == pytest.approx(sigma / 4)
    assert [alone == seen for _, alone, seen in foretold.rounds] == [True, True]
    own = mechanism_of(noisy, parts.resolve(noisy).cohort, 4)
    folder = play(noisy)
    assert foretold.rounds[-1][1] == pytest.approx(
        verifying.verify(folder).accounts["east"].epsilon
    )
    assert own.neighbouring == "zero out one"
    assert clients.simulated(noisy)["east"].shares_noise == own


@pytest.mark.skipif(not processes.can_fork(1), reason="workers are forked on Linux only")
def test_any_worker_may_answer_any_leg(noisy: Experiment) -> None:
    launch.run(noisy, workers=3)
    verified = verifying.verify(parts.folder_of(noisy))
    assert verified.rounds == 2
    assert [line["outcome"] for line in verified.lines if line["kind"] == "release"] == [
        "released",
        "released",
    ]
