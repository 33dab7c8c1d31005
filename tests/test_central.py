"""The noisy sum of clients: one bound, a fixed denominator, a clip that finds its quantile."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune import adapter
from fedtune.adapter import State
from fedtune.cohorts import All, Cohort, Fixed, Poisson
from fedtune.config import Experiment, PrivacySettings
from fedtune.errors import RecipeError
from fedtune.privacy import central, clipping, mechanism, noise
from fedtune.privacy.clipping import BOUND
from fedtune.strategies.strategy import Update

KEY = bytes(range(32))
RECIPE = Experiment.from_flat(
    {
        "privacy.mode": "client",
        "privacy.noise": 1.0,
        "privacy.clip": 0.5,
        "privacy.minimum_clients": 2,
        "weighting": "uniform",
    }
)


def states(count: int, scale: float = 1.0, seed: int = 0) -> list[State]:
    draws = torch.Generator().manual_seed(seed)
    return [
        {
            "delta": {
                "a": torch.randn(3, 4, generator=draws) * scale,
                "b": torch.randn(5, generator=draws) * scale,
            },
            "head": {"w": torch.randn(2, 2, generator=draws) * scale},
        }
        for _ in range(count)
    ]


def updates(of: list[State]) -> list[Update]:
    return [Update(f"client-{number:03}", 1.0, state) for number, state in enumerate(of)]


def flat(state: State) -> torch.Tensor:
    return torch.cat([t.double().flatten() for group in state.values() for t in group.values()])


@given(st.floats(1e-30, 1e30), st.floats(1e-6, 1e6))
def test_the_flat_norm_never_exceeds_the_clip(scale: float, clip: float) -> None:
    """Over all groups together, as float32 numbers, whatever the rounding."""
    (state,) = states(1, scale)
    bounded, size = clipping.clipped(state, clip)
    assert float(flat(bounded).norm()) <= clip
    assert size == pytest.approx(float(flat(state).norm()))
    if size <= clip:
        assert adapter.digest(bounded) == adapter.digest(state)
    else:
        assert float(flat(bounded).norm()) > 0.999 * clip
        cosine = torch.nn.functional.cosine_similarity(flat(bounded), flat(state), dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_is_refused(value: float) -> None:
    """A NaN norm is not above any clip: a rule that only compares would let it pass."""
    state: State = {"delta": {"a": torch.tensor([1.0, value])}}
    with pytest.raises(FloatingPointError):
        clipping.clipped(state, 1.0)


def test_a_change_of_zero_stays_zero() -> None:
    state: State = {"delta": {"a": torch.zeros(3)}}
    assert clipping.clipped(state, 1.0) == (state, 0.0)


def test_the_mean_is_the_clipped_sum_and_keyed_noise_over_a_constant() -> None:
    """By hand, from the parts: sum of clipped changes, sigma = z C, denominator q N = 2.4."""
    own = mechanism.client(RECIPE, Poisson(0.6), 4)
    sent = states(3)
    done = central.release(updates(sent), sent[0], own, RECIPE.privacy, 0.5, KEY, "run", 7, "h")
    for group in ("delta", "head"):
        for name, shape in ((n, t.shape) for n, t in sent[0][group].items()):
            total = sum(clipping.clipped(s, 0.5)[0][group][name].double() for s in sent)
            drawn = noise.gaussian(KEY, shape, "run", 7, "h", "sum", group, name)
            expected = (total + 0.5 * drawn) / 2.4
            assert torch.allclose(done.update.state[group][name].double(), expected, atol=1e-6)
    assert done.clip == 0.5
    assert done.noise_norm == pytest.approx(0.5 * math.sqrt(21) / 2.4)


def test_nobody_moves_the_sum_further_than_the_clip() -> None:
    """With and without one client, whatever it sends: at most C over the denominator apart."""
    own = mechanism.client(RECIPE, Poisson(0.6), 4)
    sent = states(4)
    for scale in (1e-9, 1.0, 1e9):
        loud = [*sent[:3], adapter_times(sent[3], scale)]
        both = [
            central.release(updates(some), sent[0], own, RECIPE.privacy, 0.5, KEY, "x")
            for some in (loud, loud[:3])
        ]
        apart = flat(both[0].update.state) - flat(both[1].update.state)
        assert float(apart.norm()) <= 0.5 / own.denominator * (1 + 1e-5)


def adapter_times(state: State, scale: float) -> State:
    return {g: {n: t * scale for n, t in tensors.items()} for g, tensors in state.items()}


def test_an_empty_cohort_releases_noise_alone() -> None:
    own = mechanism.client(RECIPE, Poisson(0.6), 4)
    schema = {"delta": {"a": torch.zeros(100, 100)}}
    done = central.release([], schema, own, RECIPE.privacy, 0.5, KEY, "run")
    numbers = done.update.state["delta"]["a"].double() * own.denominator
    assert float(numbers.std()) == pytest.approx(0.5, rel=0.03)


def test_the_order_of_clients_does_not_matter() -> None:
    own = mechanism.client(RECIPE, All(), 4)
    sent = updates(states(4))
    one, other = (
        central.release(some, sent[0].state, own, RECIPE.privacy, 0.5, KEY, "x")
        for some in (sent, sent[::-1])
    )
    assert adapter.digest(one.update.state) == adapter.digest(other.update.state)
    assert central.inputs_hash(sent) == central.inputs_hash(sent[::-1])
    assert central.inputs_hash(sent) != central.inputs_hash(sent[1:])


@pytest.mark.parametrize("start", [0.01, 0.1, 10.0, 100.0])
def test_the_clip_finds_the_median(start: float) -> None:
    """From far below and above within 25 % of the median norm in 60 rounds, noise and all.

    Norms are log-normal with median 1; 100 clients, z = 1. Inverted, the clip would run away.
    """
    recipe = RECIPE.replace(
        privacy__clip=start, privacy__clip_quantile=0.5, privacy__minimum_clients=50
    )
    own = mechanism.client(recipe, All(), 100)
    draws = np.random.default_rng(0)
    schema: State = {"delta": {"a": torch.zeros(8)}}
    clip = start
    for round in range(60):
        sent = []
        for size in np.exp(0.5 * draws.standard_normal(100)):
            change: State = {"delta": {"a": torch.full((8,), float(size) / math.sqrt(8))}}
            received: State = {clipping.CLIP: {clipping.CLIP: torch.tensor(clip).double()}}
            sent.append(clipping.bounded(change, received, recipe.privacy))
        full = {**schema, BOUND: {BOUND: torch.zeros(1)}}
        done = central.release(updates(sent), full, own, recipe.privacy, clip, KEY, "run", round)
        assert BOUND not in done.update.state
        clip = done.clip
    assert clip == pytest.approx(1.0, rel=0.25)


@given(st.floats(0.1, 20), st.integers(50, 5000))
def test_sum_and_count_cost_as_much_as_z(z: float, clients: int) -> None:
    """Two Gaussian releases compose: 1/z^2 = 1/z_delta^2 + 1/(2 sigma_b)^2."""
    own = replace(mechanism.client(RECIPE, All(), clients), noise=z)
    multiplier, sigma_b = central.split(own, 0.5)
    assert multiplier**-2 + (2 * sigma_b) ** -2 == pytest.approx(z**-2)
    assert z < multiplier <= 1.16 * z
    assert central.split(own, 0.0) == (z, 0.0)


def test_local_noise_is_each_clients_own_and_repeats_itself() -> None:
    recipe = RECIPE.replace(privacy__mode="local", privacy__noise=0.0, privacy__epsilon=8.0)
    own = mechanism.local(recipe)
    assert own.sensitivity == 2 * own.clip
    one, two = states(2)
    sent = clipping.noised(one, own, KEY, "run", 1)
    assert adapter.digest(sent) == adapter.digest(clipping.noised(one, own, KEY, "run", 1))
    others = [
        clipping.noised(one, own, KEY, "run", 2),
        clipping.noised(one, own, bytes(32), "run", 1),
        clipping.noised(two, own, KEY, "run", 1),
    ]
    bare = flat(clipping.clipped(one, 0.5)[0])
    for other, base in zip(others, (one, one, two), strict=True):
        own_noise = flat(sent) - bare
        other_noise = flat(other) - flat(clipping.clipped(base, 0.5)[0])
        assert float((own_noise - other_noise).abs().min()) > 0
    assert float((flat(sent) - bare).std()) == pytest.approx(own.sigma, rel=0.5)


@pytest.mark.parametrize(
    ("cohort", "sampling", "rate", "denominator", "sensitivity"),
    [
        (All(), "all", 1.0, 200.0, 0.5),
        (Poisson(0.1), "poisson", 0.1, 20.0, 0.5),
        (Poisson(1.0), "all", 1.0, 200.0, 0.5),
        (Fixed(20), "fixed", 0.1, 20.0, 1.0),
        (Fixed(200), "all", 1.0, 200.0, 0.5),
    ],
)
def test_a_cohort_decides_sampling_and_denominator(
    cohort: Cohort, sampling: str, rate: float, denominator: float, sensitivity: float
) -> None:
    own = mechanism.client(RECIPE, cohort, 200)
    assert (own.sampling, own.rate, own.sensitivity) == (sampling, rate, sensitivity)
    assert own.denominator == pytest.approx(denominator)
    assert own.sigma == 0.5
    assert own.event(3).noise == 0.5 / sensitivity
    assert own.event(3).count == 3


def test_each_client_has_the_noise_that_its_own_records_need() -> None:
    recipe = RECIPE.replace(
        privacy__mode="record", privacy__noise=0.0, privacy__epsilon=3.0, train__batch_size=16
    )
    few, many = mechanism.record(recipe, 160), mechanism.record(recipe, 1600)
    assert (few.steps, many.steps) == (10, 100)
    assert few.rate == 0.1
    assert few.denominator == many.denominator == 16
    assert few.noise > many.noise
    assert few.delta == many.delta == 1e-5
    assert mechanism.record(recipe.replace(train__steps=7), 160).steps == 7
    with pytest.raises(RecipeError, match="batch_size = 16 is more than the 12 records"):
        mechanism.record(recipe, 12)


@pytest.mark.parametrize(
    ("settings", "units", "delta"),
    [
        (PrivacySettings(), 50, 1e-5),
        (PrivacySettings(), 10**6, 1e-7),
        (PrivacySettings(delta=1e-3), 50, 1e-3),
    ],
)
def test_delta_is_below_one_over_the_units(
    settings: PrivacySettings, units: int, delta: float
) -> None:
    assert mechanism.delta_of(settings, units) == pytest.approx(delta)
    with pytest.raises(RecipeError, match="publish one of them"):
        mechanism.delta_of(replace(settings, delta=1 / units), units)


def test_fewer_than_fifty_clients_are_refused() -> None:
    strict = RECIPE.replace(privacy__minimum_clients=50)
    with pytest.raises(RecipeError, match="drowns what the others say"):
        mechanism.client(strict, All(), 49)
    assert mechanism.client(strict, All(), 50).units == 50
