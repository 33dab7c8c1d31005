"""A ledger that is whole and adds up, but tells of another run than the recipe's."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from test_private_runs import SECRET, central, play
from test_record_runs import keyed

from fedtune import parts
from fedtune.adapter import State
from fedtune.config import Experiment
from fedtune.privacy import ledger, spending, verifying
from fedtune.privacy.ledger import FILE, HEAD, Ledger, LedgerError, Line
from fedtune.strategies.strategy import Update
from server import private
from server.roster import Member, Roster

__all__ = ["central"]  # a fixture
Change = Callable[[list[Line]], list[Line]]
OWN = ("schema", "seq", "prev", "time", "kind", "sig", "public_key")  # written by the ledger


@pytest.fixture
def record(tiny: Experiment) -> Experiment:
    return tiny.replace(
        rounds=2, strategy="ffa_lora", privacy__mode="record", privacy__noise=0.5, train__steps=3
    )


@pytest.fixture
def local(central: Experiment) -> Experiment:
    return central.replace(privacy__mode="local", cohort="fixed(size=2)", strategy="fedit")


def rewritten(folder: Path, change: Change) -> None:
    """Write the ledger again with its own secret, every cost being that of the changed events.

    Whoever runs the coordinator can do so: chain, signatures and sums are as they must be.
    """
    lines = change(ledger.read(folder))
    (folder / FILE).unlink()
    (folder / HEAD).unlink()
    again, spent = Ledger(folder, SECRET), spending.Spending()
    for line in lines:
        with suppress(KeyError):  # a client that is none
            spent.take(line)
        fields = {key: value for key, value in line.items() if key not in OWN}
        if line["kind"] == "charge" and line["worst"] in spent.accounts:
            own = spent.mechanisms[line["worst"]]
            fields |= {
                "mechanism": asdict(own) if line["mechanism"] else {},
                "sigma_abs": own.sigma if line["sigma_abs"] else 0.0,
                "cost": spending.told(spent.accounts[line["worst"]].cost),
            }
        again.append(line["kind"], **fields)


def begun(**changes: Any) -> Change:
    """Other mechanisms from the beginning, for everybody."""

    def change(lines: list[Line]) -> list[Line]:
        for line in lines:
            if line["kind"] == "begin":
                for own in line["mechanisms"].values():
                    own |= changes
        return lines

    return change


def of_kind(kind: str, which: int = 0, **changes: Any) -> Change:
    """Another line of a kind."""

    def change(lines: list[Line]) -> list[Line]:
        found = [line for line in lines if line["kind"] == kind]
        found[which] |= changes
        return lines

    return change


def without(kind: str, which: int = 0) -> Change:
    def change(lines: list[Line]) -> list[Line]:
        gone = [line for line in lines if line["kind"] == kind][which]
        return [line for line in lines if line is not gone]

    return change


def again(kind: str, which: int = 0, **changes: Any) -> Change:
    """A line of a kind a second time, changed, after the first."""

    def change(lines: list[Line]) -> list[Line]:
        first = [line for line in lines if line["kind"] == kind][which]
        place = next(number for number, line in enumerate(lines) if line is first) + 1
        return [*lines[:place], {**first, **changes}, *lines[place:]]

    return change


@pytest.fixture(params=["central", "record", "local"])
def run(request: pytest.FixtureRequest) -> Path:
    folder = play(request.getfixturevalue(request.param))
    before = verifying.verify(folder)
    rewritten(folder, lambda lines: lines)
    assert verifying.verify(folder).accounts == before.accounts
    return folder


MECHANISMS: list[tuple[dict[str, Any], str]] = [
    ({"noise": 5.0}, "says noise = 5.0"),
    ({"rate": 0.01}, "says rate = 0.01"),
    ({"steps": 0}, "says steps = 0"),
    ({"clip": 2.0}, "says clip = 2.0"),
    ({"sensitivity": 0.1}, "says sensitivity = 0.1"),
    ({"sampling": "none"}, "says sampling = none"),
    ({"delta": 0.01}, "says delta = 0.01"),
    ({"budget": 100.0}, "says budget = 100.0"),
    ({"rounds": 9}, "says rounds = 9"),
    ({"unit": "patient"}, "says unit = patient"),
    ({"adversary": "nobody"}, "says adversary = nobody"),
    ({"denominator": 99.0}, "says denominator = 99.0"),
    ({"mode": "other"}, "says mode = other"),
]

LINES: list[tuple[Change, str]] = [
    (without("charge"), "releases what no charge of round 1 has paid"),
    (without("charge", 1), "releases what no charge of round 2 has paid"),
    (of_kind("charge", 1, round=1), "releases what no charge of round 2 has paid"),
    (of_kind("charge", round=3), "charges round 3 of a run of 2"),
    (of_kind("charge", clients=["eve"]), "charges ['eve'], who is not in the run"),
    (of_kind("charge", clients=[]), "charges nobody"),
    (of_kind("charge", mechanism={}), "has another mechanism or noise than its clients"),
    (of_kind("charge", sigma_abs=0.0), "has another mechanism or noise than its clients"),
    (of_kind("begin", run="another"), "begins another run or mode"),
    (of_kind("begin", mode="none"), "begins another run or mode"),
    (of_kind("begin", recipe={}), "begins another recipe"),
    (again("release", inputs="others"), "releases what no charge of round 1 has paid"),
    (of_kind("release", 1, round=1, inputs="x"), "releases what no charge of round 1 has paid"),
]


def refusal(folder: Path) -> str:
    with pytest.raises(LedgerError) as error:
        verifying.verify(folder)
    return str(error.value)


def test_every_kind_of_lie_is_found(run: Path) -> None:
    """One at a time, in each mode; what the accountant can price is priced as it would be."""
    kept = {name: (run / name).read_bytes() for name in (FILE, HEAD)}
    checked = 0
    for lie, message in [*((begun(**c), m) for c, m in MECHANISMS), *LINES]:
        rewritten(run, lie)
        assert message in refusal(run)
        checked += 1
        for name, data in kept.items():
            (run / name).write_bytes(data)
    assert checked == 26
    verifying.verify(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma_abs": 0.01}, "releases with sigma_abs = 0.01"),
        ({"clip": 1.0}, "releases with clip = 1.0"),
        ({"denominator": 2.0}, "releases with denominator = 2.0"),
        ({"grid": 1.0}, "releases with grid = 1.0"),
    ],
)
def test_a_release_with_other_parameters_than_were_charged_is_found(
    central: Experiment, changes: dict[str, Any], message: str
) -> None:
    folder = play(central)
    rewritten(folder, of_kind("release", 1, **changes))
    assert message in refusal(folder)


def test_a_moving_clip_moves_the_noise_with_it(central: Experiment) -> None:
    folder = play(central.replace(privacy__clip_quantile=0.5))
    verifying.verify(folder)
    rewritten(folder, of_kind("release", 1, clip=0.1))
    assert "releases with sigma_abs" in refusal(folder)


def test_a_noise_found_from_a_budget_may_differ_in_its_last_digits_only(
    record: Experiment,
) -> None:
    folder = play(record.replace(privacy__noise=0.0, privacy__epsilon=8.0))
    verifying.verify(folder)
    found = {
        name: own.noise for name, own in spending.mechanisms_of(ledger.read(folder)[0]).items()
    }

    def scaled(factor: float) -> Change:
        def change(lines: list[Line]) -> list[Line]:
            for name, noise in found.items():
                lines[0]["mechanisms"][name]["noise"] = noise * factor
            return lines

        return change

    rewritten(folder, scaled(1.0001))
    verifying.verify(folder)
    rewritten(folder, scaled(1.01))
    assert "says noise = " in refusal(folder)


def test_the_population_is_that_of_the_roster(run: Path) -> None:
    path = run / "roster.json"
    told = json.loads(path.read_text())
    del told["clients"][0]
    path.write_text(json.dumps(told))
    assert "but roster.json about" in refusal(run)
    path.write_text("{}")
    assert "does not tell whose privacy" in refusal(run)


def test_the_records_of_a_client_are_those_of_the_roster(record: Experiment) -> None:
    folder = play(record)
    path = folder / "roster.json"
    told = json.loads(path.read_text())
    told["clients"][0]["units"] *= 10
    path.write_text(json.dumps(told))
    assert "but roster.json about {'north': 240" in refusal(folder)


def roster(sizes: dict[str, int]) -> Roster:
    return Roster({n: Member(n, 1, size, 1, None, (), size) for n, size in sizes.items()})


def test_a_population_that_changed_is_derived_each_time(tiny: Experiment, tmp_path: Path) -> None:
    """A client that lost records and has them again: a round between is not paid for a later one,
    and every line is compared with the mechanisms of its own time."""
    recipe = tiny.replace(privacy__mode="record", privacy__noise=1.0, rounds=4, train__batch_size=8)
    resolved = parts.resolve(recipe)
    state: State = {"adapter": {"b": torch.zeros(1)}}
    (tmp_path / "experiment.toml").write_text(recipe.text())

    keyed(tmp_path)

    def charged(size: int) -> None:
        now = roster({"north": size})
        (tmp_path / "roster.json").write_text(json.dumps(now.to_json()))
        guard = private.Charging(recipe, resolved, recipe.run_id, now, tmp_path)
        guard.charge(state, ["north"], 1)
        guard.charge(state, ["north"], 1)
        guard.release(state, [Update("north", 1.0, state)], state, 1)

    for count, size in enumerate((80, 40, 80), start=1):
        charged(size)
        assert len([x for x in ledger.read(tmp_path) if x["kind"] == "charge"]) == count
        assert verifying.verify(tmp_path).accounts["north"].rounds == count
    begins = [line for line in ledger.read(tmp_path) if line["kind"] == "begin"]
    assert [line["mechanisms"]["north"]["units"] for line in begins] == [80, 40, 80]
    rewritten(tmp_path, without("charge", 2))  # what was paid before the records changed
    assert "releases what no charge of round 1 has paid" in refusal(tmp_path)


def test_a_resumed_run_tells_who_is_here_now(record: Experiment) -> None:
    folder = play(record)
    (folder / "roster.json").unlink()
    shutil.rmtree(folder / "checkpoint" / "round-000002")
    (folder / "checkpoint" / "HEAD").write_text("1")
    play(record)
    verifying.verify(folder)


def test_a_ledger_that_is_cut_together_with_its_rounds_is_found(run: Path) -> None:
    rewritten(run, lambda lines: [line for line in lines if line.get("round") != 2])
    rounds = (run / "rounds.jsonl").read_text().splitlines(keepends=True)
    (run / "rounds.jsonl").write_text("".join(rounds[:-1]))
    assert "does not tell of round 2" in refusal(run)
    (run / "rounds.jsonl").unlink()
    assert "does not tell of round 1" in refusal(run)


def test_a_release_that_hides_whom_it_joined_is_found(record: Experiment) -> None:
    folder = play(record)
    rewritten(folder, of_kind("release", 1, clients=[]))
    assert "of whom its ledger releases nothing" in refusal(folder)


def test_a_charge_that_hides_who_is_worse_off_is_found(record: Experiment) -> None:
    folder = play(record)
    accounts = verifying.verify(folder).accounts
    least = min(accounts, key=lambda name: accounts[name].epsilon)
    own = spending.ever(ledger.read(folder))[least]
    told = {"worst": least, "mechanism": asdict(own), "sigma_abs": own.sigma}
    assert accounts[least].epsilon < max(account.epsilon for account in accounts.values())
    rewritten(folder, of_kind("charge", -1, **told))
    assert "hides who is worse off" in refusal(folder)
