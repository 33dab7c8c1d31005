"""Products of LoRA factors against dense matrices, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.adapter import Adapter
from fedtune.lowrank import (
    Product,
    added,
    keep_energy,
    mean_product,
    products,
    stack,
    svd,
    truncate,
    with_products,
)

SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 9))


def product_of(d_out: int, d_in: int, rank: int, seed: int) -> Product:
    draws = torch.Generator().manual_seed(seed)
    return Product(
        torch.randn(d_out, rank, generator=draws, dtype=torch.float64),
        torch.randn(rank, d_in, generator=draws, dtype=torch.float64),
    )


@given(SHAPES, st.integers(0, 2**31))
def test_the_core_has_the_dense_matrix_s_singular_values(
    shape: tuple[int, int, int], seed: int
) -> None:
    product = product_of(*shape, seed)
    u, s, vt = svd(product)
    torch.testing.assert_close(u @ torch.diag(s) @ vt, product.dense(), rtol=1e-10, atol=1e-10)
    dense = torch.linalg.svdvals(product.dense())
    count = min(len(s), len(dense))
    torch.testing.assert_close(s[:count], dense[:count], rtol=1e-10, atol=1e-10)
    assert float(dense[count:].sum()) < 1e-10


@given(st.integers(1, 6), st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_a_stack_is_the_weighted_sum(d_out: int, d_in: int, ranks: list[int]) -> None:
    terms = [product_of(d_out, d_in, rank, seed) for seed, rank in enumerate(ranks)]
    weights = [0.5 + i for i in range(len(ranks))]
    joined = stack(terms, weights)
    assert joined.A.shape == (sum(ranks), d_in)
    ideal = sum(w * t.dense() for w, t in zip(weights, terms, strict=True))
    torch.testing.assert_close(joined.dense(), ideal, rtol=1e-10, atol=1e-10)


@given(SHAPES, st.integers(1, 9), st.booleans(), st.integers(0, 2**31))
def test_truncation_is_the_best_there_is(
    shape: tuple[int, int, int], rank: int, balanced: bool, seed: int
) -> None:
    """The error is the norm of what is dropped (Eckart and Young); both factors have the rank."""
    product = product_of(*shape, seed)
    short = truncate(product, rank, balanced=balanced)
    assert (short.B.shape, short.A.shape) == ((shape[0], rank), (rank, shape[1]))
    dropped = torch.linalg.svdvals(product.dense())[rank:].norm()
    error = (product.dense() - short.dense()).norm()
    torch.testing.assert_close(error, dropped, rtol=1e-10, atol=1e-10)
    if not balanced:
        kept = min(rank, shape[0], shape[1], shape[2])
        rows = short.A[:kept] @ short.A[:kept].T
        torch.testing.assert_close(rows, torch.eye(kept).double(), rtol=1e-10, atol=1e-10)


def test_what_is_not_finite_is_refused() -> None:
    product = product_of(3, 4, 2, 0)
    product.B[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        svd(product)


def test_factors_are_found_by_their_names() -> None:
    adapter = {
        "q.lora_A.weight": torch.ones(2, 3),
        "q.lora_B.weight": torch.ones(4, 2),
        "q.lora_magnitude_vector": torch.ones(4),
    }
    assert [module for module, _ in products(adapter)] == ["q"]
    doubled = with_products(adapter, lambda _, p: Product(2 * p.B, p.A))
    assert torch.equal(doubled["q.lora_B.weight"], 2 * adapter["q.lora_B.weight"])
    assert doubled["q.lora_magnitude_vector"] is adapter["q.lora_magnitude_vector"]
    with pytest.raises(ValueError, match="has no"):
        dict(products({"q.lora_A.weight": torch.ones(2, 3)}))


def adapter_of(d_out: int, d_in: int, rank: int, seed: int) -> Adapter:
    product = product_of(d_out, d_in, rank, seed)
    return {"q.lora_A.weight": product.A, "q.lora_B.weight": product.B}


def dense(adapter: Adapter) -> torch.Tensor:
    return dict(products(adapter))["q"].dense()


@given(st.integers(1, 6), st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_the_mean_of_products_is_the_dense_mean(d_out: int, d_in: int, ranks: list[int]) -> None:
    adapters = [adapter_of(d_out, d_in, rank, seed) for seed, rank in enumerate(ranks)]
    weights = [1.0 + i for i in range(len(ranks))]
    ideal = sum(w * dense(a) for w, a in zip(weights, adapters, strict=True)) / sum(weights)
    got = dense(mean_product(adapters, weights))
    torch.testing.assert_close(got, ideal, rtol=1e-10, atol=1e-12)


@given(st.integers(1, 6), st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_a_base_grows_to_the_ranks_of_its_matrix_and_loses_nothing(
    d_out: int, d_in: int, ranks: list[int]
) -> None:
    base: Adapter = {}
    ideal = torch.zeros(d_out, d_in, dtype=torch.float64)
    for seed, rank in enumerate(ranks):
        change = adapter_of(d_out, d_in, rank, seed)
        base, ideal = added(base, change), ideal + dense(change)
    torch.testing.assert_close(dense(base), ideal, rtol=1e-10, atol=1e-10)
    assert len(base["q.lora_A.weight"]) <= max(ranks[0], min(d_out, d_in))


@given(SHAPES, st.integers(0, 2**31), st.floats(0.05, 1.0))
def test_the_energy_kept_is_what_was_asked_with_the_fewest_ranks(
    shape: tuple[int, int, int], seed: int, energy: float
) -> None:
    adapter = adapter_of(*shape, seed)
    kept = keep_energy(adapter, energy)
    squares = svd(dict(products(adapter))["q"])[1].square()
    rank = len(kept["q.lora_A.weight"])
    whole = float(squares.sum())
    assert float(dense(kept).square().sum()) >= (energy - 1e-9) * whole
    assert rank == 1 or float(squares[: rank - 1].sum()) < (energy + 1e-9) * whole
