"""Noisy steps: single rows' gradients, who is drawn, the bound of one unit, and the noise."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedtune import models, per_example, training, vectorized
from fedtune.adapter import digest
from fedtune.config import AdapterSettings, ModelSettings, TrainSettings
from fedtune.errors import RecipeError
from fedtune.models import Model
from fedtune.privacy.steps import ClippedSum, Steps, chunks, drawn
from fedtune.strategies.strategy import Plan
from fedtune.tasks import CausalLM, Classification, Task
from fedtune.tasks.task import Batch, Example, Scores
from fedtune.training import Trained, Work

LABELS = ("a", "b", "c")
KEY = bytes(range(32))


def loaded(folder: Path, task: Task, dtype: str = "float64", **adapter: object) -> Model:
    labels = LABELS if isinstance(task, Classification) else ()
    settings_ = ModelSettings(name=str(folder), device="cpu", dtype=dtype)
    return models.load(task, settings_, AdapterSettings(rank=2, **adapter), labels, 0)  # type: ignore[arg-type]


def examples_of(count: int, seed: int = 0) -> list[Example]:
    """Rows of 3 to 9 tokens."""
    rows = []
    for i in range(count):
        ids = [2, *[4 + (seed + 7 * i * k) % 40 for k in range(1, 2 + (seed + 5 * i) % 7)], 3]
        rows.append({"input_ids": ids, "labels": ids, "label": [(seed + i) % 3]})
    return rows


def start_of(model: Model) -> Plan:
    """A start at which no gradient is zero."""
    start = models.initial(model, 3)
    for group in start.values():
        for tensor in group.values():
            draws = torch.Generator().manual_seed(tensor.numel())
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=draws))
    return Plan(start, frozenset(name for group in start.values() for name in group))


def one_by_one(
    model: Model, task: Task, batch: list[Example], live: Mapping[str, nn.Parameter]
) -> list[dict[str, Tensor]]:
    """The slow, obvious way: a backward pass for each row alone, through PEFT's own layers."""
    found = []
    for example in batch:
        inputs = task.collate([example], model.pad)
        with model.autocast():
            loss = task.scores(model.module, inputs)["loss"].mean()
        found.append(dict(zip(live, torch.autograd.grad(loss, list(live.values())), strict=True)))
    return found


