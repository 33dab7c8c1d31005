"""Server optimizers: limits, algorithm 2 by hand, Flower's where it agrees, and what rests."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam
from hypothesis import given
from hypothesis import strategies as st

from clients.local import identified, identify
from fedtune.adapter import Adapter, State, digest
from fedtune.components import build
from fedtune.errors import RecipeError
from fedtune.optimizers import OPTIMIZERS, Adagrad, Adam, Momentum, ServerOptimizer, Yogi

COUNT = 5
NAMES = ("q.lora_A.weight", "q.lora_B.weight", "classifier.weight")
optimizers = pytest.mark.parametrize("name", sorted(OPTIMIZERS))


def state_of(seed: int, dtype: torch.dtype = torch.float64) -> State:
    draws = torch.Generator().manual_seed(seed)
    a, b, w = (torch.randn(s, generator=draws, dtype=dtype) for s in ((2, 3), (4, 2), (5,)))
    return {"adapter": {NAMES[0]: a, NAMES[1]: b}, "head": {NAMES[2]: w}}


def moved(server: State, deltas: State) -> State:
    """What a strategy returns: the groups it joined moved, all others as they were."""
    return {
        group: {n: t + deltas[group][n] if group in deltas else t for n, t in tensors.items()}
        for group, tensors in server.items()
    }


def played(optimizer: ServerOptimizer, rounds: Sequence[State], start: State) -> State:
    server = start
    for deltas in rounds:
        server = optimizer.step(server, moved(server, deltas), NAMES)
    return server


def test_the_registry_is_as_large_as_this_file_knows() -> None:
    assert len(OPTIMIZERS) == COUNT


@given(seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_without_momentum_at_rate_one_it_is_fedavg(seed: int, dtype: torch.dtype) -> None:
    rounds, start = [state_of(seed + k, dtype) for k in range(3)], state_of(seed + 9, dtype)
    plain = played(OPTIMIZERS["none"](), rounds, start)
    got = played(Momentum(beta=0.0, rate=1.0), rounds, start)
    for group in plain:
        for name, tensor in plain[group].items():
            torch.testing.assert_close(got[group][name], tensor, rtol=1e-6, atol=1e-6)


def test_none_returns_what_was_joined_and_keeps_nothing() -> None:
    server, deltas = state_of(0), state_of(1)
    after = moved(server, deltas)
    assert digest(OPTIMIZERS["none"]().step(server, after, NAMES)) == digest(after)


def test_momentum_by_hand() -> None:
    """beta = 1/2, rate = 2, delta = 1 three times: v = 1, 3/2, 7/4, and x = 2 (1 + 3/2 + 7/4)."""
    ones = {
        group: {n: torch.ones_like(t) for n, t in g.items()} for group, g in state_of(0).items()
    }
    zero = {group: {n: 0 * t for n, t in g.items()} for group, g in ones.items()}
    end = played(Momentum(beta=0.5, rate=2.0), [ones] * 3, zero)
    for group in ("adapter", "head"):
        assert all(bool((t == 8.5).all()) for t in end[group].values())
    assert all(bool((t == 1.75).all()) for t in end["velocity"].values())


@pytest.mark.parametrize("name", ["adagrad", "adam", "yogi"])
@given(deltas=st.lists(st.floats(-3, 3), min_size=1, max_size=5))
def test_adaptive_rules_are_algorithm_2_s(name: str, deltas: list[float]) -> None:
    """One number at a time, with math alone; v_0 = tau^2 and no bias correction."""
    eta, beta1, beta2, tau = 0.3, 0.8, 0.95, 0.02
    x, m, v = 0.7, 0.0, tau**2
    for d in deltas:
        m = beta1 * m + (1 - beta1) * d
        sign = (v > d * d) - (v < d * d)
        v = {
            "adagrad": v + d * d,
            "adam": beta2 * v + (1 - beta2) * d * d,
            "yogi": v - (1 - beta2) * d * d * sign,
        }[name]
        x += eta * m / (math.sqrt(v) + tau)
    fields = {"rate": eta, "beta1": beta1, "tau": tau}
    if name != "adagrad":
        fields["beta2"] = beta2
    optimizer = OPTIMIZERS[name](**fields)
    server: State = {"adapter": {NAMES[0]: torch.tensor([0.7], dtype=torch.float64)}}
    for d in deltas:
        after = {"adapter": {NAMES[0]: server["adapter"][NAMES[0]] + d}}
        server = optimizer.step(server, after, NAMES)
    assert float(server["adapter"][NAMES[0]]) == pytest.approx(x, rel=1e-10, abs=1e-12)
    assert float(server["first"][NAMES[0]]) == pytest.approx(m, rel=1e-10, abs=1e-12)
    assert float(server["second"][NAMES[0]]) == pytest.approx(v, rel=1e-10, abs=1e-12)


def flower_s(
    strategy: FedAdagrad | FedAdam, start: np.ndarray, deltas: Sequence[np.ndarray]
) -> np.ndarray:
    """Flower's own strategy over rounds in which one client sends x + delta."""
    identify()
    x = start
    for round, delta in enumerate(deltas, start=1):
        strategy.current_arrays = {"x": x}
        content = RecordDict({"arrays": ArrayRecord({"x": Array(x + delta)})})
        content["metrics"] = MetricRecord({"num-examples": 1})
        asked = identified(Message(RecordDict(), 1, "train"))
        arrays, _ = strategy.aggregate_train(round, [Message(content, reply_to=asked)])
        assert arrays is not None
        x = arrays["x"].numpy()
    return x


