"""The audit of mechanisms: twelve planted faults are found, and mechanisms without one pass.

The faults are those of real code: each is a release path with one step of it changed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtune import parts
from fedtune.adapter import State
from fedtune.audits import draws, mechanism
from fedtune.audits.checks import checked
from fedtune.audits.paths import Central, Path, Released, Step, Trained
from fedtune.config import Experiment
from fedtune.privacy import central, clipping, noise
from fedtune.privacy import mechanism as promises
from fedtune.privacy.clipping import norm
from fedtune.strategies.strategy import Update
from server import joining

COUNT = 1000  # draws of each side: half of an audit's, and enough for these faults
POPULATION = 3
RECIPE = Experiment.from_flat(
    {
        "privacy.mode": "client",
        "privacy.noise": 2.0,
        "privacy.clip": 0.5,
        "privacy.delta": 1e-5,
        "privacy.minimum_clients": 2,
        "weighting": "uniform",
        "strategy": "fedit",
        "server_optimizer": "adam(rate=1.0)",
    }
)
SHAPES = {f"model.query.lora_{factor}.weight": (4, 4) for factor in "AB"}
LOCAL = RECIPE.replace(privacy__mode="local", privacy__noise=4.0)
RECORD = RECIPE.replace(
    privacy__mode="record", server_optimizer="none", train__batch_size=3, train__steps=1
)


def path_of(experiment: Experiment, kind: type[Central] = Central) -> Path:
    """The release path, or one with a fault."""
    resolved = parts.resolve(experiment)
    if experiment.privacy.mode == "client":
        own = promises.client(experiment, resolved.cohort, POPULATION)
    else:
        local = experiment.privacy.mode == "local"
        own = promises.local(experiment) if local else promises.record(experiment, POPULATION)
    weights = mechanism.far(SHAPES | {"classifier.bias": (3,)}, own.clip)
    path = mechanism.path_of(experiment, resolved, own, weights)
    return kind(**vars(path)) if kind is not Central else path


def broken(path: Path, count: int = COUNT) -> dict[str, str]:
    """Measure -> what is wrong, of those that contradict the claim."""
    return {check.measure.name: check.broken for check in checked(path, count) if check.broken}


def keyed(path: Central, inputs: str, key: bytes, sigma: float) -> Callable[[str, Tensor], Tensor]:
    """Noise as it should be."""
    return lambda name, like: sigma * noise.gaussian(key, like.shape, inputs, name)


def release(
    path: Central,
    updates: Sequence[Update],
    drawn: Callable[[str, Tensor], Tensor],
    denominator: float = POPULATION,
    bound: Callable[[State], State] | None = None,
    weights: Sequence[float] = (),
) -> central.Release:
    """The noisy mean with whatever is wrong in it."""
    held = bound or (lambda state: clipping.clipped(state, path.clip)[0])
    own = [held(update.state) for update in updates]
    scales = weights or [1.0] * len(own)
    mean: State = {}
    for group, tensors in path.schema().items():
        for name, like in tensors.items():
            total = torch.zeros(like.shape, dtype=torch.float64)
            for scale, state in zip(scales, own, strict=True):
                total += scale * state[group][name].double()
            mean.setdefault(group, {})[name] = ((total + drawn(name, like)) / denominator).float()
    return central.Release(Update("cohort", 1.0, mean), path.clip, path.mechanism.sigma, 0, 0, 0)


class NumExamples(Central):
    """Clients are weighted by the examples that they claim, and nothing bounds those."""

    def weight(self, client: Trained) -> float:
        return float(client.examples)

    def mean(self, updates: Sequence[Update], inputs: str, key: bytes) -> central.Release:
        mean = sum(update.weight for update in updates) / len(updates)
        weights = [update.weight / mean for update in updates]
        drawn = keyed(self, inputs, key, self.mechanism.sigma)
        return release(self, updates, drawn, weights=weights)


class Replies(Central):
    """The sum is divided by the number of replies."""

    def mean(self, updates: Sequence[Update], inputs: str, key: bytes) -> central.Release:
        drawn = keyed(self, inputs, key, self.mechanism.sigma)
        return release(self, updates, drawn, denominator=len(updates))


class AfterOptimizer(Central):
    """The optimizer steps with the mean itself, and its step gets the noise."""

    def released(self, collected: tuple[list[Update], str], key: bytes) -> Released:
        updates, inputs = collected
        quiet = release(self, updates, lambda _, like: torch.zeros(like.shape))
        before = {"adapter": self.server["adapter"], "head": self.server["head"]}
        after = joining.join(self.parts, self.server, [quiet.update], 1)
        sigma = self.mechanism.sigma / self.mechanism.denominator
        drawn = keyed(self, inputs, key, sigma)
        noisy = {
            name: (after[group][name] - tensor + drawn(name, tensor)).flatten().float()
            for group, tensors in before.items()
            for name, tensor in tensors.items()
        }
        return Released(noisy)


class Twice(Central):
    """The noise is divided by the cohort, and then the noisy sum is."""

    def mean(self, updates: Sequence[Update], inputs: str, key: bytes) -> central.Release:
        return release(self, updates, keyed(self, inputs, key, self.mechanism.sigma / POPULATION))


def tensor_by_tensor(state: State, clip: float) -> State:
    """Each tensor within the clip, all of them together not."""
    return {
        group: {name: clipping.clipped({"": {"": t}}, clip)[0][""][""] for name, t in own.items()}
        for group, own in state.items()
    }


class PerTensor(Central):
    """Every tensor has the clip for itself, and the noise counts it once."""

    def update(self, client: Trained) -> Update:
        return Update(client.name, 1.0, tensor_by_tensor(sent(self, client), self.clip))

    def mean(self, updates: Sequence[Update], inputs: str, key: bytes) -> central.Release:
        drawn = keyed(self, inputs, key, self.mechanism.sigma)
        return release(self, updates, drawn, bound=lambda state: state)


def sent(path: Central, client: Trained) -> State:
    """A client's change before anything bounds it."""
    groups = path.schema().items()
    return {group: {name: client.change[name] for name in own} for group, own in groups}


