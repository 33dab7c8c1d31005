"""Skellam noise in shares: its law, its sensitivity, its price, and the room it takes."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent, rdp
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from fedtune.privacy import masks, ring, skellam
from fedtune.privacy.accounting import Event, cost, epsilon
from fedtune.privacy.calibration import noise_for
from fedtune.privacy.letters import RefusedError
from fedtune.privacy.normal import Doubles
from fedtune.privacy.ring import Contribution, Grid, Layout
from fedtune.privacy.secure import Masked, Noised

KEY = bytes(range(32))


# --- the law ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [2**14, 10**6, 2**40 + 1, 2**52])
def test_a_share_is_the_difference_of_two_poisson_numbers(mean: int) -> None:
    """Moments within 5 standard errors, and chi-square over 64 bins of equal probability.

    The oracle is SciPy's incomplete gamma functions where they are exact, and the normal
    distribution where the difference from it (below mean^-1/2 / 4) is far below the test's power.
    """
    count = 200_000
    draws = skellam.share(KEY, count, mean, "law").astype(float)
    deviation = math.sqrt(2 * mean)
    assert abs(draws.mean()) < 5 * deviation / count**0.5
    assert abs(draws.var() / deviation**2 - 1) < 5 * (2 / count) ** 0.5
    scaled = draws / deviation
    assert abs((scaled**3).mean()) < 5 * (15 / count) ** 0.5
    assert abs((scaled**4).mean() - 3) < 5 * (96 / count) ** 0.5
    edges = np.floor(stats.norm.ppf(np.arange(1, 64) / 64) * deviation)
    below = (
        stats.skellam(mean, mean).cdf(edges)
        if mean == 2**14
        else special.ndtr((edges + 0.5) / deviation)
    )
    expected = np.diff(np.concatenate([[0.0], below, [1.0]])) * count
    places = np.searchsorted(edges, draws, side="left")
    found = np.bincount(places, minlength=64)
    assert stats.chisquare(found, expected).pvalue > 0.001


def test_the_sampler_is_exact_for_one_poisson_number() -> None:
    """Every number near the mean by itself: 2 million draws against SciPy's probabilities."""
    mean, count = 2**14, 2_000_000
    draw = skellam.noise.stream(KEY, "poisson")
    draws = skellam._deviations(draw, count, mean) + mean
    numbers = np.arange(mean - 450, mean + 451)
    expected = stats.poisson(mean).pmf(numbers) * count
    found = np.bincount(draws - numbers[0] + 1000, minlength=2000)[1000 : 1000 + len(numbers)]
    tails = count - found.sum()
    table = np.concatenate([found, [tails]]), np.concatenate([expected, [count - expected.sum()]])
    assert stats.chisquare(*table).pvalue > 0.001


@pytest.mark.parametrize("mean", [2**14, 2**30, 2**55])
def test_no_proposal_is_accepted_more_than_certainly(mean: int) -> None:
    """Rejection is exact only if the ratio of densities stays below 1, here over all of (0, 1):
    with a coin of almost 1 nothing is accepted."""
    middle = (np.arange(2**18) + 0.5) / 2**18
    tails = 2.0 ** -np.linspace(10, 53, 2**12)
    uniform = np.concatenate([middle, tails, 1 - tails])
    _, accepted = skellam._proposed(uniform, np.full_like(uniform, 1 - 1e-4), mean)
    assert not accepted.any()
    _, accepted = skellam._proposed(middle, np.full_like(middle, 0.5), mean)
    assert accepted.mean() > 0.5


