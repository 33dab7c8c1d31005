"""Strategies with something private beside the shared adapter, and what must never leave."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clients import personal
from clients.app import app as client_app
from clients.client import Client, Job
from clients.cohort import CohortGrid
from fedtune import models, parts, training, wire
from fedtune.adapter import Adapter, State, at_rank, norm, subtract, weighted_mean
from fedtune.combine import Mean
from fedtune.config import AdapterSettings, Experiment, ModelSettings
from fedtune.cores import folded
from fedtune.errors import RecipeError
from fedtune.lowrank import products
from fedtune.seeds import generator
from fedtune.strategies import STRATEGIES, Strategy
from fedtune.strategies.fedalt import FedALT, rest_of_world
from fedtune.strategies.feddpa import FedDPA
from fedtune.strategies.paired import apart, beside
from fedtune.strategies.pf2lora import PF2LoRA
from fedtune.strategies.strategy import ClientInfo, Plan, Turn, Update
from fedtune.tasks import CausalLM
from server.app import app as server_app

PERSONAL = sorted(name for name, kind in STRATEGIES.items() if kind.personal)
DESIGNED = {"fedalt": {"own"}}  # what a client keeps and sends as well, by the method's design
SIZES = {"q": (5, 3), "v": (4, 6)}


def adapter_of(seed: int, rank: int = 2) -> Adapter:
    draws, adapter = generator(seed), {}
    for module, (d_out, d_in) in SIZES.items():
        for key, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            drawn = torch.randn(shape, generator=draws, dtype=torch.float64)
            adapter[f"{module}.lora_{key}.weight"] = drawn
    return adapter


def trained_by(plan: Plan, seed: int) -> State:
    """Everything that the plan trains, moved."""
    return {
        group: {
            n: t
            + torch.randn(t.shape, generator=generator(seed, n), dtype=t.dtype)
            * plan.mask.get(n, torch.ones_like(t))
            if n in plan.trainable
            else t
            for n, t in tensors.items()
        }
        for group, tensors in plan.start.items()
    }


def dense(plan: Plan) -> dict[str, torch.Tensor]:
    """What a client's model changes, module by module."""
    adapter = plan.start["adapter"]
    whole = folded(adapter, plan.start["core"]) if "core" in plan.start else adapter
    return {module: product.dense() for module, product in products(whole)}


def play(
    strategy: Strategy, weights: dict[str, float], rounds: int
) -> tuple[State, dict[str, State], list[tuple[str, State, State]]]:
    """The coordinator's state, what clients keep, and (client, sent, kept) of every turn."""
    server, kept = strategy.start(adapter_of(0)), {name: State() for name in weights}
    turns = []
    for round in range(1, rounds + 1):
        updates = []
        for number, (name, weight) in enumerate(weights.items()):
            info = ClientInfo(name, 9, round - 1)
            turn = Turn(round, strategy.broadcast(server, info, round), kept[name])
            plan = strategy.plan(turn)
            sent, kept[name] = strategy.reply(turn, plan, trained_by(plan, 10 * round + number))
            updates.append(Update(name, weight, sent))
            turns.append((name, sent, kept[name]))
        server = strategy.aggregate(server, updates, Mean(), round)
    return server, kept, turns


def rows_of(state: State) -> set[bytes]:
    """Every row and every column of every tensor, as bytes."""
    found = set()
    for tensors in state.values():
        for tensor in tensors.values():
            whole = tensor.reshape(len(tensor), -1) if tensor.dim() > 1 else tensor.reshape(1, -1)
            for part in (*whole, *whole.T):
                if part.numel() > 1:
                    found.add(part.contiguous().numpy().tobytes())
    return found


@pytest.mark.parametrize("name", PERSONAL)
def test_nothing_private_is_in_what_is_sent(name: str) -> None:
    """By its bytes: no tensor that is kept, and no row or column of one, whoever sends it."""
    _, _, turns = play(STRATEGIES[name](), {"a": 1.0, "b": 2.0, "c": 1.0}, 4)
    private = set[bytes]()
    for _, _, kept in turns:
        private |= rows_of({g: t for g, t in kept.items() if g not in DESIGNED.get(name, set())})
    assert private
    for _, sent, _ in turns:
        assert not rows_of(sent) & private


