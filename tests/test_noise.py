"""Keyed noise: Gaussian, the same for the same context, unrelated for any other."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import ndtri

from fedtune.errors import RunError
from fedtune.privacy import noise
from fedtune.privacy.normal import quantile

KEY = bytes(range(32))


def test_quantiles_are_scipys() -> None:
    """Over the middle and both tails, to the last of 2^-54; scipy's own error is a few ulp."""
    tails = 2.0 ** -np.arange(2, 54)
    p = np.concatenate([np.linspace(1e-4, 1 - 1e-4, 20001), tails, 1 - tails])
    assert np.allclose(quantile(p), ndtri(p), rtol=5e-15, atol=5e-15)


def test_noise_is_standard_normal() -> None:
    """Moments within 5 standard errors and Kolmogorov-Smirnov; the key is fixed, so no flakes."""
    draws = noise.gaussian(KEY, (400, 500), "moments").numpy().ravel()
    count = len(draws)
    assert abs(draws.mean()) < 5 / count**0.5
    assert abs(draws.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((draws**3).mean()) < 5 * (15 / count) ** 0.5
    assert abs((draws**4).mean() - 3) < 5 * (96 / count) ** 0.5
    assert stats.kstest(draws, "norm").pvalue > 0.01
    assert (np.abs(draws) > 3).sum() == pytest.approx(count * 0.0027, rel=0.15)


def test_noise_of_neighbouring_numbers_and_other_contexts_is_independent() -> None:
    contexts = [("run", 1), ("run", 2), ("run", "1"), ("ru", "n1"), ("run", 1, ""), (b"run", 1)]
    draws = [noise.gaussian(KEY, (20000,), *context).numpy() for context in contexts]
    draws += [noise.gaussian(KEY[::-1], (20000,), "run", 1).numpy(), np.roll(draws[0], 1)]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / 20000**0.5
    squares = np.corrcoef(np.square(draws)) - np.eye(len(draws))
    assert np.abs(squares).max() < 5 / 20000**0.5


@given(st.lists(st.integers(0, 9), max_size=3), st.integers(1, 20000))
def test_the_same_context_is_the_same_draw_whatever_its_shape(
    context: list[int], count: int
) -> None:
    first = noise.gaussian(KEY, (count,), *context)
    assert torch.equal(first, noise.gaussian(KEY, (1, count), *context)[0])
    longer = noise.gaussian(KEY, (count + noise.CHUNK,), *context)
    whole = count // noise.CHUNK * noise.CHUNK
    assert torch.equal(first[:whole], longer[:whole])


def test_known_answers() -> None:
    """These bits must not depend on the machine: a run resumed elsewhere repeats its noise."""
    draws = noise.gaussian(KEY, (3, 1000), "known", 7, b"answers")
    digest = hashlib.sha256(draws.numpy().astype("<f8").tobytes()).hexdigest()
    assert draws[0, :2].tolist() == [-0.3045622173633231, 0.10296913333981603]
    assert digest == "1b456f809ea70e8598aa145783909706cea82f3a58af000eee9cdebc06604ef9"
    assert noise.uniforms(KEY, 2, "known").tolist() == [0.9677821392189834, 0.23241229939756164]


def test_a_global_generator_does_not_touch_it() -> None:
    """F28: user code that seeds numpy or torch."""
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        drawn.append((noise.gaussian(KEY, (5,), "x"), torch.rand(2)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])


@given(st.floats(1e-6, 1e6))
def test_released_values_lie_on_a_grid_that_sigma_decides(sigma: float) -> None:
    sums = {"b": torch.linspace(-1, 1, 7), "a": torch.full((2, 3), 1 / 3)}
    released = noise.noisy(sums, KEY, sigma, "grid")
    grid = noise.grid_of(sigma)
    assert sigma * 2**-21 < grid <= sigma * 2**-20
    for name, tensor in released.items():
        steps = tensor / grid
        assert torch.equal(steps, steps.round())
        expected = sums[name].double() + sigma * noise.gaussian(KEY, tensor.shape, "grid", name)
        assert (tensor - expected).abs().max() <= grid / 2
    again = noise.noisy(dict(reversed(sums.items())), KEY, sigma, "grid")
    assert all(torch.equal(released[name], again[name]) for name in sums)


def test_a_key_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "run" / "noise.key"
    key = noise.load_key(path)
    assert len(key) == 32
    assert noise.load_key(path) == key
    assert noise.load_key(tmp_path / "other.key") != key
    assert [file.name for file in path.parent.iterdir()] == ["noise.key"]
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o644)
        with pytest.raises(RunError, match="Others can read"):
            noise.load_key(path)
    path.chmod(0o600)
    path.write_bytes(key[:-1])
    with pytest.raises(RunError, match="holds 31 bytes, not 32"):
        noise.load_key(path)
