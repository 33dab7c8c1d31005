"""The contract of every strategy, over the registry: a new one joins by its line there."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.adapter import Adapter, State, digest, norm, subtract
from fedtune.combine import Mean
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.strategies import STRATEGIES
from fedtune.strategies.strategy import ClientInfo, Plan, Strategy, Turn, Update

COUNT = 4
names = pytest.mark.parametrize("name", sorted(STRATEGIES))


def adapter_of(seed: int, dtype: torch.dtype = torch.float64) -> Adapter:
    """Two modules, not square, of rank 2."""
    draws, adapter = torch.Generator().manual_seed(seed), {}
    for module, (d_out, d_in) in {"q": (5, 3), "v": (4, 6)}.items():
        adapter[f"{module}.lora_A.weight"] = torch.randn(2, d_in, generator=draws, dtype=dtype)
        adapter[f"{module}.lora_B.weight"] = torch.randn(d_out, 2, generator=draws, dtype=dtype)
    return adapter


def trained_by(plan: Plan, seed: int) -> State:
    """The plan's start, its trainable tensors moved: what any training returns."""
    moves = adapter_of(seed)
    return {
        group: {
            name: tensor + 0.1 * moves[name] if name in plan.trainable else tensor
            for name, tensor in adapter.items()
        }
        for group, adapter in plan.start.items()
    }


def play(
    strategy: Strategy, seeds: dict[str, int], weights: dict[str, float], rounds: int = 2
) -> tuple[State, dict[str, State]]:
    """Whole rounds without a network; returns the coordinator's state and what clients keep."""
    server = strategy.start(adapter_of(0))
    personal: dict[str, State] = {client: {} for client in seeds}
    for round in range(1, rounds + 1):
        updates = []
        for client, seed in seeds.items():
            info = ClientInfo(client, 10, round - 1)
            turn = Turn(round, strategy.broadcast(server, info, round), personal[client])
            plan = strategy.plan(turn)
            sent, personal[client] = strategy.reply(turn, plan, trained_by(plan, seed + round))
            updates.append(Update(client, weights[client], sent))
        server = strategy.aggregate(server, sorted(updates, key=_name), Mean(), round)
    return server, personal


def _name(update: Update) -> str:
    return update.client


def close(first: State, second: State) -> bool:
    return all(norm(subtract(first[group], second[group])) < 1e-10 for group in first)


def test_the_registry_is_as_large_as_this_file_knows() -> None:
    assert len(STRATEGIES) == COUNT


@names
def test_what_is_sent_is_what_the_gate_expects(name: str) -> None:
    strategy = STRATEGIES[name]()
    server = strategy.start(adapter_of(0))
    for round in (1, 2, 3):
        turn = Turn(round, strategy.broadcast(server, ClientInfo("x", 5), round), {})
        plan = strategy.plan(turn)
        sent, _ = strategy.reply(turn, plan, trained_by(plan, round))
        schema = strategy.payload(adapter_of(9), round)
        assert {g: list(a) for g, a in sent.items()} == {g: list(a) for g, a in schema.items()}
        assert all(sent[g][n].shape == schema[g][n].shape for g in sent for n in sent[g])


@names
def test_what_is_not_trained_is_not_shared(name: str) -> None:
    strategy = STRATEGIES[name]()
    for tensor in adapter_of(0):
        for round in (1, 2, 3):
            assert strategy.trains(tensor, round) or not strategy.shares(tensor, round)


@names
def test_states_are_returned_and_not_changed(name: str) -> None:
    strategy = STRATEGIES[name]()
    server = strategy.start(adapter_of(0))
    before = digest(server)
    turn = Turn(1, strategy.broadcast(server, ClientInfo("x", 5), 1), {})
    plan = strategy.plan(turn)
    sent, _ = strategy.reply(turn, plan, trained_by(plan, 1))
    strategy.aggregate(server, [Update("x", 1.0, sent)], Mean(), 1)
    assert digest(server) == before
    assert digest(plan.start) == digest(strategy.plan(turn).start)


@names
def test_one_client_is_plain_training(name: str) -> None:
    """K = 1: after two rounds the model is the one that the client trained."""
    strategy = STRATEGIES[name]()
    server, personal = play(strategy, {"x": 1}, {"x": 3.0})
    expected = strategy.start(adapter_of(0))
    for round in (1, 2):
        turn = Turn(round, expected, {})
        expected = trained_by(strategy.plan(turn), 1 + round)
    final = personal["x"] if strategy.personal else server
    assert close({"adapter": final["adapter"]}, {"adapter": expected["adapter"]})


@names
def test_equal_clients_are_one_client(name: str) -> None:
    strategy = STRATEGIES[name]()
    alone, kept = play(strategy, {"a": 1}, {"a": 1.0})
    together, all_kept = play(strategy, {"a": 1, "b": 1, "c": 1}, {"a": 1.0, "b": 5.0, "c": 2.0})
    assert close(alone, together)
    assert all(digest(state) == digest(kept["a"]) for state in all_kept.values())


@names
def test_the_order_of_clients_does_not_matter(name: str) -> None:
    strategy, weights = STRATEGIES[name](), {"a": 1.0, "b": 2.0, "c": 7.0}
    forward, _ = play(strategy, {"a": 1, "b": 2, "c": 3}, weights)
    backward, _ = play(strategy, {"c": 3, "a": 1, "b": 2}, weights)
    assert digest(forward) == digest(backward)


