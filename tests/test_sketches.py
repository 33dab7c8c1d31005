"""Sketches that add up: exact where they are wide enough, refused where they are not."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from rounds import EXACT, Cohort, cohorts, effective, error, ideal, rounds, strategy_of

from clients.app import app as client_app
from clients.cohort import CohortGrid
from fedtune import parts
from fedtune.combine import Mean
from fedtune.config import Experiment
from fedtune.errors import RecipeError
from fedtune.lowrank import Product, truncate
from fedtune.strategies.flexlora_sum import FlexLoRASum
from fedtune.strategies.flora_sum import FLoRASum
from fedtune.strategies.sketched import SURPLUS, Sketched
from fedtune.strategies.strategy import Update
from server import checkpoint
from server.app import app as server_app

SKETCHED = ["flora_sum", "flexlora_sum"]


def distance(strategy: Sketched, cohort: Cohort) -> float:
    """Of the mean of the products, as the sketches give it, from the dense one."""
    (played,) = rounds(strategy, cohort, 1)
    found = strategy.mean(played.before, played.updates, Mean(), 1)
    matrices = {module: product.dense() for module, product in found.items()}
    return error(matrices, ideal(played, cohort))


@given(cohorts(least=1, most=5), st.integers(0, 3))
def test_the_mean_is_exact_from_the_rank_of_all_clients_on(cohort: Cohort, more: int) -> None:
    """Catalogue 18; clients' products are read from single sketches likewise."""
    width = len(cohort.weights) * cohort.rank + more
    away = distance(FLoRASum(width=width), cohort)
    assert away < EXACT


@pytest.mark.parametrize(("width", "exact"), [(20, True), (21, True), (12, False)])
def test_wide_matrices_need_the_rank_and_no_less(width: int, exact: bool) -> None:
    """Five clients of rank 4 and matrices of 40 x 60: exact at 20, far away below."""
    cohort = Cohort({"q": (40, 60), "v": (60, 40)}, 4, (1.0, 2.0, 3.0, 1.0, 2.0), (0,) * 5, 3)
    strategy = FLoRASum(width=width)
    away = distance(strategy, cohort)
    assert away < EXACT if exact else away > 1e-3
    reason = strategy.shortage(cohort.adapter(0), 5)
    assert bool(reason) == (not exact)
    assert exact or "Set width = 20" in reason


@given(cohorts())
def test_flexlora_of_sums_is_flexlora(cohort: Cohort) -> None:
    """The same best approximation, where it is one: singular values apart."""
    (whole,), (sums,) = (rounds(strategy_of(n), cohort, 1) for n in ("flexlora", "flexlora_sum"))
    for module, matrix in ideal(whole, cohort).items():
        values = torch.linalg.svdvals(matrix)
        if cohort.rank < len(values):
            assume(float(values[cohort.rank - 1] - values[cohort.rank]) > 1e-3)
        best = truncate(Product(matrix, torch.eye(matrix.shape[1])), cohort.rank, balanced=True)
        torch.testing.assert_close(
            effective(sums.after)[module], best.dense(), rtol=1e-7, atol=1e-8
        )
    assert error(effective(sums.after), effective(whole.after)) < 1e-7


def test_a_client_that_learnt_nothing_leaves_the_adapter() -> None:
    cohort = Cohort({"q": (40, 60)}, 4, (1.0,), (0,), 3)
    start = {n: t * ("lora_A" in n) for n, t in cohort.adapter("start").items()}
    strategy = FlexLoRASum()
    sent = strategy.payload(start, cohort.info(0), 1)
    after = strategy.aggregate({"adapter": start}, [Update("a", 1.0, sent)], Mean(), 1)
    assert all(torch.equal(after["adapter"][name], tensor) for name, tensor in start.items())


@pytest.mark.parametrize(("rows", "columns", "width"), [(40, 60, 16), (5, 60, 16), (60, 5, 16)])
def test_a_sketch_has_no_more_numbers_than_its_widths_say(
    rows: int, columns: int, width: int
) -> None:
    """And never more than the matrix's own rank asks for."""
    cohort = Cohort({"q": (rows, columns)}, 4, (1.0,), (0,), 3)
    strategy = FLoRASum(width=width)
    sent = strategy.payload(cohort.adapter(0), cohort.info(0), 1)
    q = min(width, rows, columns)
    assert sent["left"]["q"].shape == (rows, q)
    assert sent["right"]["q"].shape == (min(q + SURPLUS, rows), columns)


def play(experiment: Experiment) -> checkpoint.Checkpoint:
    grid = CohortGrid(client_app, experiment.flat())
    server_app(grid, grid.server_context({"arms": ""}))
    found = checkpoint.latest(parts.folder_of(experiment) / "checkpoint", experiment)
    assert found is not None
    return found


@pytest.mark.parametrize("name", SKETCHED)
def test_masked_sums_of_sketches_give_the_plain_runs_model(tiny: Experiment, name: str) -> None:
    """One round; what masks round (2^-27 of a number) is what differs."""
    plain = tiny.replace(strategy=name.removesuffix("_sum"), rounds=1, name="plain")
    masked = tiny.replace(
        strategy=name, rounds=1, name="masked", secure_aggregation="masked(bound=8.0)"
    )
    one, other = play(plain).state, play(masked).state
    first, second = effective(one), effective(other)
    for module, matrix in first.items():
        torch.testing.assert_close(second[module], matrix, rtol=1e-4, atol=2e-5)
    assert max(float(matrix.abs().max()) for matrix in second.values()) > 1e-3


def test_too_many_clients_for_the_width_are_refused_before_they_train(tiny: Experiment) -> None:
    narrow = tiny.replace(strategy="flora_sum(width=5)")
    with pytest.raises(RecipeError, match=r"width = 5 is less than the rank 6 .* Set width = 6"):
        play(narrow)
    assert play(tiny.replace(strategy="flora_sum(width=6)", rounds=1)).round == 1
    assert play(narrow.replace(cohort="fixed(size=2)", rounds=1, name="two")).round == 1


@pytest.mark.parametrize("text", ["flora_sum(width=0)", "flexlora_sum(width=-3)"])
def test_a_width_below_one_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="width must be at least 1"):
        parts.resolve(Experiment().replace(strategy=text))
