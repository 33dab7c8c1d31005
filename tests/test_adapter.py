"""Arithmetic on adapters against NumPy, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.adapter import (
    Adapter,
    add,
    digest,
    fitted,
    nbytes,
    norm,
    pick,
    subtract,
    weighted_mean,
)


def adapter_of(seed: int, dtype: torch.dtype = torch.float32) -> Adapter:
    draws = torch.Generator().manual_seed(seed)
    return {
        "A": torch.randn(2, 5, generator=draws, dtype=dtype),
        "B": torch.randn(3, 2, generator=draws, dtype=dtype),
    }


@given(st.lists(st.tuples(st.integers(0, 2**31), st.floats(1e-3, 1e3)), min_size=1, max_size=6))
def test_weighted_mean_equals_numpy(drawn: list[tuple[int, float]]) -> None:
    adapters = [adapter_of(seed, torch.float64) for seed, _ in drawn]
    weights = [weight for _, weight in drawn]
    mean = weighted_mean(adapters, weights)
    for name in ("A", "B"):
        expected = np.average([a[name].numpy() for a in adapters], axis=0, weights=weights)
        np.testing.assert_allclose(mean[name].numpy(), expected, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_the_mean_of_one_and_of_equals_is_itself_bitwise(seed: int, weight: float) -> None:
    one = adapter_of(seed)
    assert digest({"x": weighted_mean([one], [weight])}) == digest({"x": one})
    assert digest({"x": weighted_mean([one, one], [2.0, 2.0])}) == digest({"x": one})


def test_a_client_without_weight_does_not_count() -> None:
    first, second = adapter_of(0), adapter_of(1)
    mean = weighted_mean([first, second], [3.0, 0.0])
    assert digest({"x": mean}) == digest({"x": first})


def test_float32_clients_are_summed_in_float64() -> None:
    """10^8 + 1 - 10^8 is 1 only if the sum is wider than float32: the mean of three is 1/3."""
    adapters = [{"A": torch.tensor([value])} for value in (1e8, 1.0, -1e8)]
    assert weighted_mean(adapters, [1.0, 1.0, 1.0])["A"].item() == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.parametrize(
    "weights",
    [[0.0, 0.0], [1.0, -1.0], [2.0, -1.0], [1.0, float("nan")], [1.0, float("inf")], [1.0]],
)
def test_weights_without_meaning_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        weighted_mean([adapter_of(0), adapter_of(1)], weights)


def test_nothing_is_broadcast_or_reordered() -> None:
    one = adapter_of(0)
    with pytest.raises(ValueError, match="shapes"):
        add(one, {"A": torch.ones(1), "B": one["B"]})
    with pytest.raises(ValueError, match="different tensors"):
        subtract(one, {"A": one["A"]})
    with pytest.raises(ValueError, match="shapes"):
        weighted_mean([one, {"A": one["A"], "B": torch.ones(3, 1)}], [1.0, 1.0])
    reordered = {"B": one["B"], "A": one["A"]}
    assert digest({"x": add(one, reordered)}) == digest({"x": {k: 2 * v for k, v in one.items()}})


def test_add_undoes_subtract() -> None:
    one, other = adapter_of(0, torch.float64), adapter_of(1, torch.float64)
    back = add(subtract(one, other), other)
    assert all(torch.allclose(back[name], one[name], rtol=0, atol=1e-14) for name in one)


def test_norm_pick_and_nbytes_by_hand() -> None:
    """3, 4 and 12 have norm 13; two float32 and one float64 are 16 bytes."""
    adapter = {"A": torch.tensor([3.0, 4.0]), "B": torch.tensor([12.0], dtype=torch.float64)}
    assert norm(adapter) == 13.0
    assert nbytes({"x": adapter}) == 16
    assert list(pick(adapter, ["B"])) == ["B"]


def test_digest_sees_every_difference() -> None:
    one = adapter_of(0)
    changed = {**one, "A": one["A"].clone()}
    changed["A"][0, 0] = torch.nextafter(changed["A"][0, 0], torch.tensor(9.0))
    others = [
        changed,
        {"A": one["A"]},
        {**one, "B": one["B"].double()},
        {"A": one["A"].reshape(5, 2), "B": one["B"]},
    ]
    assert len({digest({"x": a}) for a in [one, *others]} | {digest({"y": one})}) == 6


@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**31))
def test_zeros_in_ranks_that_are_missing_keep_the_product(rank: int, more: int, seed: int) -> None:
    """And cutting them off again gives the factors back, bit for bit."""
    draws = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, 5, generator=draws, dtype=torch.float64)
    b = torch.randn(3, rank, generator=draws, dtype=torch.float64)
    wide_a = fitted("q.lora_A.weight", a, (rank + more, 5))
    wide_b = fitted("q.lora_B.weight", b, (3, rank + more))
    torch.testing.assert_close(wide_b @ wide_a, b @ a, rtol=1e-12, atol=1e-12)
    assert torch.equal(fitted("q.lora_A.weight", wide_a, a.shape), a)
    assert torch.equal(fitted("q.lora_B.weight", wide_b, b.shape), b)


@pytest.mark.parametrize(("name", "shape"), [("q.lora_A.weight", (2, 6)), ("head.weight", (3, 5))])
def test_only_ranks_may_be_missing(name: str, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="has shape"):
        fitted(name, torch.zeros(2, 5), shape)
