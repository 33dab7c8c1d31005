"""What an institution demands of a recipe, and its one account of all runs."""

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from scipy.optimize import brentq
from scipy.stats import norm

from clients import budget
from clients.app import app
from clients.budget import Book
from clients.client import Client, institution, simulated
from clients.local import NODE, LocalGrid, answered, identified, identify
from clients.policy import Policy
from fedtune import cli, models, parts, wire
from fedtune.adapter import State
from fedtune.config import CoordinatorSettings, Experiment
from fedtune.errors import BudgetError, RecipeError
from fedtune.privacy import ledger, mechanism, spending, verifying
from fedtune.privacy.ledger import LedgerError
from fedtune.privacy.mechanism import Mechanism
from fedtune.wire import Address
from server import roster
from server.app import app as server_app

Node = dict[str, bool | int | float | str]
SECRET = bytes(range(32))
NAMED: Node = {"client": "north", "shard": "north.jsonl"}


@pytest.fixture
def north(tiny: Experiment, three_clients: Path, tmp_path: Path) -> tuple[Experiment, Node]:
    """A recipe with noisy steps, and an institution of 50 rows with test rows of its own."""
    recipe = tiny.replace(
        task="classification(classes='cancel,hours,status')",
        strategy="ffa_lora",
        data__test_fraction=0.0,
        rounds=2,
        train__steps=1,
        train__batch_size=25,
        privacy__mode="record",
        privacy__noise=4.0,
        coordinator__wait_seconds=0.0,
    )
    node: Node = {
        "client": "north",
        "shard": str(three_clients / "train.jsonl"),
        "test": str(three_clients / "test.jsonl"),
        "state": str(tmp_path / "kept"),
    }
    return recipe, node


def told(recipe: Experiment, node: Node, content: RecordDict, kind: str) -> Message:
    """The reply of a node with this node-config."""
    identify()
    context = Context(1, 7, dict(node), RecordDict(), dict(recipe.flat()))
    return app(identified(Message(content, 7, kind)), context)


def asked(recipe: Experiment, node: Node) -> dict[str, Any]:
    """What it tells of itself."""
    question = RecordDict({wire.CONFIG: ConfigRecord({"arm": ""})})
    reply = told(recipe, node, question, "query.describe")
    (about,) = json.loads(str(reply.content[wire.CONFIG]["clients"]))
    return dict(about)


def client_of(recipe: Experiment, node: Node) -> Client:
    return institution(recipe, recipe.run_id, tuple(sorted(node.items())))


def turn(recipe: Experiment, node: Node, round: int, run: str = "", shift: float = 0.0) -> Message:
    """A round's training message, answered."""
    client = client_of(recipe, node)
    state = models.initial(client.model, recipe.seed)
    moved = {**state, "head": {name: t + shift for name, t in state["head"].items()}}
    address = Address(run or recipe.run_id, "", round, client.shard.name)
    content = RecordDict({wire.CONFIG: address.record(), **wire.pack(moved)})
    return told(recipe, node, content, "train")


def charges(folder: Path) -> list[tuple[str, int]]:
    """(run, round) of every charge."""
    found, run = [], ""
    for line in ledger.read(folder):
        run = line.get("run", run)
        found += [(run, line["round"])] if line["kind"] == "charge" else []
    return found