def bypassing(state: State, clip: float) -> State:
    """A comparison that a norm which is no number passes."""
    size = norm(state)
    if size > clip and not math.isinf(size):
        return {g: {n: t * (clip / size) for n, t in own.items()} for g, own in state.items()}
    return state


class Bypass(Central):
    """NaN is not above the clip, so it is not clipped."""

    def update(self, client: Trained) -> Update:
        return Update(client.name, 1.0, bypassing(sent(self, client), self.clip))

    def mean(self, updates: Sequence[Update], inputs: str, key: bytes) -> central.Release:
        drawn = keyed(self, inputs, key, self.mechanism.sigma)
        return release(self, updates, drawn, bound=lambda state: bypassing(state, self.clip))


class GlobalNoise(Central):
    """Noise of the process's own generator, which whoever seeds it knows."""

    def mean(self, updates: Sequence[Update], inputs: str, key: bytes) -> central.Release:
        sigma = self.mechanism.sigma
        return release(
            self, updates, lambda _, like: sigma * torch.from_numpy(np.random.randn(*like.shape))
        )


class KeyOrder(Central):
    """What a client trained is taken minus the tensor that stands at its place, not of its name."""

    def update(self, client: Trained) -> Update:
        _, plan = self.turn(client)
        start = plan.start["adapter"]
        trained = {
            name: start[name] + client.change[name] for name in client.change if name in start
        }
        pairs = zip(trained.items(), start.values(), strict=True)
        apart = {name: tensor - other for (name, tensor), other in pairs}
        factor = min(1.0, self.clip / norm({"": apart}))
        held = {n: (trained[n] - apart[n] * (1 - factor)) - start[n] for n in trained}
        head = {name: torch.zeros(t.shape) for name, t in self.schema()["head"].items()}
        return Update(client.name, 1.0, {"delta": held, "head": head})

    def mean(self, updates: Sequence[Update], inputs: str, key: bytes) -> central.Release:
        drawn = keyed(self, inputs, key, self.mechanism.sigma)
        return release(self, updates, drawn, bound=lambda state: state)


class HalfPrecision(Central):
    """Noise in sixteen bits."""

    def mean(self, updates: Sequence[Update], inputs: str, key: bytes) -> central.Release:
        drawn = keyed(self, inputs, key, self.mechanism.sigma)
        return release(self, updates, lambda name, like: drawn(name, like).half())


