"""A cohort trained at once is the same computation as its clients trained one after another."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune import models, training, vectorized
from fedtune.adapter import State, norm, subtract
from fedtune.config import AdapterSettings, ModelSettings, TrainSettings
from fedtune.models import Model
from fedtune.strategies.strategy import Plan
from fedtune.tasks import CausalLM, Classification, Task
from fedtune.training import Work, batches_of, rates_of
from fedtune.vectorized import Job

LABELS = ("a", "b", "c")


@pytest.fixture(params=["tiny_bert", "tiny_llama", "tiny_gpt2"])
def case(request: pytest.FixtureRequest) -> tuple[Task, ModelSettings, tuple[str, ...]]:
    folder: Path = request.getfixturevalue(request.param)
    task: Task = Classification() if request.param == "tiny_bert" else CausalLM()
    model = ModelSettings(name=str(folder), device="cpu", dtype="float64")
    return task, model, LABELS if request.param == "tiny_bert" else ()


def job_of(model: Model, seed: int, rows: int, train: TrainSettings, frozen: str = "") -> Job:
    """A client with its own start, its own rows of uneven lengths and its own steps."""
    start = models.initial(model, seed)
    for group in start.values():
        for tensor in group.values():
            tensor.add_(
                0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
            )
    examples = []
    for i in range(rows):
        ids = [2, *[4 + (seed + i * k) % 40 for k in range(1, 3 + (seed * i) % 6)], 3]
        examples.append({"input_ids": ids, "label": [(seed + i) % 3], "labels": ids})
    batches = batches_of(examples, train, seed, "batches")
    rates = [rate * (1 + seed % 3) for rate in rates_of(len(batches), 1, 2, train)]
    names = [n for group in start.values() for n in group if not (frozen and frozen in n)]
    return Plan(start, frozenset(names)), Work(batches, rates, seed=seed)


def difference(one: State, other: State) -> float:
    assert one.keys() == other.keys()
    moved = math.sqrt(sum(norm(subtract(one[g], other[g])) ** 2 for g in one))
    return moved / math.sqrt(sum(norm(one[g]) ** 2 for g in one))


def compare(model: Model, task: Task, jobs: list[Job], train: TrainSettings, bound: float) -> None:
    assert vectorized.obstacle(model, train, jobs) == ""
    together = vectorized.train(model, task, jobs, train)
    for job, outcome in zip(jobs, together, strict=True):
        state, sums = training.train(model, task, *job, train)
        assert isinstance(outcome, tuple)
        assert difference(outcome[0], state) < bound
        assert outcome[1].keys() == sums.keys()
        for name, values in sums.items():
            assert outcome[1][name] == pytest.approx(values, rel=1e-6)


OPTIONS = [
    TrainSettings(learning_rate=0.01, batch_size=3),
    TrainSettings(learning_rate=0.01, batch_size=4, epochs=2, weight_decay=0.1, schedule="linear"),
    TrainSettings(learning_rate=0.01, batch_size=3, max_grad_norm=0.01, proximal=0.5),
    TrainSettings(learning_rate=0.02, batch_size=2, max_grad_norm=0.0, group_by_length=True),
]


@pytest.mark.parametrize("train", OPTIONS, ids=["plain", "decay", "clip and proximal", "grouped"])
def test_unequal_clients_end_where_they_would_alone(
    case: tuple[Task, ModelSettings, tuple[str, ...]], train: TrainSettings
) -> None:
    """In float64 to 1e-10, from 1 to 11 rows: some finish early, some fill up their batches."""
    task, settings_, labels = case
    model = models.load(task, settings_, AdapterSettings(rank=2), labels, 0)
    jobs = [job_of(model, seed, rows, train) for seed, rows in enumerate((5, 11, 1, 8))]
    compare(model, task, jobs, train, 1e-10)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 4))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_drawn_cohorts(tiny_bert: Path, sizes: list[int], batch_size: int) -> None:
    task = Classification()
    model = models.load(
        task,
        ModelSettings(name=str(tiny_bert), device="cpu", dtype="float64"),
        AdapterSettings(rank=2),
        LABELS,
        0,
    )
    train = TrainSettings(learning_rate=0.01, batch_size=batch_size)
    jobs = [job_of(model, 7 * seed, rows, train) for seed, rows in enumerate(sizes)]
    compare(model, task, jobs, train, 1e-10)


def test_float32_differs_by_rounding_only(tiny_bert: Path) -> None:
    task, train = Classification(), OPTIONS[0]
    settings_ = ModelSettings(name=str(tiny_bert), device="cpu")
    model = models.load(task, settings_, AdapterSettings(rank=2), LABELS, 0)
    jobs = [job_of(model, seed, rows, train) for seed, rows in enumerate((5, 9, 4))]
    compare(model, task, jobs, train, 1e-4)


def test_each_client_trains_what_its_plan_names(
    case: tuple[Task, ModelSettings, tuple[str, ...]],
) -> None:
    task, settings_, labels = case
    train = replace(OPTIONS[1], epochs=1)
    model = models.load(task, settings_, AdapterSettings(rank=2), labels, 0)
    frozen = ["lora_A", "", "lora_B"]
    jobs = [job_of(model, seed, 5 + seed, train, frozen[seed]) for seed in range(3)]
    compare(model, task, jobs, train, 1e-10)
    outcomes = vectorized.train(model, task, jobs, train)
    for (plan, _), outcome in zip(jobs, outcomes, strict=True):
        assert isinstance(outcome, tuple)
        for name, tensor in outcome[0]["adapter"].items():
            assert torch.equal(tensor, plan.start["adapter"][name]) == (name not in plan.trainable)


def test_one_clients_ruin_is_its_own(tiny_bert: Path) -> None:
    task, train = Classification(), OPTIONS[0]
    settings_ = ModelSettings(name=str(tiny_bert), device="cpu", dtype="float64")
    model = models.load(task, settings_, AdapterSettings(rank=2), LABELS, 0)
    jobs = [job_of(model, seed, 6, train) for seed in range(3)]
    jobs[1][0].start["adapter"][next(iter(jobs[1][0].start["adapter"]))].fill_(math.nan)
    first, ruined, last = vectorized.train(model, task, jobs, train)
    assert isinstance(ruined, FloatingPointError)
    for job, outcome in ((jobs[0], first), (jobs[2], last)):
        assert isinstance(outcome, tuple)
        assert difference(outcome[0], training.train(model, task, *job, train)[0]) < 1e-10


@pytest.mark.parametrize(
    ("adapter", "train"),
    [
        (AdapterSettings(rank=2, dropout=0.1), OPTIONS[0]),
        (AdapterSettings(rank=2, dora=True), OPTIONS[0]),
        (AdapterSettings(rank=2), replace(OPTIONS[0], gradient_checkpointing=True)),
    ],
)
def test_what_cannot_be_stacked_is_trained_one_after_another(
    tiny_bert: Path, adapter: AdapterSettings, train: TrainSettings
) -> None:
    task = Classification()
    settings_ = ModelSettings(name=str(tiny_bert), device="cpu", dtype="float64")
    model = models.load(task, settings_, adapter, LABELS, 0)
    jobs = [job_of(model, seed, 4, train) for seed in range(2)]
    assert vectorized.obstacle(model, train, jobs)
    for job, outcome in zip(jobs, vectorized.train(model, task, jobs, train), strict=True):
        assert isinstance(outcome, tuple)
        assert difference(outcome[0], training.train(model, task, *job, train)[0]) == 0.0
    models.load.cache_clear()  # checkpointing stays on in a resident model
