"""Server optimizers: the joined delta of a round as the gradient of a step.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295,
algorithm 2: v begins at tau^2 and nothing is bias-corrected. Flower's FedAdagrad, FedAdam and
FedYogi begin v at 0, and its FedAdam corrects the bias with the exponent round + 1.

The moments are groups of the coordinator's state ("velocity", "first", "second"), so a checkpoint
holds them. Only tensors that were joined in a round are stepped, with their own moments: a factor
that rests in a round neither moves by an old momentum nor changes it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.adapter import State

STEPPED = ("adapter", "head")


@dataclass(frozen=True)
class ServerOptimizer(ABC):
    """A step from the state before a round to the one after it.

    Class attributes:
        groups: of the state that hold its moments, with the value that each begins at.
    """

    groups: ClassVar[tuple[str, ...]] = ()

    def step(self, before: State, after: State, names: Collection[str]) -> State:
        """The state after a round, the joined delta carried out as a step.

        Args:
            before: the coordinator's state before the round, with the moments.
            after: the same after the strategy joined the round's replies.
            names: of the tensors of adapter and head that were joined.
        """
        if not self.groups:
            return after
        state = {**after, **{group: dict(before.get(group, {})) for group in self.groups}}
        for part in STEPPED:
            if part not in before:
                continue
            moved = dict(after[part])
            for name in sorted(names & moved.keys()):
                x = before[part][name]
                delta = after[part][name].double() - x.double()
                moments = [
                    state[group][name].double()
                    if name in state[group]
                    else torch.full_like(delta, self.begin(group))
                    for group in self.groups
                ]
                step, moments = self.update(delta, moments)
                moved[name] = (x.double() + step).to(x.dtype)
                for group, moment in zip(self.groups, moments, strict=True):
                    state[group][name] = moment.to(x.dtype)
            state[part] = moved
        return state

    def begin(self, group: str) -> float:
        """What every entry of a group's moments is before the first step."""
        return 0.0

    @abstractmethod
    def update(self, delta: Tensor, moments: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(the step, the moments after it) of one tensor, in float64."""


@dataclass(frozen=True)
class NoOptimizer(ServerOptimizer):
    """The joined delta as it is: FedAvg."""

    def update(self, delta: Tensor, moments: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return delta, moments


@dataclass(frozen=True)
class Momentum(ServerOptimizer):
    """v <- beta v + delta; x <- x + rate v: FedAvgM.

    Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated
    Visual Classification", 2019, https://arxiv.org/abs/1909.06335. Not damped: deltas that stay the
    same come to move 1 / (1 - beta) times as far. beta = 0 and rate = 1 is FedAvg.
    """

    groups: ClassVar[tuple[str, ...]] = ("velocity",)
    beta: float = 0.9
    rate: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        _require(0 < self.rate < math.inf, "rate must be above 0 and finite")
        _require(0 <= self.beta < 1, "beta must be at least 0 and below 1")

    def update(self, delta: Tensor, moments: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        velocity = self.beta * moments[0] + delta
        return self.rate * velocity, [velocity]


@dataclass(frozen=True)
class Adaptive(ServerOptimizer):
    """m <- beta1 m + (1 - beta1) delta; x <- x + rate m / (sqrt(v) + tau).

    Attributes:
        rate: eta.
        beta1: of the first moment.
        tau: how little a step may be divided by; v begins at tau^2.
    """

    groups: ClassVar[tuple[str, ...]] = ("first", "second")
    rate: float = 0.1
    beta1: float = 0.9
    tau: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        _require(0 < self.rate < math.inf, "rate must be above 0 and finite")
        _require(0 < self.tau < math.inf, "tau must be above 0 and finite")
        _require(0 <= self.beta1 < 1, "beta1 must be at least 0 and below 1")

    def begin(self, group: str) -> float:
        return self.tau**2 if group == "second" else 0.0

    def update(self, delta: Tensor, moments: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        first = self.beta1 * moments[0] + (1 - self.beta1) * delta
        second = self.second(moments[1], delta.square())
        return self.rate * first / (second.sqrt() + self.tau), [first, second]

    @abstractmethod
    def second(self, v: Tensor, squared: Tensor) -> Tensor:
        """The second moment after a delta of these squares."""


@dataclass(frozen=True)
class Adagrad(Adaptive):
    """v <- v + delta^2: FedAdagrad; without first moment, as Reddi et al. and Flower run it."""

    beta1: float = 0.0

    def second(self, v: Tensor, squared: Tensor) -> Tensor:
        return v + squared


@dataclass(frozen=True)
class Adam(Adaptive):
    """v <- beta2 v + (1 - beta2) delta^2: FedAdam. Flower's begins v at 0 and corrects the bias."""

    beta2: float = 0.99

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        super().__post_init__()
        _require(0 <= self.beta2 < 1, "beta2 must be at least 0 and below 1")

    def second(self, v: Tensor, squared: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * squared


@dataclass(frozen=True)
class Yogi(Adaptive):
    """v <- v - (1 - beta2) delta^2 sign(v - delta^2): FedYogi. Flower's begins v at 0."""

    beta2: float = 0.99

    def __post_init__(self) -> None:
        """Refuse values without meaning."""
        super().__post_init__()
        _require(0 <= self.beta2 < 1, "beta2 must be at least 0 and below 1")

    def second(self, v: Tensor, squared: Tensor) -> Tensor:
        return v - (1 - self.beta2) * squared * torch.sign(v - squared)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


OPTIMIZERS: dict[str, type[ServerOptimizer]] = {
    "none": NoOptimizer,
    "momentum": Momentum,
    "adagrad": Adagrad,
    "adam": Adam,
    "yogi": Yogi,
}
