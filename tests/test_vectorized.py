"""A cohort trained at once is the same computation as its clients trained one after another."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune import models, training, trunk, vectorized
from fedtune.adapter import Adapter, State, norm, subtract
from fedtune.config import AdapterSettings, ModelSettings, TrainSettings
from fedtune.lowrank import products
from fedtune.models import Model
from fedtune.privacy.steps import Steps
from fedtune.strategies.strategy import Plan
from fedtune.tasks import CausalLM, Classification, Task
from fedtune.training import Trained, Work, batches_of, rates_of
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
    """With and without padding, together is alone."""
    assert vectorized.obstacle(model, jobs) == ""
    alone = [training.train(model, task, *job, train) for job in jobs]
    for unpadded in (True, False):
        together = vectorized.train(model, task, jobs, train, unpadded)
        for (plan, _), one, outcome in zip(jobs, alone, together, strict=True):
            assert isinstance(outcome, Trained)
            assert difference(outcome.state, one.state) < bound
            passes = 1 if plan.keep == 1 else 2
            assert outcome.tokens == one.tokens <= outcome.computed
            assert passes * outcome.tokens == outcome.computed or not unpadded
            assert outcome.sums.keys() == one.sums.keys()
            for name, values in one.sums.items():
                assert outcome.sums[name] == pytest.approx(values, rel=1e-6)


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


@pytest.mark.parametrize("folder", ["tiny_bert", "tiny_llama", "tiny_gpt2"])
def test_the_heads_that_models_bring_are_each_clients_own(
    folder: str, request: pytest.FixtureRequest
) -> None:
    """BERT's pooler, adapted and read at the first token; decoders read at a row's last one."""
    task, train = Classification(pooling="model"), OPTIONS[1]
    name = str(request.getfixturevalue(folder))
    settings_ = ModelSettings(name=name, device="cpu", dtype="float64")
    model = models.load(task, settings_, AdapterSettings(rank=2), LABELS, 0)
    jobs = [job_of(model, seed, rows, train) for seed, rows in enumerate((5, 9, 4))]
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


def ranked(job: Job, rank: int) -> Job:
    """The same client with an adapter of lower rank."""
    plan, work = job
    adapter = {
        name: tensor[:rank] if "lora_A" in name else tensor[:, :rank].contiguous()
        for name, tensor in plan.start["adapter"].items()
    }
    return replace(plan, start={**plan.start, "adapter": adapter}), work


def corrected(job: Job, seed: int) -> Job:
    """The same client with a correction of every gradient but one, as SCAFFOLD has it."""
    plan, work = job
    draws = torch.Generator().manual_seed(seed)
    adapter = plan.start["adapter"]
    correction = {
        name: torch.randn(tensor.shape, generator=draws, dtype=tensor.dtype)
        for name, tensor in list(adapter.items())[1:]
    }
    return replace(plan, correction=correction), work


def stacked_base(plan: Plan, seed: int) -> Adapter:
    """A change of every adapted layer's frozen weights, of rank 3."""
    draws, base = torch.Generator().manual_seed(seed), {}
    for name, tensor in plan.start["adapter"].items():
        shape = (3, tensor.shape[1]) if "lora_A" in name else (tensor.shape[0], 3)
        base[name] = 0.3 * torch.randn(shape, generator=draws, dtype=tensor.dtype)
    return base


def wider(job: Job, extra: int, seed: int) -> Job:
    """The same client with more ranks than the recipe's adapter, on the same scaling."""
    plan, work = job
    draws, adapter = torch.Generator().manual_seed(seed), {}
    for name, tensor in plan.start["adapter"].items():
        shape = (extra, tensor.shape[1]) if "lora_A" in name else (tensor.shape[0], extra)
        more = 0.3 * torch.randn(shape, generator=draws, dtype=tensor.dtype)
        adapter[name] = torch.cat([tensor, more], dim=0 if "lora_A" in name else 1)
    return replace(plan, start={**plan.start, "adapter": adapter}), work


