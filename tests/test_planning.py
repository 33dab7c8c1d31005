"""What a run will cost: the parts of it that can be counted by hand."""

import pytest

from fedtune import planning
from fedtune.config import Experiment


def test_padding_is_what_the_longest_row_of_a_batch_adds(tiny: Experiment) -> None:
    """Rows of 4, 4, 2 and 2 tokens: one batch has 16 places for 12 tokens, grouped pairs 12."""
    lengths = [4, 2, 4, 2]
    whole = tiny.replace(train__batch_size=4)
    assert planning._padding(whole, lengths) == pytest.approx(0.25)
    grouped = tiny.replace(train__batch_size=2, train__group_by_length=True)
    assert planning._padding(grouped, lengths) == 0.0


def test_layers_below_the_first_adapter_are_foretold(tiny: Experiment) -> None:
    """One of two: half of the work, and a float32 vector of 16 numbers a token on disk."""
    everything = planning.forecast(tiny)
    assert (everything.frozen_layers, everything.kept_bytes) == (0, 0)
    top = planning.forecast(tiny.replace(adapter__layers="top:1"))
    rows = top.examples + top.test_examples
    assert top.frozen_layers == 1
    assert top.kept_bytes == pytest.approx(top.tokens * rows * 16 * 4, abs=1)
    assert top.trainable["adapter"] * 2 == everything.trainable["adapter"]
