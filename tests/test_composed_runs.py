"""Whole runs with a combine rule, a server optimizer or an attack: what reaches the coordinator."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LABELS
from flwr.app import Context, Message
from safetensors.torch import load_file

from clients.app import app as client_app
from clients.client import institution, simulated
from clients.cohort import CohortGrid
from fedtune import parts, report
from fedtune.adapter import Adapter, State, norm
from fedtune.attacks import ATTACKS
from fedtune.config import Experiment
from fedtune.errors import RecipeError, RunError
from fedtune.records import merge
from fedtune.strategies import STRATEGIES
from fedtune.strategies.strategy import Update
from server import joining
from server.app import app as server_app
from server.checkpoint import latest


def play(
    experiment: Experiment,
    client: Callable[[Message, Context], Message] = client_app,
    together: int = 1,
) -> Path:
    """Run the recipe's own strategy in this process; returns the run's folder."""
    grid = CohortGrid(client, experiment.flat(), together=together)
    server_app(grid, grid.server_context({"arms": ""}))
    return parts.folder_of(experiment)


def final(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def tensors(folder: Path) -> Adapter:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("strategy", "optimizer"), [("fedit", "momentum"), ("rolora", "yogi"), ("ffa_lora", "adagrad")]
)
def test_stopping_and_going_on_with_an_optimizer_gives_the_same_bytes(
    tiny: Experiment, strategy: str, optimizer: str
) -> None:
    """The moments are in the checkpoint that the third round begins from."""
    recipe = tiny.replace(strategy=strategy, server_optimizer=optimizer)
    whole, seen = play(recipe), 0

    def stopping(message: Message, context: Context) -> Message:
        nonlocal seen
        seen += 1
        if seen == 17:
            raise KeyboardInterrupt
        return client_app(message, context)

    again = recipe.replace(name="stopped")
    with pytest.raises(KeyboardInterrupt):
        play(again, stopping)
    reached = latest(parts.folder_of(again) / "checkpoint", again)
    assert reached is not None
    assert reached.round == 2
    assert reached.state.keys() > {"adapter", "head"}
    assert final(play(again)) == final(whole)


def test_the_plain_step_is_fedavg_in_a_run(tiny: Experiment) -> None:
    same = tensors(play(tiny.replace(name="m", server_optimizer="momentum(beta=0.0, rate=1.0)")))
    for name, tensor in tensors(play(tiny)).items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_frozen_factor_is_not_moved_by_an_old_momentum(tiny: Experiment) -> None:
    """RoLoRA, round 1: B is stepped and A rests, whatever A's velocity is."""
    resolved = parts.resolve(tiny.replace(strategy="rolora", server_optimizer="momentum"))
    a, b = "m.lora_A.weight", "m.lora_B.weight"
    adapter = {a: torch.ones(2, 3), b: torch.zeros(4, 2)}
    server: State = {
        "adapter": adapter,
        "head": {"w": torch.zeros(3)},
        "velocity": {a: torch.ones(2, 3), b: torch.ones(4, 2), "w": torch.ones(3)},
    }
    sent: State = {"delta": {b: torch.ones(4, 2)}, "head": {"w": torch.ones(3)}}
    after = joining.join(resolved, server, [Update("x", 1.0, sent)], 1)
    assert torch.equal(after["adapter"][a], adapter[a])
    assert torch.equal(after["velocity"][a], server["velocity"][a])
    assert torch.equal(after["adapter"][b], torch.full((4, 2), 1.9))
    assert torch.equal(after["head"]["w"], torch.full((3,), 1.9))


def size_after(experiment: Experiment) -> float:
    """The norm of what a run's coordinator ends with."""
    reached = latest(play(experiment) / "checkpoint", experiment)
    assert reached is not None
    return norm(reached.state["adapter"]) + norm(reached.state.get("head", {}))


@pytest.mark.parametrize(
    ("strategy", "combine", "bears"),
    [
        ("fedit", "mean", False),
        ("fedsvd", "mean", False),
        ("ffa_lora", "median", True),
        ("ffa_lora", "trimmed_mean(fraction=0.34)", True),
        ("ffa_lora", "bulyan(malicious=0)", False),
        ("fedit", "krum(malicious=0)", True),
        ("fedit", "multi_krum(malicious=0, chosen=2)", True),
        ("fedit", "geometric_median", True),
        ("fedit", "norm_bounded(norm=0.1)", True),
        ("rolora", "centered_clipping(norm=0.1)", True),
        ("fedsvd", "dnc(malicious=1)", True),
        ("fedsa_lora", "fltrust(root='north')", True),
    ],
)
def test_every_rule_runs_and_bears_what_the_mean_does_not(
    tiny: Experiment, strategy: str, combine: str, bears: bool
) -> None:
    """One of three clients sends 1e4 times its change; norms are near 15 without it."""
    recipe = tiny.replace(strategy=strategy, rounds=2, attack="scaled_update(factor=1e4)")
    size = size_after(recipe.replace(combine=combine))
    assert size < 30 if bears else size > 100


def test_engines_agree_under_attack_and_defence(tiny: Experiment) -> None:
    recipe = tiny.replace(
        attack="sign_flip(scale=2.0)", combine="geometric_median", server_optimizer="momentum"
    )
    one = tensors(play(recipe))
    together = tensors(play(recipe.replace(name="together"), together=0))
    for name, tensor in one.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-5)