def cored(job: Job, seed: int, kinds: tuple[str, ...], frozen: str = "lora_") -> Job:
    """The same client with a core of two heads in every module, and some tensors frozen."""
    plan, work = job
    draws, core = torch.Generator().manual_seed(seed), {}
    for module, product in products(plan.start["adapter"]):
        shape = {"blocks": (2, len(product.A) // 2, len(product.A) // 2), "scales": (2,)}
        for kind in kinds:
            drawn = torch.randn(shape[kind], generator=draws, dtype=product.A.dtype)
            core[f"{module}.core.{kind}"] = drawn
    names = {*plan.trainable, *core}
    trainable = frozenset(name for name in names if not (frozen and frozen in name))
    return replace(plan, start={**plan.start, "core": core}, trainable=trainable), work


def masked(job: Job, seed: int) -> Job:
    """The same client, a third of whose entries are frozen; of lora_A whole ranks."""
    plan, work = job
    draws, mask = torch.Generator().manual_seed(seed), {}
    for group in plan.start.values():
        for name, tensor in group.items():
            shape = (len(tensor), 1) if "lora_A" in name else tensor.shape
            mask[name] = (torch.rand(shape, generator=draws) > 0.33).to(tensor.dtype)
    return replace(plan, mask=mask), work


def noisy(job: Job, clip: float, limit: int = 64) -> Job:
    """The same client with clipped and noisy steps; of its second step nobody is drawn."""
    plan, work = job
    context = ("run", "", 1, str(work.seed), "inputs")
    private = Steps(clip, 3.0, 0.5 * clip, bytes(32), context, limit=limit)
    batches = [batch if step != 1 else [] for step, batch in enumerate(work.batches)]
    return plan, replace(work, batches=batches, private=private)


def in_units(job: Job, clip: float) -> Job:
    """Noisy, with units of one to three rows, of whose gradients two are held at once."""
    plan, work = noisy(job, clip, limit=2)
    assert work.private
    units = [[(row + len(batch)) // 3 for row in range(len(batch))] for batch in work.batches]
    return plan, replace(work, private=replace(work.private, units=units))


CHANGES: dict[str, Callable[[int, Job], Job]] = {
    "rank": lambda i, job: ranked(job, (4, 1, 3)[i]),
    "correction": lambda i, job: corrected(job, i) if i else job,
    "penalty": lambda i, job: (replace(job[0], penalty=0.1 * i, tail=3 - i), job[1]),
    "scale": lambda i, job: (replace(job[0], scale=(1.0, 2.5, 0.5)[i]), job[1]),
    "base": lambda _, job: (replace(job[0], base=stacked_base(job[0], 1)), job[1]),
    "noise": lambda i, job: noisy(job, 0.02 * (i + 1)),
    "noise, chunks": lambda i, job: noisy(job, 0.02 * (i + 1), limit=i + 1),
    "noise, units": lambda i, job: in_units(job, 0.02 * (i + 1)),
    "noise, rank": lambda i, job: noisy(ranked(job, (4, 1, 3)[i]), 0.02),
    "noise, penalty": lambda i, job: noisy(
        (replace(job[0], penalty=0.5 * i, tail=3 - i), job[1]), 0.02
    ),
    "noise, correction": lambda i, job: noisy(corrected(job, i), 0.02),
    "noise, checkpointing": lambda i, job: noisy(job, 0.02 * (i + 1)),
    "checkpointing": lambda _, job: job,
    "more ranks": lambda i, job: wider(job, (0, 3, 1)[i], i),
    "mask": lambda i, job: masked(job, i) if i else job,
    "mask, correction": lambda i, job: masked(corrected(job, i), i),
    "mask, noise": lambda i, job: noisy(masked(job, i), 0.02 * (i + 1)),
    "mask, more ranks": lambda i, job: masked(wider(job, (0, 3, 1)[i], i), i),
    "keep": lambda i, job: (replace(job[0], keep=(1.0, 0.5, 0.1)[i]), job[1]),
    "blocks": lambda i, job: cored(job, i, ("blocks",)),
    "scales": lambda i, job: cored(job, i, ("scales",), ""),
    "blocks, scales": lambda i, job: cored(
        job, i, ("blocks", "scales"), ("", "lora_A", "lora_")[i]
    ),
    "core, checkpointing": lambda i, job: cored(job, i, ("blocks", "scales")),
    "blocks, noise": lambda i, job: noisy(cored(job, i, ("blocks",)), 0.02 * (i + 1)),
    "core, noise": lambda i, job: noisy(cored(job, i, ("blocks", "scales"), ""), 0.02 * (i + 1)),
    "scales, noise": lambda i, job: noisy(cored(job, i, ("scales",)), 0.02 * (i + 1)),
    "frozen core": lambda i, job: cored(job, i, ("scales",), "core"),
    "core, more ranks": lambda i, job: cored(wider(job, 2, i), i, ("blocks", "scales"), ""),
}


@pytest.mark.parametrize("option", CHANGES)
def test_every_option_of_a_plan_is_the_same_together(
    case: tuple[Task, ModelSettings, tuple[str, ...]], option: str
) -> None:
    """Each option makes a difference, and the same one, in float64 to 1e-10."""
    task, settings_, labels = case
    train = replace(OPTIONS[1], epochs=1, gradient_checkpointing="checkpointing" in option)
    model = models.load(task, settings_, AdapterSettings(rank=4), labels, 0)
    plain = [job_of(model, seed, rows, train) for seed, rows in enumerate((5, 9, 4))]
    jobs = [CHANGES[option](i, job) for i, job in enumerate(plain)]
    trained = {id(p) for tensors in model.tensors.values() for p in tensors.values()}
    frozen = [p for p in model.module.parameters() if id(p) not in trained]
    weights = [p.detach().clone() for p in frozen]
    compare(model, task, jobs, train, 1e-10)
    assert all(torch.equal(now, was) for now, was in zip(frozen, weights, strict=True))
    if option not in ("rank", "checkpointing"):
        unchanged = vectorized.train(model, task, plain, train)[1]
        changed = vectorized.train(model, task, jobs, train)[1]
        assert isinstance(unchanged, Trained)
        assert isinstance(changed, Trained)
        if "noise" in option:
            plan, work = jobs[1]
            assert work.private
            keyed = replace(work, private=replace(work.private, key=bytes(range(32))))
            assert difference(training.train(model, task, plan, keyed, train).state, changed.state)
            assert changed.sums == {}
        else:
            assert changed.sums["loss"] != pytest.approx(unchanged.sums["loss"], rel=1e-5)


def test_bfloat16_bases_differ_by_their_rounding_only(tiny_llama: Path) -> None:
    """Of the losses: AdamW makes a whole step of a gradient's last bit, where it is near zero."""
    task, train = CausalLM(), OPTIONS[0]
    settings_ = ModelSettings(name=str(tiny_llama), device="cpu", dtype="bfloat16")
    model = models.load(task, settings_, AdapterSettings(rank=2), (), 0)
    jobs = [job_of(model, seed, rows, train) for seed, rows in enumerate((5, 9, 4))]
    for unpadded in (True, False):
        for job, outcome in zip(
            jobs, vectorized.train(model, task, jobs, train, unpadded), strict=True
        ):
            assert isinstance(outcome, Trained)
            alone = training.train(model, task, *job, train).sums["loss"]
            assert outcome.sums["loss"] == pytest.approx(alone, rel=2e-2)


def test_dropout_is_a_clients_own_whoever_is_trained_beside_it(tiny_bert: Path) -> None:
    """Also where the layers are computed twice, for gradient checkpointing."""
    task, train = Classification(), OPTIONS[0]
    settings_ = ModelSettings(name=str(tiny_bert), device="cpu", dtype="float64")
    model = models.load(task, settings_, AdapterSettings(rank=2, dropout=0.4), LABELS, 0)
    jobs = [job_of(model, seed, rows, train) for seed, rows in enumerate((5, 9, 4))]
    together = vectorized.train(model, task, jobs, train)
    apart = [vectorized.train(model, task, [job], train)[0] for job in jobs]
    twice = vectorized.train(model, task, jobs, replace(train, gradient_checkpointing=True))
    other = [(plan, replace(work, seed=99)) for plan, work in jobs]
    others = vectorized.train(model, task, other, train)
    for one, two, three, four in zip(together, apart, twice, others, strict=True):
        assert isinstance(one, Trained)
        assert isinstance(two, Trained)
        assert isinstance(three, Trained)
        assert isinstance(four, Trained)
        assert difference(one.state, two.state) < 1e-10
        assert difference(one.state, three.state) < 1e-10
        assert difference(one.state, four.state) > 1e-3


@pytest.mark.parametrize("layers", ["top:1", "1"])
def test_a_frozen_prefix_that_is_kept_changes_nothing(
    case: tuple[Task, ModelSettings, tuple[str, ...]],
    layers: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    task, settings_, labels = case
    train = OPTIONS[1]
    models.load.cache_clear()  # a model opens its store once
    model = models.load(task, settings_, AdapterSettings(rank=2, layers=layers), labels, 0)
    assert trunk.frozen_layers(model) == 1
    jobs = [job_of(model, seed, rows, train) for seed, rows in enumerate((5, 9, 4))]
    alone = [training.train(model, task, *job, train) for job in jobs]
    for _ in range(2):  # computed, then read
        for one, outcome in zip(alone, vectorized.train(model, task, jobs, train), strict=True):
            assert isinstance(outcome, Trained)
            assert difference(outcome.state, one.state) < 1e-10
    assert next(iter(tmp_path.rglob("*.data"))).stat().st_size > 0


def test_evaluations_together_are_evaluations_alone(
    case: tuple[Task, ModelSettings, tuple[str, ...]],
) -> None:
    """Clients of one model, of their own, on other frozen weights; one without rows."""
    task, settings_, labels = case
    model = models.load(task, settings_, AdapterSettings(rank=2), labels, 0)
    jobs = [job_of(model, seed, 7 + seed, OPTIONS[0]) for seed in range(4)]
    rows = [[row for batch in work.batches for row in batch] for _, work in jobs]
    first, other = jobs[0][0], jobs[2][0]
    shifted = replace(first, base=other.start["adapter"])
    trials = [*zip([first, first, other, shifted], rows, strict=True), (first, [])]
    for unpadded in (True, False):
        together = vectorized.evaluate(model, task, trials, 4, unpadded)
        assert together[-1] == {}
        assert together[0] != together[3]
        for (plan, own), sums in zip(trials[:-1], together, strict=False):
            alone = training.evaluate(model, task, plan, own, 4)
            assert sums.keys() == alone.keys()
            for name, values in alone.items():
                assert sums[name] == pytest.approx(values, rel=1e-9)


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
        assert isinstance(outcome, Trained)
        for name, tensor in outcome.state["adapter"].items():
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
        assert isinstance(outcome, Trained)
        assert difference(outcome.state, training.train(model, task, *job, train).state) < 1e-10


def test_what_cannot_be_stacked_is_trained_one_after_another(tiny_bert: Path) -> None:
    task, train = Classification(), OPTIONS[0]
    settings_ = ModelSettings(name=str(tiny_bert), device="cpu", dtype="float64")
    model = models.load(task, settings_, AdapterSettings(rank=2, dora=True), LABELS, 0)
    jobs = [job_of(model, seed, 4, train) for seed in range(2)]
    assert "adapter.dora" in vectorized.obstacle(model, jobs)
    for job, outcome in zip(jobs, vectorized.train(model, task, jobs, train), strict=True):
        assert isinstance(outcome, Trained)
        assert difference(outcome.state, training.train(model, task, *job, train).state) == 0.0


def test_cores_of_different_shapes_are_trained_one_after_another(tiny_bert: Path) -> None:
    task, train = Classification(), OPTIONS[0]
    settings_ = ModelSettings(name=str(tiny_bert), device="cpu", dtype="float64")
    model = models.load(task, settings_, AdapterSettings(rank=2), LABELS, 0)
    plain = [job_of(model, seed, 4, train) for seed in range(2)]
    jobs = [cored(wider(job, 2 * i, i), i, ("blocks",)) for i, job in enumerate(plain)]
    assert "cores" in vectorized.obstacle(model, jobs)
    for job, outcome in zip(jobs, vectorized.train(model, task, jobs, train), strict=True):
        assert isinstance(outcome, Trained)
        assert difference(outcome.state, training.train(model, task, *job, train).state) == 0.0
    plan, work = jobs[0]
    odd = replace(plan, start={**plan.start, "core": {"nowhere.core.scales": torch.ones(2)}})
    with pytest.raises(ValueError, match="no adapted layer 'nowhere' for a core"):
        training.train(model, task, odd, work, train)


def test_tokens_are_counted_with_their_padding(tiny_llama: Path) -> None:
    """Rows of 4 and 2, then of 3 tokens: 9 real ones; alone they take 2 x 4 + 3 = 11 places.

    Beside a client with one row of 6 tokens, padded, they take 2 x 6 + 3 = 15; unpadded 9.
    """
    settings_ = ModelSettings(name=str(tiny_llama), device="cpu")
    model = models.load(CausalLM(), settings_, AdapterSettings(rank=2), (), 0)
    start, train = models.initial(model, 0), TrainSettings()
    plan = Plan(start, frozenset(start["adapter"]))

    def job(*batches: list[int]) -> Job:
        rows = [[{"input_ids": [5] * n, "labels": [5] * n} for n in batch] for batch in batches]
        return plan, Work(rows, [0.01] * len(rows), seed=0)

    jobs = [job([4, 2], [3]), job([6])]
    alone = [training.train(model, CausalLM(), *job, train) for job in jobs]
    assert [(one.tokens, one.computed) for one in alone] == [(9, 11), (6, 6)]
    for unpadded, expected in ((True, [(9, 9), (6, 6)]), (False, [(9, 15), (6, 6)])):
        together = vectorized.train(model, CausalLM(), jobs, train, unpadded)
        counted = [(one.tokens, one.computed) for one in together if isinstance(one, Trained)]
        assert counted == expected


@dataclass(frozen=True)
class Limited(Classification):
    """Classification on a machine that holds three rows at once."""

    def scores(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if len(batch["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().scores(model, batch)


def test_clients_that_do_not_fit_together_are_trained_in_parts(tiny_bert: Path) -> None:
    settings_ = ModelSettings(name=str(tiny_bert), device="cpu", dtype="float64")
    train = TrainSettings(learning_rate=0.01, batch_size=1)
    model = models.load(Limited(), settings_, AdapterSettings(rank=2), LABELS, 0)
    jobs = [job_of(model, seed, 1 + seed % 3, train) for seed in range(9)]
    outcomes = vectorized.train(model, Limited(), jobs, train)
    for job, outcome in zip(jobs, outcomes, strict=True):
        assert isinstance(outcome, Trained)
        alone = training.train(model, Limited(), *job, train)
        assert difference(outcome.state, alone.state) < 1e-10
    greedy = [job_of(model, 0, 8, replace(train, batch_size=4))]
    with pytest.raises(torch.OutOfMemoryError):
        vectorized.train(model, Limited(), greedy, train)


def test_a_base_that_mixes_rows_is_trained_client_by_client(
    tiny_bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And that is said once."""
    task, train = Classification(), OPTIONS[0]
    settings_ = ModelSettings(name=str(tiny_bert), device="cpu", dtype="float64")
    models.load.cache_clear()
    model = models.load(task, settings_, AdapterSettings(rank=2), LABELS, 0)
    part = model.module.get_base_model().backbone.encoder.layer[0].intermediate
    usual = part.forward

    def mixed(x: torch.Tensor) -> torch.Tensor:
        """One row more than there are tokens, as where experts get some tokens twice."""
        rows = x.reshape(-1, x.shape[-1])
        whole: torch.Tensor = usual(torch.cat([rows, rows[:1]]))
        return whole[:-1].view(*x.shape[:-1], whole.shape[-1])

    part.forward = mixed
    jobs = [job_of(model, seed, 4, train) for seed in range(2)]
    outcomes = [vectorized.train(model, task, jobs, train) for _ in range(2)][1]
    for job, outcome in zip(jobs, outcomes, strict=True):
        assert isinstance(outcome, Trained)
        assert difference(outcome.state, training.train(model, task, *job, train).state) == 0.0
    told = [r.getMessage() for r in caplog.records if "one after another" in r.getMessage()]
    assert len(told) == 1
    models.load.cache_clear()