class NoiseOnB(Central):
    """A is sent as it is."""

    def mean(self, updates: Sequence[Update], inputs: str, key: bytes) -> central.Release:
        drawn = keyed(self, inputs, key, self.mechanism.sigma)
        return release(
            self, updates, lambda name, like: drawn(name, like) * float("lora_A" not in name)
        )


class Absolute(Central):
    """The weights are clipped, and not their change."""

    def update(self, client: Trained) -> Update:
        _, plan = self.turn(client)
        change = sent(self, client)
        begun = {"delta": plan.start["adapter"], "head": plan.start["head"]}
        weights = {g: {n: t + change[g][n] for n, t in own.items()} for g, own in begun.items()}
        held, _ = clipping.clipped(weights, self.clip)
        return Update(
            client.name,
            1.0,
            {g: {n: t - begun[g][n] for n, t in own.items()} for g, own in held.items()},
        )

    def mean(self, updates: Sequence[Update], inputs: str, key: bytes) -> central.Release:
        drawn = keyed(self, inputs, key, self.mechanism.sigma)
        return release(self, updates, drawn, bound=lambda state: state)


class Metric(Central):
    """Clients tell how long their changes were, and their mean is published."""

    def collected(self, clients: Sequence[Trained]) -> Any:
        sizes = [norm({"": dict(client.change)}) for client in clients]
        return super().collected(clients), torch.tensor([sum(sizes) / len(sizes)])

    def released(self, collected: Any, key: bytes) -> Released:
        private, told = collected
        done = super().released(private, key)
        return Released(done.mean, {**done.more, "norm": told})


EPSILON = "epsilon of one release, at least"
SHIFT = "the canary's shift of the sum, over the clip"
SPREAD = "noise over the claimed noise, least tensor"
MUTANTS: list[tuple[type[Central], str]] = [
    (NumExamples, EPSILON),
    (Replies, "noise with the canary over noise without"),
    (AfterOptimizer, EPSILON),
    (Twice, EPSILON),
    (PerTensor, SHIFT),
    (Bypass, "released numbers that are not finite"),
    (GlobalNoise, "correlation of two keys' noise after the same global seeds"),
    (KeyOrder, EPSILON),
    (HalfPrecision, "grain of the noise over its size"),
    (NoiseOnB, SPREAD),
    (Absolute, EPSILON),
    (Metric, EPSILON),
]


def test_there_are_twelve_faults() -> None:
    assert len({kind for kind, _ in MUTANTS}) == 12


@pytest.mark.parametrize(("kind", "check"), MUTANTS, ids=[kind.__name__ for kind, _ in MUTANTS])
def test_a_planted_fault_is_found(kind: type[Central], check: str) -> None:
    """By the check that is made for it, whatever else sees it too."""
    assert check in broken(path_of(RECIPE, kind))


@pytest.mark.parametrize(
    "experiment",
    [
        RECIPE,
        RECIPE.replace(strategy="ffa_lora", server_optimizer="none", privacy__noise=0.5),
        RECIPE.replace(strategy="fedsvd", server_optimizer="none", privacy__noise=8.0),
        RECIPE.replace(privacy__clip_quantile=0.5, strategy="rolora"),
        RECIPE.replace(cohort="fixed(size=2)", privacy__noise=4.0, privacy__clip=30.0),
        LOCAL,
        LOCAL.replace(privacy__noise=1.0, privacy__clip=1e-4),
        RECORD,
        RECORD.replace(privacy__noise=0.43, privacy__clip=10.0),
    ],
    ids=["fedit", "ffa", "fedsvd", "quantile", "fixed", "local", "quiet", "record", "strong"],
)
def test_a_mechanism_without_a_fault_passes(experiment: Experiment) -> None:
    found = checked(path_of(experiment), COUNT)
    assert [check.broken for check in found if check.broken] == []
    assert any(check.seen for check in found if check.control), "a quarter of the noise shows"


@dataclass(frozen=True)
class QuietStep(Step):
    """A record's step with less noise than it says."""

    def released(self, collected: tuple[dict[str, Tensor], str], key: bytes) -> Released:
        louder = replace(self.mechanism, noise=self.mechanism.noise * 0.8)
        return Step(louder, self.shapes).released(collected, key)