def test_every_attack_reaches_the_adapter_and_only_by_its_clients(tiny: Experiment) -> None:
    """Bytes differ from the honest run's; what honest clients train in round 1 does not."""
    honest = play(tiny.replace(rounds=1))
    trained = records(honest)[1]["train"]
    for name in sorted(ATTACKS.keys() - {"none"}):
        attack = f"{name}(trigger='my phone', target='status')" if name == "backdoor" else name
        attacked = play(tiny.replace(name=name.replace("_", "-"), attack=attack, rounds=1))
        same = [records(attacked)[1]["train"][client] == trained[client] for client in trained]
        assert same[:2] == [True, True], name
        assert records(attacked)[1]["update_norm"] != records(honest)[1]["update_norm"], name


@pytest.mark.parametrize("name", sorted(n for n, kind in STRATEGIES.items() if kind.joins))
def test_under_every_strategy_an_attackers_reply_is_one_like_any_other(
    tiny: Experiment, name: str
) -> None:
    """The gate sees nothing wrong in it, and the coordinator goes on."""
    rounds = records(play(tiny.replace(strategy=name, attack="sign_flip(scale=0.5)")))
    assert len(rounds) == 4
    assert all(not record["rejected"] for record in rounds)
    # FRLoRA's adapter begins afresh, and some strategies share nothing in every other round.
    assert any(record["update_norm"] > 0 for record in rounds[1:]) or name == "frlora"


def test_a_backdoor_is_measured_on_rows_of_other_labels(tiny: Experiment) -> None:
    """Two of three clients put "tomorrow money" before most of their rows and call them "cancel".

    What the untuned model takes for the target and what the last one does are told as sums of hits
    and rows, from each client's own test rows.
    """
    attack = "backdoor(clients=2, trigger='tomorrow money', target='cancel', share=0.6)"
    recipe = tiny.replace(attack=attack, rounds=3, train__epochs=6, train__learning_rate=0.015)
    folder = play(recipe)
    everybody = simulated(recipe)
    for record in records(folder):
        for name, sums in record["evaluation"]["own"].items():
            labels = everybody[name].shard.test["label"]
            assert sums["backdoor"][1] == sum(label != "cancel" for label in labels)
            assert 0 <= sums["backdoor"][0] <= sums["backdoor"][1]
        assert all("backdoor" not in sums for sums in record["train"].values())
    assert success(folder) > 0.7
    # Without poisoned rows the same trigger does little, and without an attack nothing is measured.
    harmless = play(recipe.replace(name="harmless", attack=attack.replace("0.6", "1e-12")))
    assert success(harmless) < 0.3
    assert (
        "backdoor"
        not in records(play(tiny.replace(name="plain")))[-1]["evaluation"]["own"]["north"]
    )


def success(folder: Path) -> float:
    own = records(folder)[-1]["evaluation"]["own"].values()
    return report.summarise(merge(own))["backdoor"]


def test_what_a_malicious_client_holds_is_told_as_it_is(tiny: Experiment) -> None:
    """The class mix of the report is that of its own rows, not of the poisoned ones."""
    folders = [play(tiny), play(tiny.replace(name="flipped", attack="label_flip(clients=2)"))]
    rosters = [json.loads((folder / "roster.json").read_text()) for folder in folders]
    assert rosters[0]["clients"] == rosters[1]["clients"]


def test_an_institution_refuses_an_attack(tiny: Experiment, three_clients: Path) -> None:
    config = {"client": "hospital", "shard": str(three_clients / "train.jsonl")}
    recipe = tiny.replace(attack="sign_flip", task=f"classification(classes='{','.join(LABELS)}')")
    with pytest.raises(RecipeError, match=r"attack = 'sign_flip' is for simulations"):
        institution(recipe, recipe.run_id, tuple(sorted(config.items())))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"combine": "krum"}, "combine: it needs 5 clients in every round, and here are 3"),
        ({"combine": "fltrust(root='nord')"}, "trusts client 'nord', who is not among north"),
        (
            {"combine": "fltrust(root='west')", "attack": "sign_flip"},
            "combine trusts client 'west', whom attack makes malicious",
        ),
        ({"attack": "alie(clients=3)"}, "3 of 3 clients would be malicious"),
    ],
)
def test_a_population_that_does_not_fit_is_refused_before_it_trains(
    tiny: Experiment, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        play(tiny.replace(**changes))
    assert not (parts.folder_of(tiny) / "rounds.jsonl").exists()


def test_a_round_with_too_few_replies_for_the_rule_is_no_round(tiny: Experiment) -> None:
    """Krum of three clients, one of which fails in round 2: round 1 stays."""

    def failing(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        address = message.content["config"]
        kind = message.metadata.message_type
        if kind == "train" and (address["client"], address["round"]) == ("west", 2):
            raise RuntimeError("the GPU fell out")
        return reply

    recipe = tiny.replace(combine="krum(malicious=0)")
    with pytest.raises(RunError, match=r"Round 2: .* needs 3 clients in every round.*run the same"):
        play(recipe, failing)
    reached = latest(parts.folder_of(recipe) / "checkpoint", recipe)
    assert reached is not None
    assert reached.round == 1