# --- demands ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("demand", "message"),
    [
        ({"privacy": "none"}, "'none' is none of 'record', 'local', 'client-distributed'"),
        ({"privacy": "recrod"}, "Did you mean 'record'"),
        ({"privacy": "record,"}, "privacy = '' is none of"),
        ({"privacy": "client"}, "its noise is the coordinator's, which no client can check"),
        ({"privacy": "masked"}, "Masked sums are demanded by naming identity and roster"),
        ({"privacy": True}, "must be of type str"),
        ({"epsilon": 1.0}, "node-config epsilon bounds what a promise costs, but nothing demands"),
        ({"ledger": "/accounts"}, "node-config ledger bounds"),
        ({"privacy": "record", "epsilon": "1.0"}, "epsilon = '1.0' must be of type float"),
        ({"privacy": "record", "epsilon": True}, "epsilon = True must be of type float"),
        ({"privacy": "record", "epsilon": 0.0}, "epsilon = 0.0 must be above 0; leave the key out"),
        ({"privacy": "record", "epsilon": math.inf}, "epsilon = inf must be above 0"),
        ({"privacy": "record", "epsilon": math.nan}, "epsilon = nan must be above 0"),
        ({"privacy": "record", "delta": 1}, "delta = 1 must be above 0 and below 1"),
        ({"privacy": "record", "noise": -1.0}, "noise = -1.0 must be above 0"),
        ({"privacy": "record", "clip": 0}, "clip = 0 must be above 0"),
        ({"privacy": "record", "unit": ""}, "node-config unit is empty"),
        ({"privacy": "record", "ledger": ""}, "node-config ledger is empty"),
        ({"privacy": "record", "epsilom": 1.0}, "Did you mean 'epsilon'"),
    ],
)
def test_a_mistyped_demand_is_refused(demand: Node, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        Policy.of({**NAMED, **demand})
    assert message in str(error.value)


def test_missing_keys_demand_nothing_and_whole_numbers_are_numbers() -> None:
    assert Policy.of(NAMED).demands.modes == ()
    got = Policy.of({**NAMED, "privacy": "record, local", "epsilon": 8, "unit": "patient"}).demands
    assert (got.modes, got.epsilon, got.unit) == (("record", "local"), 8, "patient")
    assert (got.delta, got.noise, got.clip) == (0.0, 0.0, 0.0)


REFUSED: list[tuple[Node, dict[str, Any], str]] = [
    ({}, {"privacy__mode": "none"}, "demands privacy.mode = 'record'; the recipe has 'none'"),
    (
        {},
        {"privacy__mode": "client", "weighting": "uniform"},
        "demands privacy.mode = 'record'; the recipe has 'client'",
    ),
    (
        {},
        {"privacy__mode": "local", "weighting": "uniform"},
        "demands privacy.mode = 'record'; the recipe has 'local'",
    ),
    (
        {"privacy": "record,local"},
        {"privacy__mode": "none"},
        "demands privacy.mode = 'record' or 'local'",
    ),
    ({"unit": "label"}, {}, "demands privacy.unit = 'label'; the recipe has ''"),
    ({"delta": 1e-6}, {}, "a delta of 1e-06 at most; the recipe's is 1e-05"),
    ({"noise": 5}, {}, "a noise multiplier of 5 at least; the recipe's is 4"),
    (
        {"noise": 1.0},
        {"privacy__noise": 0.0, "privacy__epsilon": 1000.0},
        "Raise privacy.noise, or lower privacy.epsilon",
    ),
    ({"clip": 0.5}, {}, "demands privacy.clip = 0.5 at most; the recipe has 1"),
    ({}, {"data__validation_fraction": 0.5}, "data.validation_fraction = 0.5 would measure"),
    ({"epsilon": 0.5}, {}, "The 2 rounds of this run would bring the epsilon"),
]


@pytest.mark.parametrize(("demand", "changes", "message"), REFUSED)
def test_a_recipe_that_promises_less_is_refused_with_the_reason(
    north: tuple[Experiment, Node], demand: Node, changes: dict[str, Any], message: str
) -> None:
    recipe, node = north
    demanding = {**node, "privacy": "record", **demand}
    with pytest.raises(RecipeError) as error:
        asked(recipe.replace(**changes), demanding)
    assert message in str(error.value)
    assert asked(recipe.replace(**changes), node)["name"] == "north"  # who demands nothing


def test_a_recipe_that_promises_enough_is_accepted(north: tuple[Experiment, Node]) -> None:
    recipe, node = north
    demand: Node = {"privacy": "record", "noise": 4, "clip": 1, "delta": 1e-5, "epsilon": 2}
    assert asked(recipe, {**node, **demand})["units"] == 50
    found = recipe.replace(privacy__noise=0.0, privacy__epsilon=2.0)
    assert asked(found, {**node, "privacy": "record", "epsilon": 2.0})["units"] == 50
    units = recipe.replace(privacy__unit="label", train__batch_size=2, privacy__noise=40.0)
    assert asked(units, {**node, "privacy": "record", "unit": "label"})["units"] == 3


def test_the_recipe_may_not_choose_rows_to_be_measured_without_noise(
    north: tuple[Experiment, Node],
) -> None:
    """Without a file of test rows, data.test_fraction would take them from the protected ones."""
    recipe, node = north
    bare = {key: value for key, value in node.items() if key != "test"}
    held_out = recipe.replace(data__test_fraction=0.5)
    with pytest.raises(RecipeError, match=r"data\.test_fraction = 0\.5 would measure a part"):
        asked(held_out, {**bare, "privacy": "record"})
    assert asked(recipe, {**bare, "privacy": "record"})["test_examples"] == 0
    assert asked(held_out, {**node, "privacy": "record"})["test_examples"] == 24


def test_no_message_of_a_run_that_promises_less_is_answered(
    north: tuple[Experiment, Node],
) -> None:
    """Whoever was not in the roster may be asked all the same."""
    recipe, node = north
    plain = recipe.replace(privacy__mode="none")
    content = RecordDict({wire.CONFIG: Address(plain.run_id, "", 1, "north").record()})
    for kind in ("train", "evaluate", "train.masked", "train.keys"):
        with pytest.raises(RecipeError, match="This institution demands"):
            told(plain, {**node, "privacy": "record"}, content, kind)
    bundled = told(plain, {**node, "privacy": "record"}, wire.bundle([content]), "train.cohort")
    (reply,) = wire.unbundle(bundled.content)
    assert "This institution demands" in str(wire.fault_of(reply))


class Institutions(LocalGrid):
    """Nodes with node-configs of their own."""

    def __init__(self, recipe: Experiment, nodes: Sequence[Node]) -> None:
        super().__init__(recipe.flat(), len(nodes))
        self._contexts = {
            NODE + number: Context(1, NODE + number, dict(node), RecordDict(), dict(recipe.flat()))
            for number, node in enumerate(nodes)
        }

    def answers(self, messages: Sequence[Message]) -> Iterator[Message]:
        for message in messages:
            yield answered(app, message, self._contexts[message.metadata.dst_node_id])


def test_the_reason_is_in_the_roster(north: tuple[Experiment, Node]) -> None:
    recipe, node = north
    weak = recipe.replace(privacy__noise=0.5)
    strict: Node = {**node, "client": "strict", "privacy": "record", "noise": 1}
    settings = CoordinatorSettings(wait_seconds=0.0)
    found = roster.ask(Institutions(weak, [node, strict]), "", settings)
    assert list(found.members) == ["north"]
    (reason,) = found.refusals
    assert "demands a noise multiplier of 1 at least; the recipe's is 0.5" in reason
    with pytest.raises(RecipeError, match="demands a noise multiplier of 1"):
        roster.ask(Institutions(weak, [strict]), "", settings)


# --- the account -----------------------------------------------------------------------------


def test_runs_of_other_names_are_one_account(north: tuple[Experiment, Node]) -> None:
    """Each run has a folder of its own, and used to have a budget of its own with it."""
    recipe, node = north
    bound: Node = {**node, "privacy": "record", "ledger": str(Path(str(node["state"])) / "paid")}
    account = Path(str(bound["ledger"]))
    first, second, third = (recipe.replace(name=name) for name in ("first", "second", "third"))
    for run in (first, second):
        for round in (1, 2):
            turn(run, bound, round)
            turn(run, bound, round)  # the same again repeats its bytes
    wanted = [(run.run_id, round) for run in (first, second) for round in (1, 2)]
    assert charges(account) == wanted
    own = mechanism.record(recipe, 50)
    paid = spending.whole(ledger.read(account))
    assert paid.events == (own.event(4),)
    limited: Node = {**bound, "epsilon": paid.epsilon * 1.001}
    with pytest.raises(RecipeError, match=r"over all runs from .* above this institution's"):
        asked(third, limited)
    with pytest.raises(BudgetError, match=r"over all runs to .* above this institution's"):
        turn(third, limited, 1)
    assert asked(second, limited)["name"] == "north"  # its rounds are in the account already
    turn(second, limited, 2)
    assert charges(account) == wanted
    with pytest.raises(BudgetError):
        turn(second, limited, 2, shift=0.1)


def test_the_account_lies_above_the_runs_where_no_ledger_is_named(
    north: tuple[Experiment, Node],
) -> None:
    recipe, node = north
    turn(recipe, node, 1)
    turn(recipe.replace(seed=1), node, 1)
    assert len(charges(Path(str(node["state"])) / "north" / "account")) == 2


def test_a_coordinator_cannot_rename_the_run_in_its_messages(
    north: tuple[Experiment, Node],
) -> None:
    """The run that a budget is of is the client's own reading of the recipe."""
    recipe, node = north
    bounded = recipe.replace(privacy__noise=0.0, privacy__epsilon=2.0)
    for number in range(bounded.rounds):
        turn(bounded, node, 1, run=f"run-{number}")
    with pytest.raises(BudgetError, match=r"above privacy\.epsilon = 2"):
        turn(bounded, node, 1, run="run-again")


def unsampled(rounds: int = 1, noise: float = 4.0, **changes: Any) -> Mechanism:
    """Gaussian sums that every unit is in: the cost has a closed form."""
    recipe = Experiment().replace(
        rounds=rounds,
        train__batch_size=50,
        train__steps=1,
        privacy__mode="record",
        privacy__noise=noise,
    )
    return replace(mechanism.record(recipe, 50), **changes)


def charge(
    book: Book, run: str, own: Mechanism, inputs: str = "inputs", key: bytes = SECRET
) -> None:
    address = Address(run, "", 1, "north")
    book.charge(run, key, own, address, f"{run} {inputs}", solved=False)


def closed_form(sums: int, noise: float, delta: float) -> float:
    """epsilon of `sums` Gaussian releases: delta = F(mu/2 - e/mu) - exp(e) F(-mu/2 - e/mu)."""
    mu = math.sqrt(sums) / noise

    def excess(epsilon: float) -> float:
        upper = norm.cdf(mu / 2 - epsilon / mu)
        return float(upper - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta)

    return float(brentq(excess, 0.0, 100.0))


@pytest.mark.parametrize("limit", [2.0, 3.0])
def test_runs_are_charged_until_the_composed_cost_reaches_the_limit(
    tmp_path: Path, limit: float
) -> None:
    """Where a closed form says: the account adds up events, neither epsilons nor runs alone."""
    fit = next(n for n in range(1, 99) if closed_form(n + 1, 4.0, 1e-5) > limit)
    book = Book(tmp_path, limit, 1e-5)
    for number in range(fit):
        book.require_room(f"run-{number}", unsampled())
        charge(book, f"run-{number}", unsampled())
    assert 2 < fit < 12
    with pytest.raises(RecipeError, match="over all runs from"):
        book.require_room("one-more", unsampled())
    with pytest.raises(BudgetError, match=f"above this institution's {limit:.4g}"):
        charge(book, "one-more", unsampled())
    assert len(charges(tmp_path)) == fit
    alone = spending.whole(ledger.read(tmp_path), "run-0")
    assert alone.epsilon == pytest.approx(closed_form(1, 4.0, 1e-5), rel=1e-2)
    others = spending.whole(ledger.read(tmp_path), "run-0", others=True)
    assert others.events == (unsampled().event(fit - 1),)


def test_a_refused_round_leaves_no_trace(tmp_path: Path) -> None:
    book = Book(tmp_path, 1.0, 1e-5)
    charge(book, "run", unsampled(noise=8.0))
    before = (tmp_path / ledger.FILE).read_bytes()
    with pytest.raises(BudgetError):
        charge(book, "other", unsampled(noise=0.5))
    assert (tmp_path / ledger.FILE).read_bytes() == before


def test_processes_that_charge_at_once_are_all_entered(tmp_path: Path) -> None:
    """Two SuperNodes, or two runs, of one institution."""
    with ThreadPoolExecutor(8) as pool:
        for done in [
            pool.submit(charge, Book(tmp_path), f"run-{n % 3}", unsampled(), f"inputs {n}")
            for n in range(24)
        ]:
            done.result()
    lines = ledger.read(tmp_path)
    assert len(charges(tmp_path)) == 24
    assert spending.whole(lines).events == (unsampled().event(24),)
    assert spending.whole(lines, "run-1").rounds == 8


def test_what_a_record_and_what_a_patient_pays_is_not_added_up(tmp_path: Path) -> None:
    book = Book(tmp_path, 8.0, 1e-5)
    local = replace(unsampled(), mode="local", unit="client")
    charge(book, "a", unsampled())
    charge(book, "b", local)  # hides all of a client, so a record's account may have it
    patients = unsampled(unit="patient")
    with pytest.raises(RecipeError, match="what one 'patient' and one 'record' pays"):
        charge(book, "c", patients)
    with pytest.raises(RecipeError, match="cannot be added up"):
        book.require_room("c", patients)
    assert spending.whole(ledger.read(tmp_path)).rounds == 2


def test_an_account_that_was_altered_or_lost_its_key_is_not_believed(tmp_path: Path) -> None:
    charge(Book(tmp_path), "a", unsampled())
    whole = (tmp_path / ledger.FILE).read_bytes()
    (tmp_path / ledger.FILE).write_bytes(whole.replace(b'"round":1', b'"round":2'))
    with pytest.raises(LedgerError, match="not what was written"):
        charge(Book(tmp_path), "b", unsampled())
    (tmp_path / ledger.FILE).write_bytes(whole)
    kept = (tmp_path / budget.KEY).read_bytes()
    (tmp_path / budget.KEY).unlink()
    with pytest.raises(LedgerError, match=r"ledger\.key, which signs .* is gone"):
        charge(Book(tmp_path), "b", unsampled())
    assert not (tmp_path / budget.KEY).exists()
    (tmp_path / budget.KEY).write_bytes(kept)
    (tmp_path / budget.KEY).chmod(0o600)
    charge(Book(tmp_path), "b", unsampled())


def test_the_command_line_tells_what_was_paid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, inputs in (("a", "1"), ("a", "2"), ("b", "1")):
        charge(Book(tmp_path), run, unsampled(), inputs)
    command = ["privacy", "account", str(tmp_path), "--delta", "1e-3"]
    cli.app(command, standalone_mode=False)
    assert "all runs  3       1.139" in capsys.readouterr().out
    cli.app([*command, "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    for row, rounds in zip(told["runs"], (2, 1, 3), strict=True):
        assert row["rounds"] == rounds
        assert row["epsilon"] == pytest.approx(closed_form(rounds, 4.0, 1e-3), rel=1e-2)
    assert [row["run"] for row in told["runs"]] == ["a", "b", "all runs"]


# --- noise on a client's own change, and lost secrets -----------------------------------------


@pytest.fixture
def local(tiny: Experiment) -> Experiment:
    return tiny.replace(
        rounds=2, weighting="uniform", privacy__mode="local", privacy__noise=1.0, train__steps=1
    )


def released(client: Client, round: int, shift: float = 0.0) -> State:
    """What the client sends in a round; its change is moved by `shift`."""
    received = models.initial(client.model, 0)
    job = client.prepare(Address("run", "", round, "north"), received)
    trained = client.train(job).state
    return client.finish(
        job, {g: {n: t + shift for n, t in ts.items()} for g, ts in trained.items()}
    )


def same(one: State, other: State) -> bool:
    return all(torch.equal(t, other[g][n]) for g, ts in one.items() for n, t in ts.items())


def test_local_noise_is_paid_before_it_is_released(local: Experiment) -> None:
    """The same change has the same bytes and no second charge; another change has both."""
    client = simulated(local)["north"]
    first = released(client, 1)
    assert same(first, released(client, 1))
    assert len(charges(client.state)) == 1
    assert not same(first, released(client, 1, shift=0.01))
    assert [round for _, round in charges(client.state)] == [1, 1]
    released(client, 2)
    paid = spending.whole(ledger.read(client.state))
    assert paid.events == (mechanism.local(local).event(3),)
    assert paid.events[0].noise == 0.5  # the sensitivity is 2 C


def test_a_client_releases_no_more_than_its_budget_covers_in_local_mode(
    local: Experiment,
) -> None:
    client = simulated(local.replace(privacy__noise=0.0, privacy__epsilon=4.0))["north"]
    released(client, 1)
    released(client, 1, shift=0.01)
    with pytest.raises(BudgetError, match=r"above privacy\.epsilon = 4"):
        released(client, 2)
    assert len(charges(client.state)) == 2


@pytest.mark.parametrize("mode", ["local", "record"])
def test_a_lost_secret_is_paid_again_and_never_other_noise_for_a_paid_round(
    local: Experiment, mode: str
) -> None:
    recipe = local.replace(
        privacy__mode=mode, privacy__noise=0.0, privacy__epsilon=8.0, train__batch_size=4
    )
    client = simulated(recipe)["north"]
    first = released(client, 1)
    for times in (2, 3):
        (client.state / ledger.KEY).unlink()
        if times > recipe.rounds:
            with pytest.raises(BudgetError, match=r"above privacy\.epsilon = 8"):
                released(client, 1)
            continue
        again = released(client, 1)
        assert not same(first, again)
        assert same(again, released(client, 1))
        assert len(charges(client.state)) == times
        first = again


def test_who_is_protected_as_a_whole_does_not_tell_its_size(
    north: tuple[Experiment, Node],
) -> None:
    recipe, node = north
    for mode, sizes in (("record", (50, 50)), ("local", (0, 0)), ("client", (0, 0))):
        about = asked(recipe.replace(privacy__mode=mode, weighting="uniform"), node)
        assert (about["examples"], about["units"]) == sizes
        assert about["mix"] is None


@pytest.mark.parametrize("mode", ["local", "record"])
def test_a_whole_run_between_institutions_that_demand_privacy(
    north: tuple[Experiment, Node], mode: str
) -> None:
    """Everybody's account has both rounds, and the coordinator's ledger verifies."""
    recipe, node = north
    recipe = recipe.replace(
        privacy__mode=mode,
        weighting="uniform",
        privacy__noise=0.0,
        privacy__epsilon=6.0,
        coordinator__minimum_clients=2,
    )
    demand: Node = {"privacy": "record,local", "epsilon": 6.0}
    nodes: list[Node] = [{**node, **demand, "client": name} for name in ("bank", "shop")]
    grid = Institutions(recipe, nodes)
    server_app(grid, grid.server_context({"arms": ""}))
    folder = parts.folder_of(recipe)
    verified = verifying.verify(folder)
    assert {name: account.rounds for name, account in verified.accounts.items()} == {
        "bank": 2,
        "shop": 2,
    }
    told_rows = [c["examples"] for c in json.loads((folder / "roster.json").read_text())["clients"]]
    assert told_rows == ([None, None] if mode == "local" else [50, 50])
    for name in ("bank", "shop"):
        account = Path(str(node["state"])) / name / "account"
        assert charges(account) == [(recipe.run_id, 1), (recipe.run_id, 2)]
        assert spending.whole(ledger.read(account)).epsilon <= 6.0
    grid = Institutions(recipe.replace(name="again"), nodes)
    with pytest.raises(RecipeError, match="over all runs from"):
        server_app(grid, grid.server_context({"arms": ""}))