KINDS: list[tuple[str, Task]] = [
    ("tiny_bert", Classification()),
    ("tiny_bert", Classification(pooling="model")),
    ("tiny_llama", CausalLM()),
    ("tiny_gpt2", CausalLM()),
    ("tiny_gpt2", Classification()),
]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(("folder", "task"), KINDS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_rows_gradient_is_the_one_it_has_alone(
    folder: str, task: Task, checkpointing: bool, dtype: str, request: pytest.FixtureRequest
) -> None:
    """Of all tensors, for rows of mixed lengths in one batch: to 1e-5, in float64 to 1e-12."""
    model = loaded(request.getfixturevalue(folder), task, dtype)
    batch = examples_of(6)
    model.module.train()
    with (
        training.opened(model, start_of(model)) as live,
        models.checkpointed(model, checkpointing),
    ):
        for parameter in live.values():
            parameter.requires_grad_()
            parameter.grad = None
        alone = one_by_one(model, task, batch, live)
        with per_example.kept(model, live, len(batch)) as rows:
            scores = task.scores(model.module, task.collate(batch, model.pad))
            scores["loss"].sum().backward()
        assert all(parameter.grad is None for parameter in live.values())
    assert rows.gradients.keys() == live.keys()
    bound = 1e-12 if dtype == "float64" else 1e-5
    for number, own in enumerate(alone):
        size = math.sqrt(sum(float(g.square().sum()) for g in own.values()))
        assert size > 0
        for name, gradient in own.items():
            off = (rows.gradients[name][number] - gradient.flatten()).norm()
            assert float(off) <= bound * size


def total_of(model: Model, task: Task, batch: list[Example], steps: Steps) -> dict[str, Tensor]:
    plan = start_of(model)
    model.module.train()
    with training.opened(model, plan) as live:
        for parameter in live.values():
            parameter.requires_grad_()
        return training._clipped(model, task, batch, live, {}, steps, 0)


def steps_of(**changes: object) -> Steps:
    return replace(Steps(1.0, 4.0, 1.0, KEY, ("run", 1)), **changes)  # type: ignore[arg-type]


def size_of(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


@given(st.integers(1, 9), st.sampled_from([1e-3, 0.3, 3.0, 1e3]), st.integers(1, 4))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_record_more_moves_the_sum_by_the_clip_at_most(
    tiny_llama: Path, count: int, clip: float, limit: int
) -> None:
    """And by itself alone: the other records' parts stay as they were, whatever the chunks."""
    task, model = CausalLM(), loaded(tiny_llama, CausalLM())
    batch = examples_of(count + 1, seed=count)
    with_it = total_of(model, task, batch, steps_of(clip=clip, limit=limit))
    without = total_of(model, task, batch[:-1], steps_of(clip=clip))
    alone = total_of(model, task, batch[-1:], steps_of(clip=clip))
    moved = {name: with_it[name] - without[name] for name in with_it}
    assert 0 < size_of(moved) <= clip * (1 + 1e-9)
    assert size_of({name: moved[name] - alone[name] for name in moved}) < 1e-9 * clip


def test_the_loss_of_a_row_is_its_own_mean_not_the_batchs(tiny_llama: Path) -> None:
    """Two rows of 3 and 9 tokens: a mean over all tokens would weigh the second thrice."""
    task, model = CausalLM(), loaded(tiny_llama, CausalLM())
    rows = [{"input_ids": [5] * n, "labels": [5] * n} for n in (3, 9)]
    apart = [total_of(model, task, [row], steps_of(clip=1e6)) for row in rows]
    both = total_of(model, task, rows, steps_of(clip=1e6))
    for name, tensor in both.items():
        assert torch.allclose(tensor, apart[0][name] + apart[1][name], atol=1e-12)


def test_a_units_rows_are_added_before_they_are_clipped(tiny_bert: Path) -> None:
    """Whatever is held at once; a unit of many rows moves the sum by the clip at most."""
    task, model = Classification(), loaded(tiny_bert, Classification())
    batch, clip = examples_of(7), 0.5
    units = [[0, 0, 0, 0, 4, 6, 6]]
    alone = [total_of(model, task, [row], steps_of(clip=1e6)) for row in batch]
    expected = {name: torch.zeros_like(tensor) for name, tensor in alone[0].items()}
    for rows in ((0, 1, 2, 3), (4,), (5, 6)):
        unit = {name: sum(alone[row][name] for row in rows) for name in expected}
        factor = min(1.0, clip / size_of(unit))  # type: ignore[arg-type]
        expected = {name: tensor + factor * unit[name] for name, tensor in expected.items()}
    for limit in (1, 2, 3, 64):
        found = total_of(model, task, batch, steps_of(clip=clip, units=units, limit=limit))
        off = size_of({name: found[name] - expected[name] for name in expected})
        assert off < 1e-5 * size_of(expected)


@given(st.lists(st.integers(1, 5), max_size=9), st.integers(1, 7))
def test_chunks_hold_every_row_once_and_no_more_than_the_limit(runs: list[int], limit: int) -> None:
    units = [10 * unit for unit, count in enumerate(runs) for _ in range(count)]
    found = chunks(units, limit)
    assert [row for c in found for row in range(c.start, c.stop)] == list(range(len(units)))
    assert all(c.stop - c.start <= limit and c.units <= limit for c in found)
    # Added up chunk by chunk, every unit is seen whole.
    total = ClippedSum({"w": torch.Size([len(units) or 1])}, 1e9)
    for chunk in found:
        total.add(
            {"w": torch.eye(len(units), dtype=torch.float64)[chunk.start : chunk.stop]}, chunk
        )
    assert total.total["w"].tolist() == [1.0] * len(units) or not units
    clipped = ClippedSum({"w": torch.Size([len(units) or 1])}, 0.25)
    for chunk in found:
        rows = torch.ones(len(units), 1, dtype=torch.float64)[chunk.start : chunk.stop]
        clipped.add({"w": rows.expand(-1, len(units))}, chunk)
    if units:
        assert float(clipped.total["w"].norm()) == pytest.approx(0.25 * len(runs), rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_what_cannot_be_bounded_brings_nothing(value: float) -> None:
    total = ClippedSum({"v": torch.Size([1]), "w": torch.Size([2])}, 1.0)
    rows = {
        "v": torch.tensor([[0.0], [value], [0.0], [0.0]], dtype=torch.float64),
        "w": torch.tensor([[0.5, 0], [0.1, 0.1], [0, 0], [0, 1e30]], dtype=torch.float64),
    }
    total.add(rows, chunks(range(4), 4)[0])
    assert total.left_out == 1
    assert total.total["v"].tolist() == [0.0]
    assert total.total["w"].tolist() == pytest.approx([0.5, 1.0], rel=1e-5)


def test_a_square_that_overflows_float32_is_clipped_all_the_same() -> None:
    total = ClippedSum({"w": torch.Size([1])}, 2.0)
    total.add({"w": torch.tensor([[1e30]])}, chunks(range(1), 1)[0])
    assert total.total["w"].item() == pytest.approx(2.0, rel=1e-5)


@dataclass(frozen=True)
class Broken(Classification):
    """One label's rows have no finite loss."""

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        scores = super().scores(model, batch)
        bad = torch.where(batch["labels"] == 2, math.nan, 1.0)
        return {**scores, "loss": scores["loss"] * bad}


def job(plan: Plan, batches: list[list[Example]], **changes: object) -> tuple[Plan, Work]:
    return plan, Work(batches, [0.01] * len(batches), 1, steps_of(**changes))


def test_a_record_without_a_finite_gradient_is_left_out_in_both_engines(tiny_bert: Path) -> None:
    """To stop the round instead would tell everybody of it."""
    task, train = Broken(), TrainSettings()
    model = loaded(tiny_bert, task)
    plan, rows = start_of(model), examples_of(6)
    clean = [row for row in rows if row["label"] != [2]]
    assert 0 < len(clean) < len(rows)
    expected = training.train(model, task, *job(plan, [clean, clean]), train)
    mixed = job(plan, [rows, rows])
    (together,) = vectorized.train(model, task, [mixed], train)
    assert isinstance(together, Trained)
    for done in (training.train(model, task, *mixed, train), together):
        for group, tensors in expected.state.items():
            for name, tensor in tensors.items():
                assert torch.allclose(done.state[group][name], tensor, atol=1e-9)


def test_noise_has_its_size_and_is_all_that_an_empty_step_has(tiny_bert: Path) -> None:
    """sigma / denominator in each of thousands of coordinates, one step like another."""
    task, model = Classification(), loaded(tiny_bert, Classification())
    steps = steps_of(sigma=3.0, denominator=8.0)
    empty = total_of(model, task, [], steps)
    assert size_of(empty) == 0
    drawn_noise = [steps.noised(empty, step) for step in (0, 1)]
    values = [torch.cat([t.flatten() for t in noise.values()]) for noise in drawn_noise]
    count = len(values[0])
    for own in values:
        # A variance of n draws has relative deviation sqrt(2 / n); five of them.
        assert abs(float(own.square().mean()) / (3 / 8) ** 2 - 1) < 5 * math.sqrt(2 / count)
        assert abs(float(own.mean())) < 5 * (3 / 8) / math.sqrt(count)
    correlation = float(values[0] @ values[1]) / (3 / 8) ** 2 / count
    assert abs(correlation) < 5 / math.sqrt(count)
    batch = examples_of(5)
    full = total_of(model, task, batch, steps)
    noisy = steps.noised(full, 0)
    for name, tensor in noisy.items():
        assert torch.allclose(tensor - full[name] / 8, drawn_noise[0][name], atol=1e-5)


def test_an_empty_step_is_taken_in_both_engines(tiny_bert: Path) -> None:
    """Adam's first step moves every trained entry by its rate, whatever the noise."""
    task, train = Classification(), TrainSettings(max_grad_norm=0.0)
    model = loaded(tiny_bert, task)
    plan = start_of(model)
    empty = job(plan, [[]])
    (together,) = vectorized.train(model, task, [empty], train)
    assert isinstance(together, Trained)
    for done in (training.train(model, task, *empty, train), together):
        assert (done.sums, done.tokens, done.computed) == ({}, 0, 0)
        for group, tensors in plan.start.items():
            for name, tensor in tensors.items():
                moved = (done.state[group][name] - tensor).abs()
                assert torch.allclose(moved, torch.full_like(moved, 0.01), rtol=1e-3)


def test_the_same_inputs_give_the_same_bytes_and_nothing_global_matters(tiny_bert: Path) -> None:
    task, train = Classification(), TrainSettings()
    model = loaded(tiny_bert, task, "float32")
    plan, batches = start_of(model), [examples_of(4), examples_of(3, 1)]
    found = []
    for seed, context in ((1, ("run", 1)), (2, ("run", 1)), (1, ("run", 2))):
        torch.manual_seed(seed)
        done = training.train(model, task, *job(plan, batches, context=context), train)
        found.append(digest(done.state))
    assert found[0] == found[1] != found[2]


@given(st.integers(1, 40), st.floats(0.05, 0.9), st.integers(0, 3))
def test_draws_are_whole_units_in_order(count: int, rate: float, most: int) -> None:
    units = [[3 * u + k for k in range(u % 4)] for u in range(count)]
    first = list(drawn(units, rate, 5, most, KEY, "run", 1))
    assert first == list(drawn(units, rate, 5, most, KEY, "run", 1))
    for rows, whose in first:
        assert whose == sorted(whose)
        for unit in set(whose):
            own = [row for row, of in zip(rows, whose, strict=True) if of == unit]
            assert own == sorted(set(own))
            assert set(own) <= set(units[unit])
            assert len(own) == min(len(units[unit]), most or len(units[unit]))


def test_draws_are_poissons_and_secret() -> None:
    """Sizes of 400 draws of 200 units at 1/8 are binomial; another key or round draws others."""
    units = [[row] for row in range(200)]
    steps = list(drawn(units, 1 / 8, 400, 0, KEY, "run", 1))
    sizes = [len(rows) for rows, _ in steps]
    assert abs(statistics.mean(sizes) - 25) < 5 * math.sqrt(25 * 7 / 8 / 400)
    assert abs(statistics.variance(sizes) / (25 * 7 / 8) - 1) < 5 * math.sqrt(2 / 400)
    shares = [sum(row in rows for rows, _ in steps) / 400 for row in range(200)]
    assert all(abs(share - 1 / 8) < 5 * math.sqrt(7 / 64 / 400) for share in shares)
    for key, context in ((bytes(32), ("run", 1)), (KEY, ("run", 2))):
        assert list(drawn(units, 1 / 8, 400, 0, key, *context)) != steps
    assert [rows for rows, _ in drawn(units, 1.0, 2, 0, KEY)] == [list(range(200))] * 2


def test_rows_of_a_bounded_unit_are_chosen_anew() -> None:
    chosen = {tuple(rows) for rows, _ in drawn([list(range(5))], 1.0, 40, 2, KEY)}
    assert len(chosen) > 5


def test_what_cannot_be_told_apart_is_refused(tiny_bert: Path) -> None:
    model = loaded(tiny_bert, Classification(), dora=True)
    with pytest.raises(RecipeError, match=r"cannot bound what a record does to '.*magnitude"):
        per_example.require(model)
    model = loaded(tiny_bert, Classification())
    per_example.require(model)
    inner = model.module.get_base_model().backbone.encoder.layer[0]
    usual = inner.attention
    inner.attention = nn.Sequential(usual, nn.BatchNorm1d(4))
    try:
        with pytest.raises(RecipeError, match=r"layer '.*attention\.1' normalises a batch"):
            per_example.require(model)
    finally:
        inner.attention = usual


def test_a_layer_that_sees_no_rows_is_refused(tiny_bert: Path) -> None:
    """As an expert does, which gets tokens of several rows."""
    task, model = Classification(), loaded(tiny_bert, Classification())
    part = model.module.get_base_model().backbone.encoder.layer[0].intermediate.dense
    usual = part.forward
    part.forward = lambda x: usual(x.flatten(0, 1)).view(*x.shape[:-1], -1)
    try:
        with pytest.raises(RecipeError, match="cannot tell rows apart"):
            total_of(model, task, examples_of(3), steps_of())
    finally:
        del part.forward


def test_a_model_driven_out_of_bounds_voids_the_round(tiny_bert: Path) -> None:
    task, train = Classification(), TrainSettings()
    model = loaded(tiny_bert, task, "float32")
    plan = start_of(model)
    largest = torch.finfo(torch.float32).max
    head = {n: torch.full_like(p, largest) for n, p in model.tensors["head"].items()}
    _, work = job(plan, [[]])
    wild = replace(plan, start={**plan.start, "head": head}), replace(work, rates=[1e37])
    with pytest.raises(FloatingPointError, match="after noisy steps"):
        training.train(model, task, *wild, train)
    (outcome,) = vectorized.train(model, task, [wild], train)
    assert isinstance(outcome, FloatingPointError)