@dataclass(frozen=True)
class Reusing(Step):
    """Noise that does not depend on what it hides."""

    def released(self, collected: tuple[dict[str, Tensor], str], key: bytes) -> Released:
        return super().released((collected[0], "always the same"), key)


def test_faults_of_a_records_step_are_found() -> None:
    path = path_of(RECORD)
    assert isinstance(path, Step)
    assert SPREAD in broken(QuietStep(**vars(path)))
    assert "correlation of one key's noise on other data" in broken(Reusing(**vars(path)))


def test_a_finding_is_the_same_each_time_and_leaves_global_generators_alone() -> None:
    path = path_of(RECORD)
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    assert checked(path, 200) == checked(path, 200)
    assert (torch.rand(1).item(), np.random.rand()) == expected


def test_a_bound_is_the_formula() -> None:
    """3,000 against 300 of 3,000, delta 0.01: two exact intervals from binomtest."""
    from scipy.stats import binomtest

    low = binomtest(2700, 3000).proportion_ci(method="exact").low
    high = binomtest(300, 3000).proportion_ci(method="exact").high
    found = draws.bound(np.array([2700.0]), np.array([300.0]), 3000, 0.01)
    assert found[0] == pytest.approx(math.log((low - 0.01) / high))
    assert draws.bound(np.array([1.0]), np.array([2.0]), 3000, 0.0)[0] == 0.0


def test_a_bound_is_wrong_as_seldom_as_it_says() -> None:
    """Randomised response has its epsilon exactly, so every excess is a false alarm."""
    epsilon, runs, count = 1.0, 400, 2000
    share = math.exp(epsilon) / (1 + math.exp(epsilon))
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(runs):
        sides = [(generator.random((count, 1)) < p).astype(float) for p in (share, 1 - share)]
        wrong += draws.separation(*sides, delta=0.0).epsilon > epsilon
    assert wrong / runs <= 0.05


def test_a_bound_comes_near_a_gaussians_epsilon() -> None:
    """z = 2: 1.99 for delta 1e-5 (privacy.md, oracles B); one threshold sees about a third."""
    generator = np.random.default_rng(1)
    present, absent = generator.normal(0.5, 1, (6000, 1)), generator.normal(0, 1, (6000, 1))
    assert 0.4 < draws.separation(present, absent, 1e-5).epsilon < 1.99
    assert draws.separation(present * 10, absent, 1e-5).epsilon > 4


@pytest.mark.parametrize("bits", [6, 10, 14])
def test_the_grain_of_a_grid_is_its_step(bits: int) -> None:
    values = np.random.default_rng(2).normal(0, 3, (2000, 20))
    found = draws.grain(np.round(values * 2**bits / 3) * 3 / 2**bits, np.full(20, 3.0))
    assert found.low <= 2.0**-bits * 1.1
    assert found.high >= 2.0**-bits * 0.9
    assert found.value == pytest.approx(2.0**-bits, rel=0.5)
    assert draws.grain(values, np.full(20, 3.0)).value < 1e-6


def test_a_spread_has_its_interval() -> None:
    values = np.random.default_rng(3).normal(7, 2.0, (500, 30))
    found = draws.deviation(values)
    assert found.low < 2.0 < found.high
    assert found.high - found.low < 0.06


def test_a_ratio_of_spreads_has_its_interval() -> None:
    """Two samples of deviation 3 and 2: the ratio is 1.5 to a percent or two."""
    generator = np.random.default_rng(5)
    sides = [draws.deviation(generator.normal(0, s, (500, 30))) for s in (3.0, 2.0)]
    found = draws.ratio(*sides)
    assert 1.46 < found.low < 1.5 < found.high < 1.54
    assert draws.ratio(draws.deviation(np.zeros((9, 2))), sides[0]).high == 0.0


def test_correlation_of_what_is_the_same_and_of_what_is_not() -> None:
    values = np.random.default_rng(4).normal(0, 1, (50, 40))
    assert draws.correlation(values, values).low > 0.99
    assert abs(draws.correlation(values, values[::-1]).value) < 0.1
    assert draws.correlation(values * 0, values).value == 0.0