def test_a_share_is_fixed_by_key_and_context_and_unlike_any_other() -> None:
    contexts = [
        ("run", 1, "north"),
        ("run", 2, "north"),
        ("run", 1, "south"),
        ("rerun", 1, "north"),
    ]
    draws = [skellam.share(KEY, 20_000, 10**9, *context) for context in contexts]
    draws.append(skellam.share(KEY[::-1], 20_000, 10**9, *contexts[0]))
    draws.append(np.roll(draws[0], 1))
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / 20_000**0.5
    again = skellam.share(KEY, 20_000, 10**9, *contexts[0])
    assert np.array_equal(again, draws[0])
    torch.manual_seed(0)
    np.random.seed(0)
    assert np.array_equal(skellam.share(KEY, 20_000, 10**9, *contexts[0]), again)
    assert hashlib.sha256(again.astype("<i8").tobytes()).hexdigest() == KNOWN


KNOWN = "a248cd5a4412dd4eaff6a81e982e53bd525a37a0a73f8b896edcc656868c6f68"


def test_a_mean_for_which_the_series_are_not_exact_is_refused() -> None:
    with pytest.raises(ValueError, match="no share of noise has a mean of 16383"):
        skellam.share(KEY, 5, 2**14 - 1)


# --- the price -------------------------------------------------------------------------------


def logs(numbers: skellam.Integers, variance: float) -> Doubles:
    """Log probabilities of Skellam noise, from SciPy's scaled Bessel functions."""
    found: Doubles = np.log(special.ive(np.abs(numbers), variance))
    return found


def exact_divergence(shift: int, variance: float, order: int) -> float:
    """Of order alpha, between the noise and the noise moved by `shift`, summed number by number."""
    reach = int(14 * math.sqrt(variance)) + 40
    numbers = np.arange(-reach, reach + order * shift + 1)
    terms = order * logs(numbers - shift, variance) - (order - 1) * logs(numbers, variance)
    return float(special.logsumexp(terms) / (order - 1))


CASES = [
    (shift, variance, order)
    for shift, variance, order in itertools.product(
        (1, 2, 3, 7, 20), (2.0, 10.0, 200.0, 1e4), (2, 3, 5, 16, 48)
    )
    if order * shift < 16 * math.sqrt(variance)
]


def test_the_bound_is_above_the_exact_divergence() -> None:
    """In one dimension, for integer orders; and it is near where the noise is large."""
    assert len(CASES) > 60
    for shift, variance, order in CASES:
        exact = exact_divergence(shift, variance, order)
        bound = skellam.divergence(math.sqrt(variance) / shift, shift, order)
        assert exact <= bound * (1 + 1e-9), (shift, variance, order)
        if variance == 1e4:
            assert bound < 1.02 * exact


@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=30).filter(any),
    st.sampled_from([5.0, 40.0, 900.0]),
    st.sampled_from([2, 4, 9]),
)
def test_the_bound_is_above_the_exact_divergence_of_vectors(
    vector: list[int], variance: float, order: int
) -> None:
    """Coordinates have independent noise, so their divergences add up."""
    exact = sum(exact_divergence(abs(x), variance, order) for x in vector if x)
    norm = math.sqrt(sum(x * x for x in vector))
    assert exact <= skellam.divergence(math.sqrt(variance) / norm, norm, order) * (1 + 1e-9)


def exact_delta(shift: int, variance: float, rounds: int, limit: float) -> float:
    """The least delta for an epsilon: the sum of what p is above e^epsilon q, over all outcomes."""
    reach = int(9 * math.sqrt(variance)) + 20
    numbers = np.arange(-reach, reach + shift + 1)
    p, q = logs(numbers - shift, variance), logs(numbers, variance)
    one, other = p, q
    for _ in range(rounds - 1):
        one = np.add.outer(one, p).ravel()
        other = np.add.outer(other, q).ravel()
    above = one - other > limit
    return float(np.sum(np.exp(one[above]) - np.exp(limit + other[above])))


