"""Quantized bases: which weights are, that they never move, and what they take."""

from pathlib import Path

import pytest
import torch

from fedtune import models, training, vectorized
from fedtune.config import AdapterSettings, ModelSettings, TrainSettings
from fedtune.errors import RecipeError
from fedtune.strategies.strategy import Plan
from fedtune.tasks import CausalLM, Classification, Task
from fedtune.training import Trained, Work


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_a_quantized_base_is_trained_as_any_other(
    tiny_bert: Path, tiny_llama: Path, quantization: str
) -> None:
    """Linear layers are, heads are not; alone and together give the same losses; nothing moves."""
    pytest.importorskip("bitsandbytes", reason="install fedtune[quantization]")
    cases: list[tuple[Task, Path, tuple[str, ...]]] = [
        (Classification(), tiny_bert, ("a", "b", "c")),
        (CausalLM(), tiny_llama, ()),
    ]
    for task, folder, labels in cases:
        settings = ModelSettings(name=str(folder), device="cpu", quantization=quantization)
        model = models.load(task, settings, AdapterSettings(rank=2), labels, 0)
        assert all(p.dtype == torch.float32 for g in model.tensors.values() for p in g.values())
        frozen = {
            name: p.detach().clone()
            for name, p in model.module.named_parameters()
            if not p.is_floating_point()
        }
        assert len(frozen) == 12 if labels else 14
        assert not any("classifier" in name or "lm_head" in name for name in frozen)
        start = models.initial(model, 0)
        plan = Plan(start, frozenset(name for group in start.values() for name in group))
        rows = [{"input_ids": [2, 5, 6 + i, 3], "label": [i % 3]} for i in range(6)]
        rows = [{**row, "labels": row["input_ids"]} for row in rows]
        jobs = [(plan, Work([rows[:n], rows[n:]], [0.01, 0.01], seed=0)) for n in (2, 3)]
        train = TrainSettings()
        for job, outcome in zip(jobs, vectorized.train(model, task, jobs, train), strict=True):
            assert isinstance(outcome, Trained)
            alone = training.train(model, task, *job, train)
            assert outcome.sums["loss"] == pytest.approx(alone.sums["loss"], rel=2e-2)
        named = dict(model.module.named_parameters())
        assert all(torch.equal(named[name], was) for name, was in frozen.items())
        with pytest.raises(ValueError, match="quantized"), models.shifted(model, start["adapter"]):
            pass


def test_a_quantized_base_takes_the_bytes_that_plan_foretells(tiny_llama: Path) -> None:
    """Weights of linear layers: one byte each, or half a byte and a float32 for each 64."""
    adapter, task = AdapterSettings(rank=2), CausalLM()
    plain, eight, four = (
        models.skeleton(task, ModelSettings(name=str(tiny_llama), quantization=q), adapter, ())[2]
        for q in ("none", "int8", "nf4")
    )
    # A layer: q and o 16 x 16, k and v 8 x 16, three of 16 x 24; two layers.
    linear = 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24)
    assert plain - eight == 3 * linear
    assert plain - four == linear * 4 - linear * 9 // 16


def test_a_quantization_that_cannot_be_is_refused(tiny_llama: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="install fedtune[quantization]")
    settings = ModelSettings(name=str(tiny_llama), dtype="float64", quantization="nf4")
    with pytest.raises(RecipeError, match="Use float32"):
        models.load(CausalLM(), settings, AdapterSettings(), (), 0)
