"""Training of some entries only, and LoRA-A^2, which chooses them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune import models, training
from fedtune.adapter import Adapter, State, add, digest, norm, subtract
from fedtune.combine import Mean
from fedtune.config import AdapterSettings, ModelSettings, TrainSettings
from fedtune.lowrank import Product, moved_most, products, stack
from fedtune.models import Model
from fedtune.seeds import generator
from fedtune.strategies.lora_a2 import LoRAA2
from fedtune.strategies.rolora import RoLoRA
from fedtune.strategies.strategy import ClientInfo, Plan, Turn, Update
from fedtune.tasks import Classification
from fedtune.training import Work, batches_of, rates_of

TASK, LABELS = Classification(), ("a", "b", "c")
SETTINGS = TrainSettings(learning_rate=0.05, batch_size=3, weight_decay=0.1)


@pytest.fixture
def model(tiny_bert: Path) -> Model:
    settings = ModelSettings(name=str(tiny_bert), device="cpu", dtype="float64")
    return models.load(TASK, settings, AdapterSettings(rank=2), LABELS, 0)


def start_of(model: Model) -> State:
    """The run's first state, with B drawn too."""
    start = models.initial(model, 0)
    for name, tensor in start["adapter"].items():
        if "lora_B" in name:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator(name)).double())
    return start


def work() -> Work:
    rows = [{"input_ids": [2, *range(4, 5 + i % 5), 3], "label": [i % 3]} for i in range(10)]
    batches = batches_of(rows, SETTINGS, 0, "batches")
    return Work(batches, rates_of(len(batches), 1, 5, SETTINGS), seed=1)


def adapter_of(seed: int, sizes: list[tuple[int, int]], rank: int) -> Adapter:
    draws, adapter = generator(seed), {}
    for number, (d_out, d_in) in enumerate(sizes):
        for key, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            drawn = torch.randn(shape, generator=draws, dtype=torch.float64)
            adapter[f"m{number}.lora_{key}.weight"] = drawn
    return adapter


def moved_ranks(before: Adapter, after: Adapter) -> dict[tuple[str, int], float]:
    """|B'_i A'_i - B_i A_i| of every rank i of every module, from dense matrices."""
    theirs = dict(products(after))
    return {
        (module, i): float(
            torch.linalg.norm(
                theirs[module].B[:, [i]] @ theirs[module].A[[i]] - was.B[:, [i]] @ was.A[[i]]
            )
        )
        for module, was in products(before)
        for i in range(len(was.A))
    }


@given(
    st.lists(st.tuples(st.integers(2, 7), st.integers(2, 7)), min_size=1, max_size=4),
    st.integers(1, 4),
    st.floats(0.01, 1.0),
    st.sampled_from(["lora_A", "lora_B"]),
    st.integers(0, 99),
)
def test_the_ranks_that_moved_most_are_chosen_over_all_modules(
    sizes: list[tuple[int, int]], rank: int, share: float, frozen: str, seed: int
) -> None:
    before, moves = adapter_of(seed, sizes, rank), adapter_of(seed + 100, sizes, rank)
    after = {n: t if frozen in n else t + moves[n] for n, t in before.items()}
    masks = moved_most(before, after, share)
    scores = moved_ranks(before, after)
    count = max(1, round(share * len(scores)))
    best = sorted(scores, key=lambda key: -scores[key])[:count]
    for module, _ in products(before):
        a, b = masks[f"{module}.lora_A.weight"], masks[f"{module}.lora_B.weight"]
        assert a.shape == (rank, 1)
        assert torch.equal(a, b.T)
        assert a.flatten().tolist() == [float((module, i) in best) for i in range(rank)]


def test_masked_entries_stay_to_the_bit_and_the_others_move(model: Model) -> None:
    """Weight decay, the proximal term and a correction do not reach them."""
    start = start_of(model)
    names = frozenset(n for group in start.values() for n in group)
    mask = {
        n: (torch.rand(t.shape, generator=generator("mask", n)) > 0.5).double()
        for group in start.values()
        for n, t in group.items()
    }
    correction = {n: torch.ones_like(t) for n, t in start["adapter"].items()}
    plan = Plan(start, names, correction=correction, mask=mask)
    done = training.train(model, TASK, plan, work(), replace(SETTINGS, proximal=0.3)).state
    for group, tensors in done.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor == start[group][name], mask[name] == 0)
    full = replace(plan, mask={n: torch.ones(1) for n in names})
    bare = replace(plan, mask={})
    one, two = (training.train(model, TASK, p, work(), SETTINGS).state for p in (full, bare))
    assert digest(one) == digest(two)