def test_adagrad_is_flower_s_over_four_rounds_and_adam_is_not() -> None:
    """Flower's v begins at 0 and ours at tau^2 = 1e-6: less than 1e-5 where deltas are near 1.

    Its Adam also corrects the bias, which shows in the first rounds.
    """
    draws = np.random.default_rng(0)
    deltas = [np.sign(d) * (0.5 + np.abs(d)) for d in draws.normal(size=(4, 20))]
    start = draws.normal(size=20)

    def ours(optimizer: ServerOptimizer) -> np.ndarray:
        server: State = {"adapter": {NAMES[0]: torch.from_numpy(start)}}
        for delta in deltas:
            after: Adapter = {NAMES[0]: server["adapter"][NAMES[0]] + torch.from_numpy(delta)}
            server = optimizer.step(server, {"adapter": after}, NAMES)
        values: np.ndarray = server["adapter"][NAMES[0]].numpy()
        return values

    theirs = flower_s(FedAdagrad(eta=0.1, tau=1e-3), start, deltas)
    np.testing.assert_allclose(ours(Adagrad(rate=0.1, tau=1e-3)), theirs, rtol=0, atol=1e-5)
    adam = flower_s(FedAdam(eta=0.1, tau=1e-3, beta_1=0.9, beta_2=0.99), start, deltas)
    assert np.abs(ours(Adam(rate=0.1)) - adam).max() > 1e-3


@optimizers
@given(seed=st.integers(0, 10**6))
def test_what_was_not_joined_rests(name: str, seed: int) -> None:
    """RoLoRA's frozen factor: no old momentum moves it, and its moments stay as they were."""
    optimizer, server = OPTIMIZERS[name](), state_of(seed)
    server = played(optimizer, [state_of(seed + 1)], server)
    delta = state_of(seed + 2)
    after = moved(server, delta)
    after["adapter"][NAMES[0]] = server["adapter"][NAMES[0]]
    end = optimizer.step(server, after, NAMES[1:])
    assert torch.equal(end["adapter"][NAMES[0]], server["adapter"][NAMES[0]])
    assert not torch.equal(end["adapter"][NAMES[1]], server["adapter"][NAMES[1]])
    for group in optimizer.groups:
        assert torch.equal(end[group][NAMES[0]], server[group][NAMES[0]])
        assert not torch.equal(end[group][NAMES[1]], server[group][NAMES[1]])


@optimizers
def test_states_are_returned_and_not_changed(name: str) -> None:
    optimizer = OPTIMIZERS[name]()
    server = played(optimizer, [state_of(1)], state_of(0))
    after = moved(server, state_of(2))
    before = digest(server), digest(after)
    optimizer.step(server, after, NAMES)
    assert (digest(server), digest(after)) == before


@optimizers
def test_adapter_and_head_keep_their_dtype(name: str) -> None:
    end = played(OPTIMIZERS[name](), [state_of(1, torch.float32)], state_of(0, torch.float32))
    assert {t.dtype for group in end.values() for t in group.values()} == {torch.float32}


def test_yogi_and_adam_differ_where_the_second_moment_is_large() -> None:
    large, small = (
        state_of(1),
        {g: {n: 1e-3 * t for n, t in s.items()} for g, s in state_of(2).items()},
    )
    ends = [played(rule, [large, small], state_of(0))["second"] for rule in (Adam(), Yogi())]
    assert all(bool((ends[1][name] > ends[0][name]).all()) for name in NAMES)


@pytest.mark.parametrize(
    "text",
    [
        "momentum(beta=1.0)",
        "momentum(rate=0.0)",
        "adam(tau=0.0)",
        "adam(beta2=1.0)",
        "yogi(beta2=-0.1)",
        "adagrad(beta1=1.5)",
        "adagrad(rate=1e999)",
        "adagrad(beta2=0.9)",
        "admm",
    ],
)
def test_values_without_meaning_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="server_optimizer '"):
        build(text, OPTIMIZERS, "server_optimizer")


def test_defaults_are_the_documented_ones() -> None:
    assert dataclasses.asdict(Adam()) == {"rate": 0.1, "beta1": 0.9, "tau": 1e-3, "beta2": 0.99}
    assert dataclasses.asdict(Momentum()) == {"beta": 0.9, "rate": 1.0}
