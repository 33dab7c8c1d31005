"""The slow, obvious definition against plain PyTorch and against itself."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune import models
from fedtune.adapter import State, digest, norm, subtract
from fedtune.config import AdapterSettings, ModelSettings, TrainSettings
from fedtune.models import Model
from fedtune.strategies.strategy import Plan
from fedtune.tasks import Classification
from fedtune.training import Work, batches_of, evaluate, rates_of, train

TASK = Classification()
LABELS = ("a", "b", "c")
SETTINGS = TrainSettings(learning_rate=0.01, batch_size=3)


@pytest.fixture
def model(tiny_bert: Path) -> Model:
    settings = ModelSettings(name=str(tiny_bert), device="cpu", dtype="float64")
    return models.load(TASK, settings, AdapterSettings(rank=2), LABELS, 0)


def examples_of(count: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": [2, *range(4, 5 + i % 5), 3], "label": [i % 3]} for i in range(count)]


def plan_of(state: State, drop: str = "") -> Plan:
    names = [name for group in state.values() for name in group if not (drop and drop in name)]
    return Plan(state, frozenset(names))


def work_of(examples: list[dict[str, list[int]]], settings: TrainSettings, round: int = 1) -> Work:
    batches = batches_of(examples, settings, 0, "batches", round)
    return Work(batches, rates_of(len(batches), round, 5, settings), seed=1)


def test_it_is_plain_adamw(model: Model) -> None:
    """The same steps written out with PEFT's own module and torch's optimizer, in float64."""
    start, work = models.initial(model, 0), work_of(examples_of(10), SETTINGS)
    done = train(model, TASK, plan_of(start), work, SETTINGS)
    trained, sums = done.state, done.sums

    models.write(model, start)
    parameters = [p for group in model.tensors.values() for p in group.values()]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    for batch in work.batches:
        optimizer.zero_grad()
        inputs = TASK.collate(batch, model.pad)
        logits = model.module(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits
        torch.nn.functional.cross_entropy(logits, inputs["labels"]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    expected = models.read(model)
    for group in expected:
        assert norm(subtract(trained[group], expected[group])) < 1e-10
    assert sums["accuracy"][1] == 10


def test_only_what_the_plan_names_is_trained(model: Model) -> None:
    start = models.initial(model, 0)
    work = work_of(examples_of(6), SETTINGS)
    trained = train(model, TASK, plan_of(start, "lora_A"), work, SETTINGS).state
    for name, tensor in trained["adapter"].items():
        assert torch.equal(tensor, start["adapter"][name]) == ("lora_A" in name)
    assert not torch.equal(
        *(s["head"]["base_model.model.classifier.weight"] for s in (trained, start))
    )


def test_a_client_leaves_no_trace_for_the_next(model: Model) -> None:
    start, work = models.initial(model, 0), work_of(examples_of(7), SETTINGS)
    first = train(model, TASK, plan_of(start), work, SETTINGS).state
    other = work_of(examples_of(11), SETTINGS, 2)
    train(model, TASK, plan_of(models.initial(model, 9), "lora_A"), other, SETTINGS)
    again = train(model, TASK, plan_of(start), work, SETTINGS).state
    assert digest(first) == digest(again)


def test_dropout_is_the_clients_own(tiny_bert: Path) -> None:
    settings = ModelSettings(name=str(tiny_bert), device="cpu")
    model = models.load(TASK, settings, AdapterSettings(rank=2, dropout=0.5), LABELS, 0)
    start, work = models.initial(model, 0), work_of(examples_of(6), SETTINGS)
    torch.manual_seed(1)
    first = train(model, TASK, plan_of(start), work, SETTINGS).state
    torch.manual_seed(2)
    again = train(model, TASK, plan_of(start), work, SETTINGS).state
    other = train(model, TASK, plan_of(start), replace(work, seed=2), SETTINGS).state
    assert digest(first) == digest(again) != digest(other)


def test_the_proximal_term_holds_a_client_back(model: Model) -> None:
    start, examples = models.initial(model, 0), examples_of(9)
    moved = []
    for mu in (0.0, 1.0, 100.0):
        settings = replace(SETTINGS, proximal=mu, steps=20)
        trained = train(model, TASK, plan_of(start), work_of(examples, settings), settings).state
        moved.append(norm(subtract(trained["adapter"], start["adapter"])))
    assert moved[0] > moved[1] > moved[2] > 0


def test_gradient_checkpointing_changes_nothing(model: Model) -> None:
    start, work = models.initial(model, 0), work_of(examples_of(5), SETTINGS)
    plain = train(model, TASK, plan_of(start), work, SETTINGS).state
    settings = replace(SETTINGS, gradient_checkpointing=True)
    checkpointed = train(model, TASK, plan_of(start), work, settings).state
    for group in plain:
        assert norm(subtract(plain[group], checkpointed[group])) < 1e-10


def test_a_loss_that_is_not_finite_voids_the_round(model: Model) -> None:
    start = models.initial(model, 0)
    broken = {**start, "head": {k: v * float("inf") for k, v in start["head"].items()}}
    with pytest.raises(FloatingPointError, match="loss became"):
        train(model, TASK, plan_of(broken), work_of(examples_of(3), SETTINGS), SETTINGS)


def test_evaluation_does_not_depend_on_the_batch_size(model: Model) -> None:
    state, examples = models.initial(model, 3), examples_of(11)
    whole = evaluate(model, TASK, plan_of(state), examples, 11)
    single = evaluate(model, TASK, plan_of(state), examples, 1)
    assert whole["loss"] == pytest.approx(single["loss"], rel=1e-12)
    assert {k: v for k, v in whole.items() if k != "loss"} == {
        k: v for k, v in single.items() if k != "loss"
    }
    assert evaluate(model, TASK, plan_of(state), [], 4) == {}


@given(st.integers(1, 20), st.integers(1, 7), st.integers(1, 3))
def test_an_epoch_shows_every_example_once(count: int, size: int, epochs: int) -> None:
    examples = [{"input_ids": [i]} for i in range(count)]
    settings = TrainSettings(batch_size=size, epochs=epochs)
    batches = batches_of(examples, settings, 0, "x")
    assert len(batches) == epochs * math.ceil(count / size)
    seen = sorted(e["input_ids"][0] for batch in batches for e in batch)
    assert seen == sorted(list(range(count)) * epochs)
    assert batches == batches_of(examples, settings, 0, "x")


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 7))
def test_grouping_by_length_shows_the_same_examples_with_less_padding(
    lengths: list[int], size: int
) -> None:
    examples = [{"input_ids": [i] * length} for i, length in enumerate(lengths)]

    def padded(grouped: bool) -> int:
        settings = TrainSettings(batch_size=size, group_by_length=grouped)
        batches = batches_of(examples, settings, 0, "x")
        assert sorted(e["input_ids"][0] for b in batches for e in b) == list(range(len(lengths)))
        assert sum(len(batch) < size for batch in batches) <= 1
        return sum(len(batch) * max(len(e["input_ids"]) for e in batch) for batch in batches)

    ordered = sorted(lengths)
    groups = [ordered[k : k + size] for k in range(0, len(ordered), size)]
    assert padded(True) == sum(len(group) * max(group) for group in groups)
    if len(lengths) % size == 0:  # a short batch may by chance hold the longest row alone
        assert padded(True) <= padded(False)


@given(st.integers(0, 9), st.integers(1, 7), st.integers(1, 12))
def test_steps_are_counted_exactly(count: int, size: int, steps: int) -> None:
    examples = [{"input_ids": [i]} for i in range(count)]
    batches = batches_of(examples, TrainSettings(batch_size=size, steps=steps), 0)
    assert len(batches) == (steps if count else 0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_schedule_runs_over_the_whole_run(schedule: str) -> None:
    """Four rounds of five steps are one ramp of twenty: 1 - t and (1 + cos pi t) / 2."""
    settings = TrainSettings(learning_rate=2.0, schedule=schedule)
    rates = [rate for round in (1, 2, 3, 4) for rate in rates_of(5, round, 4, settings)]
    expected = {
        "constant": [2.0] * 20,
        "linear": [2.0 * (1 - k / 20) for k in range(20)],
        "cosine": [1 + math.cos(math.pi * k / 20) for k in range(20)],
    }[schedule]
    assert rates == pytest.approx(expected)