@pytest.mark.parametrize("round", [1, 2])
def test_a_provisional_pass_chooses_what_the_round_trains(model: Model, round: int) -> None:
    """The same as the two passes by hand; ranks that were not chosen did not move."""
    start = start_of(model)
    plan = LoRAA2(share=0.25).plan(Turn(round, {"adapter": start["adapter"]}, {}))
    whole = RoLoRA().plan(Turn(round, {"adapter": start["adapter"]}, {}))
    done = training.train(model, TASK, plan, work(), SETTINGS)
    trial = training.train(model, TASK, whole, work(), SETTINGS)
    scores = moved_ranks(start["adapter"], trial.state["adapter"])
    best = sorted(scores, key=lambda key: -scores[key])[: round_up(0.25 * len(scores))]
    moved = moved_ranks(start["adapter"], done.state["adapter"])
    assert {key for key, value in moved.items() if value} == set(best)
    assert done.computed == 2 * trial.computed
    assert done.tokens == trial.tokens
    assert digest(done.state) != digest(trial.state)


def round_up(number: float) -> int:
    assert number == int(number)
    return int(number)


def test_lora_a2_with_every_rank_is_rolora_and_with_one_leaves_the_other_modules(
    model: Model,
) -> None:
    start = start_of(model)
    for round in (1, 2):
        turn = Turn(round, {"adapter": start["adapter"]}, {})
        one, two = LoRAA2(share=1.0), RoLoRA()
        trained = [
            training.train(model, TASK, s.plan(turn), work(), SETTINGS).state for s in (one, two)
        ]
        assert digest(trained[0]) == digest(trained[1])
        plan = LoRAA2(share=1e-9).plan(turn)
        least = training.train(model, TASK, plan, work(), SETTINGS).state
        moved = moved_ranks(start["adapter"], least["adapter"])
        assert sum(value > 0 for value in moved.values()) == 1
        sent, _ = LoRAA2(share=1e-9).reply(turn, plan, least)
        assert sum(bool(tensor.any()) for tensor in sent["delta"].values()) == 1
        assert all(("lora_B" if round == 1 else "lora_A") in name for name in sent["delta"])


@given(
    st.lists(st.tuples(st.integers(2, 7), st.integers(2, 7)), min_size=1, max_size=3),
    st.integers(1, 4),
    st.lists(st.floats(0.1, 9), min_size=1, max_size=4),
    st.floats(0.05, 1.0),
)
def test_the_sparse_mean_is_exact(
    sizes: list[tuple[int, int]], rank: int, weights: list[float], share: float
) -> None:
    """However different the clients' choices: sum_i p_i B_i A_i = B-bar A-bar in every round."""
    strategy = LoRAA2(share=share)
    server = strategy.start(adapter_of(1, sizes, rank))
    for round in (1, 2, 3):
        updates, own = [], []
        for number, weight in enumerate(weights):
            info = ClientInfo(f"c{number}", 9, round - 1)
            turn = Turn(round, strategy.broadcast(server, info, round), {})
            plan = strategy.plan(turn)
            moves = adapter_of(10 * round + number, sizes, rank)
            adapter = plan.start["adapter"]
            whole = {n: moves[n] if n in plan.trainable else 0 * t for n, t in adapter.items()}
            masks = moved_most(adapter, add(adapter, whole), share)
            trained = add(adapter, {n: t * masks[n] for n, t in whole.items()})
            own.append(dict(products(trained)))
            sent, _ = strategy.reply(turn, plan, {"adapter": trained})
            updates.append(Update(info.name, weight, sent))
        after = strategy.aggregate(server, updates, Mean(), round)
        for module, product in products(after["adapter"]):
            terms: list[Product] = [term[module] for term in own]
            ideal = stack(terms, [weight / sum(weights) for weight in weights]).dense()
            torch.testing.assert_close(product.dense(), ideal, rtol=1e-10, atol=1e-10)
        still = "lora_A" if round % 2 else "lora_B"
        change = subtract(after["adapter"], server["adapter"])
        assert norm({n: t for n, t in change.items() if still in n}) == 0.0
        server = after