def test_what_is_sent_by_design_is_found_by_the_same_scan() -> None:
    _, _, turns = play(FedALT(), {"a": 1.0, "b": 2.0}, 1)
    assert all(rows_of(sent) & rows_of({"own": kept["own"]}) for _, sent, kept in turns)


@pytest.mark.parametrize("name", PERSONAL)
def test_nothing_private_is_in_the_messages_of_a_run(
    tiny: Experiment, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same over a whole run with its heads, from the serialised replies."""
    sent, kept, usual, saved = list[State](), list[State](), Client.finish, personal.save

    def finish(self: Client, job: Job, trained: State) -> State:
        reply = usual(self, job, trained)
        content = wire.RecordDict({**wire.pack(reply)})
        sent.append(wire.unpack(content))
        return reply

    def save(root: Path, round: int, state: State) -> None:
        kept.append({g: t for g, t in state.items() if g not in DESIGNED.get(name, set())})
        saved(root, round, state)

    monkeypatch.setattr(Client, "finish", finish)
    monkeypatch.setattr(personal, "save", save)
    grid = CohortGrid(client_app, tiny.replace(strategy=name, rounds=2).flat(), together=0)
    server_app(grid, grid.server_context({"arms": ""}))
    assert len(sent) == len(kept) == 6
    zero = {bytes(len(row)) for state in kept for row in rows_of(state)}
    private = set[bytes]().union(*map(rows_of, kept)) - zero
    assert private
    assert not any(rows_of(state) & private for state in sent)


@given(st.lists(st.floats(0.1, 9), min_size=1, max_size=5), st.integers(1, 3))
def test_the_rest_of_the_world_is_the_mean_of_the_others(weights: list[float], rank: int) -> None:
    adapters = [adapter_of(seed, rank) for seed in range(len(weights))]
    mean = weighted_mean(adapters, weights)
    for number, own in enumerate(adapters):
        got = rest_of_world(mean, own, weights[number] / sum(weights))
        others = [a for i, a in enumerate(adapters) if i != number]
        if not others:
            assert not any(tensor.any() for tensor in got.values())
            continue
        left = [w for i, w in enumerate(weights) if i != number]
        assert norm(subtract(got, weighted_mean(others, left))) < 1e-10


def test_fedalt_never_overwrites_an_adapter_and_freezes_the_rest() -> None:
    strategy, weights = FedALT(), {"a": 1.0, "b": 2.0, "c": 5.0}
    server, kept, _ = play(strategy, weights, 2)
    for name in weights:
        turn = Turn(3, strategy.broadcast(server, ClientInfo(name, 9, 2), 3), kept[name])
        plan = strategy.plan(turn)
        own, rest = apart(plan.start["adapter"], adapter_of(0))
        assert norm(subtract(own, kept[name]["own"])) == 0.0
        others = [k["own"] for other, k in kept.items() if other != name]
        left = [w for other, w in weights.items() if other != name]
        assert norm(subtract(rest, weighted_mean(others, left))) < 1e-10
        moved, unmoved = apart(trained_by(plan, 7)["adapter"], adapter_of(0))
        assert norm(subtract(unmoved, rest)) == 0.0
        assert all(not torch.equal(moved[n], own[n]) for n in own)
        sent, _ = strategy.reply(turn, plan, trained_by(plan, 7))
        assert norm(subtract(sent["adapter"], moved)) == 0.0


def test_fedalt_knows_who_is_in_the_mean() -> None:
    """Who was not in the last cohort takes nothing out of the mean; who is new begins from it."""
    strategy = FedALT()
    server, kept, _ = play(strategy, {"a": 1.0, "b": 3.0}, 1)
    for name, own in (("new", {}), ("was away", kept["a"])):
        turn = Turn(2, strategy.broadcast(server, ClientInfo(name, 9), 2), own)
        mine, rest = apart(strategy.plan(turn).start["adapter"], adapter_of(0))
        assert norm(subtract(rest, server["adapter"])) == 0.0
        assert norm(subtract(mine, own.get("own", server["adapter"]))) == 0.0
    with pytest.raises(ValueError, match="own adapter is gone"):
        strategy.plan(Turn(2, strategy.broadcast(server, ClientInfo("a", 9, 1), 2), {}))


def test_feddpa_trains_one_adapter_a_round_and_sends_the_global_one() -> None:
    strategy, server, kept = FedDPA(weight=0.25), FedDPA().start(adapter_of(0)), State()
    for round in range(1, 5):
        turn = Turn(round, strategy.broadcast(server, ClientInfo("a", 9, round - 1), round), kept)
        plan = strategy.plan(turn)
        shared, own = apart(plan.start["adapter"], adapter_of(0))
        for module, change in dense(plan).items():
            both = [dict(products(half))[module].dense() for half in (shared, own)]
            torch.testing.assert_close(change, 0.75 * both[0] + 0.25 * both[1])
        sent, kept = strategy.reply(turn, plan, trained_by(plan, round))
        moved = norm(subtract(kept["private"], own)) > 0
        assert moved == (round % 2 == 0)
        assert bool(sent["delta"]) == (round % 2 == 1)
        assert (
            sent["delta"].keys()
            == strategy.payload(shared, ClientInfo("a", 9), round)["delta"].keys()
        )
        before = server
        server = strategy.aggregate(server, [Update("a", 1.0, sent)], Mean(), round)
        assert (norm(subtract(server["adapter"], before["adapter"])) > 0) == (round % 2 == 1)


@given(st.integers(1, 4))
def test_pf2lora_adds_a_private_product_of_its_own_rank(rank: int) -> None:
    strategy = PF2LoRA(rank=rank)
    server, kept, turns = play(strategy, {"a": 1.0, "b": 2.0}, 3)
    for name in ("a", "b"):
        turn = Turn(4, strategy.broadcast(server, ClientInfo(name, 9, 3), 4), kept[name])
        plan = strategy.plan(turn)
        own = dict(products(kept[name]["private"]))
        for module, change in dense(plan).items():
            common = dict(products(server["adapter"]))[module].dense()
            torch.testing.assert_close(change, common + own[module].dense())
            assert own[module].A.shape[0] == rank
    assert all(
        tensor.shape == adapter_of(0)[name].shape
        for _, sent, _ in turns
        for name, tensor in sent["delta"].items()
    )


@pytest.mark.parametrize("strategy", [FedDPA(), PF2LoRA(), FedALT()], ids=repr)
def test_a_client_begins_with_the_common_model(strategy: Strategy) -> None:
    """What is private has no effect before it is trained."""
    start = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in adapter_of(0).items()}
    server = strategy.start(start)
    plan = strategy.plan(Turn(1, strategy.broadcast(server, ClientInfo("a", 9), 1), {}))
    assert not any(change.any() for change in dense(plan).values())
    if not isinstance(strategy, FedALT):
        _, own = apart(plan.start["adapter"], start)
        assert all(t.any() for n, t in own.items() if "lora_A" in n)


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_side_by_side_are_the_sum_of_both_models(tiny_gpt2: Path, rslora: bool) -> None:
    """With more ranks than the recipe's, on the recipe's scaling."""
    settings = ModelSettings(name=str(tiny_gpt2), device="cpu", dtype="float64")
    recipe = AdapterSettings(rank=2, alpha=5.0, rslora=rslora)
    model = models.load(CausalLM(), settings, recipe, (), 0)
    before = models.read(model)
    one, two = (models.initial(model, seed)["adapter"] for seed in (1, 2))
    for number, adapter in enumerate((one, two)):
        for name, tensor in adapter.items():
            tensor.add_(torch.randn(tensor.shape, generator=generator(number, name)))
    ids = torch.tensor([[1, 5, 7, 9]])

    def logits(plan: Plan) -> torch.Tensor:
        with torch.no_grad(), training.opened(model, plan):
            model.module.eval()
            result: torch.Tensor = model.module(input_ids=ids).logits
        return result

    both = logits(Plan({"adapter": beside(one, at_rank(two, 3))}, frozenset()))
    summed = logits(Plan({"adapter": one}, frozenset(), base=two))
    torch.testing.assert_close(both, summed, rtol=1e-9, atol=1e-9)
    models.write(model, before)  # at the recipe's ranks again
    assert norm(subtract(models.read(model)["adapter"], before["adapter"])) == 0.0


@pytest.mark.parametrize("text", ["feddpa(weight=1.5)", "pf2lora(rank=0)", "lora_a2(share=0.0)"])
def test_parameters_without_meaning_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=text.split("(")[1].split("=")[0]):
        parts.resolve(Experiment().replace(strategy=text))
