"""What a run will cost: the parts of it that can be counted by hand."""

import pytest

from fedtune import planning
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.privacy import forecast


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


def test_a_promise_is_foretold_round_by_round(tiny: Experiment) -> None:
    """West has the fewest rows, so its batches are the largest share; z without an epsilon."""
    assert planning.forecast(tiny).privacy is None
    recipe = tiny.replace(privacy__mode="record", privacy__noise=2.0, privacy__clip=0.5)
    foretold = planning.forecast(recipe).privacy
    assert foretold is not None
    assert (foretold.client, foretold.units, foretold.rate) == ("west", 9, 4 / 9)
    assert [round for round, _, _ in foretold.rounds] == [1, 2, 3]
    epsilons = [alone for _, alone, _ in foretold.rounds]
    assert 0 < epsilons[0] < epsilons[1] < epsilons[2]
    assert all(seen > alone for _, alone, seen in foretold.rounds)
    trained = sum(planning.forecast(recipe).trainable.values())
    assert foretold.parameters == trained
    assert foretold.noise_per_coordinate == pytest.approx(2.0 * 0.5 / 4)
    assert foretold.noise_norm == pytest.approx(0.25 * trained**0.5)
    assert foretold.signal_norm == 0.5
    half = planning.forecast(recipe.replace(strategy="ffa_lora")).privacy
    assert half is not None
    assert half.parameters < trained


def test_a_promise_to_patients_counts_them(tiny: Experiment) -> None:
    recipe = tiny.replace(
        privacy__mode="record", privacy__noise=1.0, privacy__unit="label", train__batch_size=2
    )
    foretold = planning.forecast(recipe).privacy
    assert foretold is not None
    assert (foretold.unit, foretold.units) == ("label", 3)
    with pytest.raises(RecipeError, match=r"have no column 'lable'. Did you mean 'label'"):
        planning.forecast(recipe.replace(privacy__unit="lable"))


def test_a_long_run_shows_a_dozen_rounds() -> None:
    assert forecast.shown(3) == [1, 2, 3]
    assert forecast.shown(100)[0] == 1
    assert forecast.shown(100)[-1] == 100
    assert len(forecast.shown(100)) == 12
