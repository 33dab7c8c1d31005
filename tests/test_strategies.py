"""The contract of every strategy, over the registry: a new one joins by its line there."""

import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounds import strategy_of

from fedtune.adapter import Adapter, State, add, at_rank, digest, norm, subtract
from fedtune.combine import Mean
from fedtune.config import Experiment
from fedtune.cores import folded
from fedtune.errors import RecipeError
from fedtune.lowrank import products, stack, svd
from fedtune.parts import resolve
from fedtune.seeds import generator
from fedtune.strategies import STRATEGIES
from fedtune.strategies.scaffold import Scaffold
from fedtune.strategies.strategy import ClientInfo, Plan, Strategy, Turn, Update

COUNT = 26
TURNED = {"fedrot"}  # its clients turn their factors themselves
ANYBODY = ClientInfo("any", 1)
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

    def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(tensor.shape, generator=generator(seed, name), dtype=tensor.dtype)
        return tensor + 0.1 * drawn * plan.mask.get(name, torch.ones_like(tensor))

    return {
        group: {n: moved(n, t) if n in plan.trainable else t for n, t in adapter.items()}
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


def effective(state: State) -> dict[str, torch.Tensor]:
    """Each module's dense change of the frozen weights: the base's and the adapter's product.

    A coordinator that keeps a frame has the core in its adapter already.
    """
    change = dict(products(state.get("base", {})))
    adapter = state["adapter"]
    if "core" in state and "frame" not in state:
        adapter = folded(adapter, state["core"])
    return {
        module: own.dense() + (change[module].dense() if module in change else 0.0)
        for module, own in products(adapter)
    }


def close(first: State, second: State) -> bool:
    return all(norm(subtract(first[group], second[group])) < 1e-10 for group in first)


def test_the_registry_is_as_large_as_this_file_knows() -> None:
    assert len(STRATEGIES) == COUNT


@names
def test_what_is_sent_is_what_the_gate_expects(name: str) -> None:
    strategy = strategy_of(name)
    server = strategy.start(adapter_of(0))
    for round in (1, 2, 3):
        turn = Turn(round, strategy.broadcast(server, ClientInfo("x", 5), round), {})
        plan = strategy.plan(turn)
        sent, _ = strategy.reply(turn, plan, trained_by(plan, round))
        schema = strategy.payload(adapter_of(9), ClientInfo("x", 5), round)
        assert {g: list(a) for g, a in sent.items()} == {g: list(a) for g, a in schema.items()}
        assert all(sent[g][n].shape == schema[g][n].shape for g in sent for n in sent[g])


@names
def test_what_is_not_trained_is_not_shared(name: str) -> None:
    strategy = strategy_of(name)
    for tensor in adapter_of(0):
        for round in (1, 2, 3):
            assert strategy.trains(tensor, round) or not strategy.shares(tensor, round)


@names
def test_states_are_returned_and_not_changed(name: str) -> None:
    strategy = strategy_of(name)
    server = strategy.start(adapter_of(0))
    before = digest(server)
    turn = Turn(1, strategy.broadcast(server, ClientInfo("x", 5), 1), {})
    plan = strategy.plan(turn)
    sent, _ = strategy.reply(turn, plan, trained_by(plan, 1))
    strategy.aggregate(server, [Update("x", 1.0, sent)], Mean(), 1)
    assert digest(server) == before
    assert digest(plan.start) == digest(strategy.plan(turn).start)


@names
def test_a_head_beside_the_adapter_is_left_alone(name: str) -> None:
    """The coordinator keeps one in the same state, and joins it by itself."""
    strategy = strategy_of(name)
    head = {"classifier.weight": torch.ones(2, 3)}
    server: State = {**strategy.start(adapter_of(0)), "head": head}
    for round in (1, 2):
        _, updates = changes(strategy, server, round)
        server = strategy.aggregate(server, updates, Mean(), round)
    assert server["head"] is head


@names
def test_one_client_is_plain_training(name: str) -> None:
    """K = 1: after two rounds the model is the one that the client trained."""
    strategy = strategy_of(name)
    unturned = strategy.fixed_frame and name not in TURNED
    server, personal = strategy.start(adapter_of(0)), {"x": State()}
    expected: State = {}
    for round in (1, 2):
        info = ClientInfo("x", 10, round - 1)
        turn = Turn(round, strategy.broadcast(server, info, round), personal["x"])
        plan = strategy.plan(turn)
        if expected:
            same = {"adapter": plan.start["adapter"]}
            assert close(same, expected) or not unturned
        expected = {**trained_by(plan, 1 + round), "base": plan.base}
        sent, personal["x"] = strategy.reply(turn, plan, expected)
        server = strategy.aggregate(server, [Update("x", 3.0, sent)], Mean(), round)
    turn = Turn(3, strategy.broadcast(server, ClientInfo("x", 10, 2), 3), personal["x"])
    plan = strategy.plan(turn)
    final: State = {**plan.start, "base": plan.base}
    if unturned:
        assert close({"adapter": final["adapter"]}, {"adapter": expected["adapter"]})
    torch.testing.assert_close(effective(final), effective(expected))


@names
def test_equal_clients_are_one_client(name: str) -> None:
    strategy = strategy_of(name)
    alone, kept = play(strategy, {"a": 1}, {"a": 1.0})
    together, all_kept = play(strategy, {"a": 1, "b": 1, "c": 1}, {"a": 1.0, "b": 5.0, "c": 2.0})
    same = close({"adapter": alone["adapter"]}, {"adapter": together["adapter"]})
    assert same or not strategy.fixed_frame
    torch.testing.assert_close(effective(alone), effective(together), rtol=1e-10, atol=1e-10)
    assert all(close(state, kept["a"]) for state in all_kept.values())


@names
def test_the_order_of_clients_does_not_matter(name: str) -> None:
    strategy, weights = strategy_of(name), {"a": 1.0, "b": 2.0, "c": 7.0}
    forward, _ = play(strategy, {"a": 1, "b": 2, "c": 3}, weights)
    backward, _ = play(strategy, {"c": 3, "a": 1, "b": 2}, weights)
    assert digest(forward) == digest(backward)


@names
@given(scale=st.floats(1e-3, 1e3))
def test_weights_matter_up_to_a_factor_only(name: str, scale: float) -> None:
    strategy = strategy_of(name)
    weights = {"a": 1.0, "b": 2.0}
    first, _ = play(strategy, {"a": 1, "b": 2}, weights, 1)
    second, _ = play(strategy, {"a": 1, "b": 2}, {k: scale * v for k, v in weights.items()}, 1)
    assert close(first, second)


@names
def test_a_round_can_be_repeated_from_the_states_alone(name: str) -> None:
    """Nothing is remembered outside the states: two instances, interleaved, agree bitwise."""
    first, second = strategy_of(name), strategy_of(name)
    play(first, {"z": 8}, {"z": 1.0})
    one, _ = play(first, {"a": 1, "b": 2}, {"a": 1.0, "b": 2.0})
    two, _ = play(second, {"a": 1, "b": 2}, {"a": 1.0, "b": 2.0})
    assert digest(one) == digest(two)


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    """B A of each module."""
    modules = {name.split(".")[0] for name in adapter}
    return {m: adapter[f"{m}.lora_B.weight"] @ adapter[f"{m}.lora_A.weight"] for m in modules}


def joined_and_ideal(
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
    got, ideal = joined_and_ideal(
        STRATEGIES["ffa_lora"](), [s for s, _ in drawn], [w for _, w in drawn]
    )
    for module in got:
        torch.testing.assert_close(got[module], ideal[module], rtol=1e-10, atol=1e-12)


def test_fedit_errs_by_the_known_residual() -> None:
    """Ideal - B-bar A-bar = sum_i p_i (B_i - B-bar)(A_i - A-bar), which is not zero."""
    got, ideal = joined_and_ideal(STRATEGIES["fedit"](), [1, 2, 3], [1.0, 1.0, 2.0])
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
    assert not any("lora_A" in n for n in strategy.payload(start, ANYBODY, 1)["delta"])


def changes(strategy: Strategy, server: State, round: int) -> tuple[list[State], list[Update]]:
    """Three clients' trained states and their updates in one round."""
    trained, updates = [], []
    for number, (client, weight) in enumerate((("a", 1.0), ("b", 2.0), ("c", 5.0))):
        turn = Turn(round, strategy.broadcast(server, ClientInfo(client, 9), round), {})
        plan = strategy.plan(turn)
        trained.append(trained_by(plan, 10 * round + number))
        updates.append(Update(client, weight, strategy.reply(turn, plan, trained[-1])[0]))
    return trained, updates


@pytest.mark.parametrize("name", ["ffa_lora", "rolora", "fedsvd"])
def test_with_one_factor_frozen_the_mean_of_products_is_exact(name: str) -> None:
    """sum_i p_i B_i A_i = B-bar A-bar every round, to 1e-10 in float64."""
    strategy, server = strategy_of(name), strategy_of(name).start(adapter_of(0))
    for round in (1, 2, 3, 4):
        trained, updates = changes(strategy, server, round)
        server = strategy.aggregate(server, updates, Mean(), round)
        for module, product in products(server["adapter"]):
            own = [dict(products(state["adapter"]))[module] for state in trained]
            ideal = stack(own, [1 / 8, 2 / 8, 5 / 8]).dense()
            torch.testing.assert_close(product.dense(), ideal, rtol=1e-10, atol=1e-12)


def test_rolora_begins_with_b_and_never_moves_the_other_factor() -> None:
    strategy = STRATEGIES["rolora"]()
    server = strategy.start(adapter_of(0))
    for round, moved in ((1, "lora_B"), (2, "lora_A"), (3, "lora_B")):
        _, updates = changes(strategy, server, round)
        after = strategy.aggregate(server, updates, Mean(), round)
        for name, tensor in after["adapter"].items():
            assert torch.equal(tensor, server["adapter"][name]) == (moved not in name)
        server = after


def test_flexlora_is_the_best_approximation_of_its_rank() -> None:
    """Its error is the norm of the singular values it drops, below any other rank-2 rule's."""
    strategy, rival = STRATEGIES["flexlora"](), STRATEGIES["fedit"]()
    server = strategy.start(adapter_of(0))
    trained, updates = changes(strategy, server, 1)
    after = strategy.aggregate(server, updates, Mean(), 1)
    _, theirs = changes(rival, server, 1)
    other = dict(products(rival.aggregate(server, theirs, Mean(), 1)["adapter"]))
    for module, product in products(after["adapter"]):
        ideal = stack([dict(products(s["adapter"]))[module] for s in trained], [0.125, 0.25, 0.625])
        error = (ideal.dense() - product.dense()).norm()
        torch.testing.assert_close(error, svd(ideal)[1][2:].norm(), rtol=1e-10, atol=1e-12)
        assert 1e-3 < error <= (ideal.dense() - other[module].dense()).norm()


def test_flexlora_does_not_see_a_clients_gauge() -> None:
    """(B R, R^T A) is the same client for it, and another one for FedIT."""
    drawn = torch.randn(2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotation = torch.linalg.qr(drawn)[0]
    for name, same in (("flexlora", True), ("fedit", False)):
        strategy = strategy_of(name)
        server = strategy.start(adapter_of(0))
        _, updates = changes(strategy, server, 1)
        turn = Turn(1, strategy.broadcast(server, ClientInfo("a", 9), 1), {})
        plan = strategy.plan(turn)
        trained = trained_by(plan, 10)
        turned = {
            tensor_name: rotation.T @ t if "lora_A" in tensor_name else t @ rotation
            for tensor_name, t in trained["adapter"].items()
        }
        sent, _ = strategy.reply(turn, plan, {"adapter": turned})
        first = strategy.aggregate(server, updates, Mean(), 1)
        second = strategy.aggregate(server, [Update("a", 1.0, sent), *updates[1:]], Mean(), 1)
        equal = [
            torch.allclose(one.dense(), two.dense(), rtol=1e-10, atol=1e-12)
            for (_, one), (_, two) in zip(
                products(first["adapter"]), products(second["adapter"]), strict=True
            )
        ]
        assert all(equal) if same else not any(equal)


@given(st.lists(st.tuples(st.integers(1, 2), st.floats(0.1, 10)), min_size=1, max_size=5))
def test_flora_is_exact_for_clients_of_any_rank(drawn: list[tuple[int, float]]) -> None:
    """The base is the mean of the products (aggregation identity flora.1), round after round."""
    strategy = STRATEGIES["flora"]()
    server = strategy.start(adapter_of(0))
    ideal: dict[str, torch.Tensor] = {"q": torch.zeros(()), "v": torch.zeros(())}
    for round in (1, 2):
        updates = []
        for number, (rank, weight) in enumerate(drawn):
            info = ClientInfo(f"c{number}", 9, round - 1, rank)
            turn = Turn(round, strategy.broadcast(server, info, round), {}, rank=rank)
            plan = strategy.plan(turn)
            moves = at_rank(adapter_of(10 * round + number), rank)
            trained = {"adapter": add(plan.start["adapter"], moves)}
            updates.append(Update(f"c{number}", weight, strategy.reply(turn, plan, trained)[0]))
            for module, product in products(trained["adapter"]):
                share = weight / sum(w for _, w in drawn)
                ideal[module] = ideal[module] + share * product.dense()
        server = strategy.aggregate(server, updates, Mean(), round)
    for module, product in products(server["base"]):
        torch.testing.assert_close(product.dense(), ideal[module], rtol=1e-10, atol=1e-10)
    assert not any(t.any() for name, t in server["adapter"].items() if "lora_B" in name)


def test_flora_draws_another_a_every_round() -> None:
    """The first one again would keep every round in its row space."""
    strategy = STRATEGIES["flora"]()
    server, _ = play(strategy, {"a": 1}, {"a": 1.0}, 1)
    after, _ = play(strategy, {"a": 1}, {"a": 1.0}, 2)
    for name in (n for n in server["adapter"] if "lora_A" in n):
        assert not torch.equal(server["adapter"][name], after["adapter"][name])
        assert not torch.equal(server["adapter"][name], adapter_of(0)[name])


def test_fedsvd_keeps_rows_orthonormal_and_inside_the_first_ones() -> None:
    strategy = STRATEGIES["fedsvd"]()
    server = strategy.start(adapter_of(0))
    for round in (1, 2, 3):
        _, updates = changes(strategy, server, round)
        server = strategy.aggregate(server, updates, Mean(), round)
    first = dict(products(adapter_of(0)))
    for module, product in products(server["adapter"]):
        torch.testing.assert_close(product.A @ product.A.T, torch.eye(2).double())
        basis = torch.linalg.qr(first[module].A.T)[0]
        inside = product.A @ basis @ basis.T
        torch.testing.assert_close(inside, product.A, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["fedsvd", "flexlora"])
def test_where_nothing_was_learnt_a_stays_as_it_was(name: str) -> None:
    strategy, start = strategy_of(name), adapter_of(0)
    start = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in start.items()}
    server = strategy.start(start)
    turn = Turn(1, strategy.broadcast(server, ClientInfo("a", 9), 1), {})
    plan = strategy.plan(turn)
    sent, _ = strategy.reply(turn, plan, plan.start)
    after = strategy.aggregate(server, [Update("a", 1.0, sent)], Mean(), 1)
    assert digest(after) == digest(server)


def test_fedsa_lora_sends_no_b_and_gives_each_its_own() -> None:
    strategy = STRATEGIES["fedsa_lora"]()
    server, personal = play(strategy, {"a": 1, "b": 2}, {"a": 1.0, "b": 1.0})
    assert not any("lora_B" in n for n in strategy.payload(adapter_of(0), ANYBODY, 1)["delta"])
    start = adapter_of(0)
    for name, tensor in server["adapter"].items():
        assert torch.equal(tensor, start[name]) == ("lora_B" in name)
    for client in ("a", "b"):
        assert personal[client]["adapter"].keys() == {n for n in start if "lora_B" in n}
    assert digest(personal["a"]) != digest(personal["b"])


def test_scaffold_begins_as_fedit_and_then_corrects_by_the_difference() -> None:
    """c = c_i = 0: FedIT's first round, bit for bit. Then by hand, for two clients.

    With S eta = 1, c_i = x - y_i = -delta_i, and c their mean; a client's gradients are corrected
    by c - c_i, which adds up to zero over the clients.
    """
    strategy, fedit = STRATEGIES["scaffold"](), STRATEGIES["fedit"]()
    seeds, weights = {"a": 1, "b": 2}, {"a": 1.0, "b": 1.0}
    server, personal = play(strategy, seeds, weights, 1)
    theirs, _ = play(fedit, seeds, weights, 1)
    assert digest({"x": server["adapter"]}) == digest({"x": theirs["adapter"]})
    start, corrections = adapter_of(0), []
    for client, seed in seeds.items():
        turn = Turn(1, strategy.broadcast(strategy.start(start), ClientInfo("", 1), 1), {})
        moved = subtract(trained_by(strategy.plan(turn), seed + 1)["adapter"], start)
        for name, tensor in personal[client]["control"].items():
            torch.testing.assert_close(tensor, -moved[name], rtol=1e-10, atol=1e-12)
        info = ClientInfo(client, 1, 1)
        turn = Turn(2, strategy.broadcast(server, info, 2), personal[client])
        corrections.append(strategy.plan(turn).correction)
    for name, tensor in server["control"].items():
        mean = (personal["a"]["control"][name] + personal["b"]["control"][name]) / 2
        torch.testing.assert_close(tensor, mean, rtol=1e-10, atol=1e-12)
        together = corrections[0][name] + corrections[1][name]
        torch.testing.assert_close(together, torch.zeros_like(together), rtol=0, atol=1e-12)


def test_scaffold_moves_its_control_by_the_share_of_the_population() -> None:
    """Two of eight clients: a quarter of their mean change."""
    whole, _ = play(STRATEGIES["scaffold"](), {"a": 1, "b": 2}, {"a": 1.0, "b": 3.0}, 1)
    few, _ = play(Scaffold(population=8), {"a": 1, "b": 2}, {"a": 1.0, "b": 3.0}, 1)
    for name, tensor in whole["control"].items():
        torch.testing.assert_close(few["control"][name], tensor / 4, rtol=1e-10, atol=1e-12)


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
        ({"strategy": "scaffold", "cohort": "fixed(size=2)"}, "cohort = 'fixed(size=2)'"),
        ({"strategy": "centralized", "cohort": "fixed(size=2)"}, "cohort = 'fixed(size=2)'"),
    ],
)
def test_what_has_no_meaning_is_refused(changes: dict[str, str | bool], message: str) -> None:
    experiment = Experiment().replace(**changes)
    with pytest.raises(RecipeError) as error:
        STRATEGIES[experiment.strategy]().check(experiment)
    assert message in str(error.value)
    assert "Set " in str(error.value)


@names
def test_another_start_is_refused_where_the_weights_give_it(name: str) -> None:
    experiment = Experiment().replace(strategy=name, adapter__init="gaussian")
    if STRATEGIES[name].begins == "random":
        assert resolve(experiment).strategy == STRATEGIES[name]()
        return
    with pytest.raises(RecipeError, match=f"strategy = '{name}'.*init = 'gaussian'.*Set "):
        resolve(experiment)


@pytest.mark.parametrize(
    "text",
    [
        "flora(energy=0.0)",
        "fedmomentum(energy=1.1)",
        "fedex_lora(rank=-1)",
        "hetlora(keep=0.0)",
        "hetlora(penalty=-1.0)",
        "lora_fair(regularizer=-0.1)",
        "fedrot(strength=2.0)",
    ],
)
def test_parameters_outside_their_range_are_refused(text: str) -> None:
    """The message has the strategy, the parameter, its value and what it must be."""
    name, key, value = re.match(r"(\w+)\((\w+)=(.*)\)", text).groups()  # type: ignore[union-attr]
    with pytest.raises(RecipeError, match=f"{name}: {key} = {value} must be"):
        strategy_of(text)
