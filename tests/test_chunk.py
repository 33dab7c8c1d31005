"""What a chunk of clients computes, counted by hand."""

from pathlib import Path

import pytest

from clients import chunk
from fedtune import models
from fedtune.config import AdapterSettings, ModelSettings, TrainSettings
from fedtune.strategies.strategy import Plan
from fedtune.tasks import CausalLM
from fedtune.training import Work


def work(*lengths: list[int]) -> Work:
    """Batches of rows of these lengths."""
    batches = [[{"input_ids": [5] * n, "labels": [5] * n} for n in batch] for batch in lengths]
    return Work(batches, [0.01] * len(batches), seed=0)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_tokens_are_counted_with_their_padding(tiny_llama: Path, dropout: float) -> None:
    """Alone: 2 rows of 4 and 1 of 3 are 11 tokens, 9 of them real; 1 row of 6 is 6, all real.

    Together: the first step fills both up to 2 rows of 6, the second has one client left. With
    dropout nothing is trained together.
    """
    settings = ModelSettings(name=str(tiny_llama), device="cpu")
    adapter = AdapterSettings(rank=2, dropout=dropout)
    model = models.load(CausalLM(), settings, adapter, (), 0)
    start = models.initial(model, 0)
    plan = Plan(start, frozenset(start["adapter"]))
    jobs = [(plan, work([4, 2], [3])), (plan, work([6]))]
    train = TrainSettings()
    alone = [chunk.alone(model, CausalLM(), job, train) for job in jobs]
    assert [(t.tokens, t.computed) for t in alone] == [(9.0, 11.0), (6.0, 6.0)]
    together = chunk.train(model, CausalLM(), jobs, train)
    counted = [(t.tokens, t.computed) for t in together if isinstance(t, chunk.Trained)]
    expected = [(9.0, 11.0), (6.0, 6.0)] if dropout else [(9.0, 15.0), (6.0, 12.0)]
    assert counted == expected