@pytest.mark.parametrize(("shift", "variance"), [(1, 4.0), (3, 9.0), (2, 40.0), (8, 100.0)])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("delta", [1e-2, 1e-5])
def test_the_exact_loss_is_within_the_claimed_epsilon(
    shift: int, variance: float, rounds: int, delta: float
) -> None:
    claimed = epsilon([Event(math.sqrt(variance) / shift, count=rounds, steps=shift)], delta)
    assert exact_delta(shift, variance, rounds, claimed) <= delta
    # The oracle would see a claim that is too small by half.
    assert exact_delta(shift, variance, rounds, claimed / 2) > delta


@given(st.floats(0.5, 30), st.integers(1, 200))
def test_with_fine_steps_it_costs_what_gaussian_noise_does(noise: float, rounds: int) -> None:
    """The oracle is dp-accounting's RDP of the Gaussian at the same orders, and PLD is below."""
    accountant = rdp.RdpAccountant(orders=list(skellam.ORDERS))
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(noise), rounds))
    gaussian = float(accountant.get_epsilon(1e-5))
    found = epsilon([Event(noise, count=rounds, steps=skellam.LEAST_STEPS)], 1e-5)
    assert gaussian <= found <= gaussian * (1 + 1e-5) + 1e-9


def test_a_finer_grid_and_more_noise_cost_less() -> None:
    coarse = [epsilon([Event(2.0, count=5, steps=steps)], 1e-5) for steps in (1, 2, 4, 64, 2**16)]
    assert coarse == sorted(coarse, reverse=True)
    assert coarse[0] > 1.02 * coarse[-1]
    assert epsilon([Event(2.1, count=5, steps=64)], 1e-5) < coarse[3]


def test_what_is_charged_says_what_no_accountant_knows() -> None:
    found = cost([Event(4.0, count=20, steps=2**16)], 1e-5)
    assert found.epsilon == found.observed == found.rdp == pytest.approx(5.3777, abs=1e-4)
    assert math.isinf(found.pld)
    assert math.isinf(found.rho)
    with pytest.raises(ValueError, match="Gaussian and Skellam noise together"):
        cost([Event(1.0), Event(1.0, steps=64)], 1e-5)
    with pytest.raises(ValueError, match="no accountant can price"):
        cost([Event(1.0, "poisson", 0.1, steps=64)], 1e-5)


def test_noise_is_found_for_an_epsilon() -> None:
    event = Event(1.0, count=20, steps=skellam.LEAST_STEPS)
    noise = noise_for(4.0, 1e-5, event)
    assert 3.99 < epsilon([Event(noise, count=20, steps=skellam.LEAST_STEPS)], 1e-5) <= 4.0


# --- behind masks ----------------------------------------------------------------------------


def grid_of(clients: int, noise: float, clip: float = 0.5) -> Grid:
    return Noised(noise=noise, radius=clip).grid(clients, "uniform")


def words_of(
    grid: Grid, values: torch.Tensor, rounding: masks.Words, share: skellam.Integers | None
) -> masks.Words:
    layout = Layout.of({"d": {"a": values}}, {})
    factors = ring.multipliers("run", 1, layout.words)
    given = Contribution({"d": {"a": values}}, 1, {}, [0, 0])
    return ring.encoded(grid, layout, given, rounding, factors, share)


@given(
    st.integers(3, 4000),
    st.floats(0.5, 50),
    st.floats(1e-4, 1e4),
    st.sampled_from([1, 7, 1000]),
    st.sampled_from([0, 2**31, 2**32 - 1]),
    st.sampled_from([1e-9, 1.0, 1e9]),
    st.integers(0, 99),
)
def test_however_they_are_rounded_integers_have_the_norm_of_the_clip_at_most(
    clients: int, noise: float, clip: float, count: int, coin: int, scale: float, seed: int
) -> None:
    """All rounded one way, small ones up from 0 and large ones scaled down to the clip."""
    grid = grid_of(clients, noise, clip)
    draws = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=draws, dtype=torch.float64).abs() * clip * scale
    rounding = np.full(count, coin, np.uint32)
    words = words_of(grid, values, rounding, np.zeros(count, np.int64))[:count]
    integers = words.view(np.int32).astype(object)
    assert sum(q * q for q in integers) <= grid.steps**2
    if scale == 1e9 and count == 1:
        assert integers[0] > grid.steps * (1 - 1e-4)


