"""Rows without their padding: there and back, and no row sees another's tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.packing import Packing, bucketed, in_order

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def padded_of(lengths: list[int]) -> torch.Tensor:
    """(rows, longest, 2): 100 row + position where there is a token, -1 elsewhere."""
    longest = max(lengths)
    rows = torch.full((len(lengths), longest, 2), -1.0, dtype=torch.float64)
    for number, length in enumerate(lengths):
        rows[number, :length] = (100 * number + torch.arange(length)).double().unsqueeze(1)
    return rows


@given(LENGTHS)
def test_packing_keeps_every_token_and_nothing_else(lengths: list[int]) -> None:
    packing, padded = Packing.of(lengths, torch.device("cpu")), padded_of(lengths)
    packed = packing.pack(padded)
    assert packed.shape == (1, sum(lengths), 2)
    assert torch.equal(packed[0], torch.cat([padded[i, :n] for i, n in enumerate(lengths)]))
    back = packing.unpack(packed)
    assert torch.equal(back, padded.clamp(min=0) * (padded >= 0))


@given(LENGTHS)
def test_buckets_hold_whole_rows_of_like_length(lengths: list[int]) -> None:
    """Every place of a bucket's row reads that row; real ones are its tokens in order."""
    packing = Packing.of(lengths, torch.device("cpu"))
    places = bucketed(packing.pack(padded_of(lengths))[0], packing)
    begin, seen = 0, []
    for bucket in packing.buckets:
        end = begin + bucket.rows * bucket.longest
        rows = places[begin:end, 0].view(bucket.rows, bucket.longest)
        begin = end
        real = torch.ones_like(rows).bool() if bucket.real is None else bucket.real
        for row, own in zip(rows, real, strict=True):
            number, count = int(row[0]) // 100, int(own.sum())
            seen.append(number)
            assert lengths[number] == count >= 0.75 * bucket.longest
            assert torch.equal(row[:count], 100 * number + torch.arange(count).double())
            assert set((row // 100).tolist()) == {number}
    assert sorted(seen) == list(range(len(lengths)))
    assert begin == len(places)


@given(LENGTHS, st.integers(0, 2**31))
def test_gradients_come_back_to_their_tokens(lengths: list[int], seed: int) -> None:
    packing = Packing.of(lengths, torch.device("cpu"))
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths), 3, generator=draws, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(sum(lengths), 3, generator=draws, dtype=torch.float64)
    round_trip = in_order(bucketed(x, packing), packing)
    assert torch.equal(round_trip, x)
    (round_trip * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_equal_rows_need_no_moving() -> None:
    packing = Packing.of([4, 4, 4], torch.device("cpu"))
    assert packing.aligned
    assert [(b.rows, b.longest, b.real) for b in packing.buckets] == [(3, 4, None)]
    with pytest.raises(ValueError, match="empty"):
        Packing.of([], torch.device("cpu"))