@names
@given(scale=st.floats(1e-3, 1e3))
def test_weights_matter_up_to_a_factor_only(name: str, scale: float) -> None:
    strategy = STRATEGIES[name]()
    weights = {"a": 1.0, "b": 2.0}
    first, _ = play(strategy, {"a": 1, "b": 2}, weights, 1)
    second, _ = play(strategy, {"a": 1, "b": 2}, {k: scale * v for k, v in weights.items()}, 1)
    assert close(first, second)


@names
def test_a_round_can_be_repeated_from_the_states_alone(name: str) -> None:
    """Nothing is remembered outside the states: two instances, interleaved, agree bitwise."""
    first, second = STRATEGIES[name](), STRATEGIES[name]()
    play(first, {"z": 8}, {"z": 1.0})
    one, _ = play(first, {"a": 1, "b": 2}, {"a": 1.0, "b": 2.0})
    two, _ = play(second, {"a": 1, "b": 2}, {"a": 1.0, "b": 2.0})
    assert digest(one) == digest(two)


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    """B A of each module."""
    modules = {name.split(".")[0] for name in adapter}
    return {m: adapter[f"{m}.lora_B.weight"] @ adapter[f"{m}.lora_A.weight"] for m in modules}


def products(
    strategy: Strategy, seeds: Sequence[int], weights: Sequence[float]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(the product of the new global factors, the weighted mean of the clients' products)."""
    server = strategy.start(adapter_of(0))
    turn = Turn(1, strategy.broadcast(server, ClientInfo("x", 5), 1), {})
    plan = strategy.plan(turn)
    trained = [trained_by(plan, seed) for seed in seeds]
    updates = [
        Update(f"c{i}", w, strategy.reply(turn, plan, t)[0])
        for i, (w, t) in enumerate(zip(weights, trained, strict=True))
    ]
    after = strategy.aggregate(server, updates, Mean(), 1)
    ideal = {
        module: sum(
            w / sum(weights) * dense(t["adapter"])[module]
            for w, t in zip(weights, trained, strict=True)
        )
        for module in ("q", "v")
    }
    return dense(after["adapter"]), ideal


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.1, 10)), min_size=2, max_size=6))
def test_ffa_lora_is_exact(drawn: list[tuple[int, float]]) -> None:
    """sum_i p_i B_i A = B-bar A (aggregation identity ffa.1)."""
    got, ideal = products(STRATEGIES["ffa_lora"](), [s for s, _ in drawn], [w for _, w in drawn])
    for module in got:
        torch.testing.assert_close(got[module], ideal[module], rtol=1e-10, atol=1e-12)


def test_fedit_errs_by_the_known_residual() -> None:
    """Ideal - B-bar A-bar = sum_i p_i (B_i - B-bar)(A_i - A-bar), which is not zero."""
    got, ideal = products(STRATEGIES["fedit"](), [1, 2, 3], [1.0, 1.0, 2.0])
    p = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    plan = STRATEGIES["fedit"]().plan(Turn(1, {"adapter": adapter_of(0)}, {}))
    clients = [trained_by(plan, seed)["adapter"] for seed in (1, 2, 3)]
    for module in ("q", "v"):
        A = torch.stack([c[f"{module}.lora_A.weight"] for c in clients])
        B = torch.stack([c[f"{module}.lora_B.weight"] for c in clients])
        A_bar, B_bar = torch.einsum("i,ijk->jk", p, A), torch.einsum("i,ijk->jk", p, B)
        residual = torch.einsum("i,imr,irn->mn", p, B - B_bar, A - A_bar)
        torch.testing.assert_close(ideal[module] - got[module], residual, rtol=1e-10, atol=1e-12)
        assert residual.norm() > 1e-3


def test_ffa_lora_never_moves_or_sends_a() -> None:
    strategy = STRATEGIES["ffa_lora"]()
    server, _ = play(strategy, {"a": 1, "b": 2}, {"a": 1.0, "b": 1.0}, 3)
    start = adapter_of(0)
    assert all(torch.equal(server["adapter"][n], start[n]) for n in start if "lora_A" in n)
    assert not any("lora_A" in n for n in strategy.payload(start, 1)["delta"])


def test_local_only_sends_nothing_and_keeps_its_own() -> None:
    strategy = STRATEGIES["local_only"]()
    server, personal = play(strategy, {"a": 1, "b": 2}, {"a": 1.0, "b": 1.0})
    assert digest(server) == digest({"adapter": adapter_of(0)})
    assert digest(personal["a"]) != digest(personal["b"])
    assert strategy.broadcast(server, ClientInfo("a", 5, last_round=1), 2) == {}
    with pytest.raises(ValueError, match="personal adapter is gone"):
        strategy.plan(Turn(2, {}, {}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "ffa_lora", "adapter__dora": True}, "adapter.dora = true"),
        ({"strategy": "centralized", "cohort": "fixed(size=2)"}, "cohort = 'fixed(size=2)'"),
    ],
)
def test_what_has_no_meaning_is_refused(changes: dict[str, str | bool], message: str) -> None:
    experiment = Experiment().replace(**changes)
    with pytest.raises(RecipeError) as error:
        STRATEGIES[experiment.strategy]().check(experiment)
    assert message in str(error.value)
    assert "Set " in str(error.value)