@pytest.mark.parametrize(("gone", "expected"), [(0, 4 * math.sqrt(8 / 6)), (2, 4.0)])
def test_those_who_must_stay_make_the_promised_noise(gone: int, expected: float) -> None:
    """8 clients of whom 2 may drop out, z = 4: 4 C with two gone, 4.62 C with none."""
    grid, count = grid_of(8, 4.0), 20_000
    assert grid.needed == 6
    values = torch.zeros(count, dtype=torch.float64)
    layout = Layout.of({"d": {"a": values}}, {})
    factors = ring.multipliers("run", 1, layout.words)
    total = np.zeros(layout.words, np.uint32)
    for number in range(8 - gone):
        share = skellam.share(KEY, count, grid.share, "client", number)
        total += words_of(grid, values, masks.keystream(bytes([number] * 32), count), share)
    totals = ring.decoded(grid, layout, total, factors, {"d": {"a": values}})
    assert totals.clients == totals.within == 8 - gone
    noise = totals.mean["d"]["a"] * totals.clients / 0.5
    assert float(noise.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * count))
    assert 2 * grid.share * 6 >= (4.0 * grid.steps) ** 2 > 2 * (grid.share - 1) * 6


@given(st.integers(3, 4000), st.floats(0.5, 90))
def test_sum_and_noise_fit_and_the_next_finer_grid_would_not(clients: int, noise: float) -> None:
    """Twelve deviations, which a coordinate exceeds less often than once in 2^102."""
    grid = grid_of(clients, noise)
    deviation = math.sqrt(2 * clients * grid.share)
    assert deviation >= math.sqrt(clients / grid.needed) * noise * grid.steps
    assert clients * (grid.steps + 1) + 12 * deviation < 2**31
    assert clients * (2 * grid.steps + 1) + 12 * 2 * deviation > 2**31 - 2**10
    assert 1 + stats.norm.logsf(12) / math.log(2) < -102


@pytest.mark.parametrize(
    ("clients", "noise", "message"),
    [
        (3, 5000.0, "could wrap around 32 bits"),
        (4095, 4000.0, "could wrap around 32 bits"),
        (4096, 1.0, "could wrap around 32 bits"),
        (3, 1e-7, "too little to be made of shares"),
    ],
)
def test_what_could_wrap_or_cannot_be_drawn_is_refused(
    clients: int, noise: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        grid_of(clients, noise)


def test_a_grid_with_noise_never_goes_without() -> None:
    """Nor does one without noise take any; and both sides must have the same grid."""
    values, rounding = torch.zeros(4), np.zeros(4, np.uint32)
    with pytest.raises(ValueError, match="share of noise"):
        words_of(grid_of(5, 1.0), values, rounding, None)
    with pytest.raises(ValueError, match="share of noise"):
        words_of(Masked().grid(5, "uniform"), values, rounding, np.zeros(4, np.int64))
    digests = {grid_of(5, noise, clip).digest() for noise in (1.0, 1.1) for clip in (0.5, 0.6)}
    assert len(digests | {Grid(5, 0.5, 0.5, 1).digest()}) == 5


def test_how_many_were_clipped_is_not_told() -> None:
    values = torch.full((4,), 100.0)
    grid = grid_of(5, 1.0)
    words = words_of(grid, values, np.zeros(4, np.uint32), np.zeros(4, np.int64))
    assert words[4 + ring.WITHIN] == 1


def test_what_is_not_finite_is_refused_before_it_is_hidden() -> None:
    values = torch.tensor([1.0, math.nan])
    with pytest.raises(RefusedError, match="E_NONFINITE"):
        words_of(grid_of(5, 1.0), values, np.zeros(2, np.uint32), np.zeros(2, np.int64))
