"""Rules of distances: a coefficient for each client, from the cohort's inner products.

They need no coordinates, so they mean the same for products of factors, however a client writes its
factors. None of them uses the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedtune.combine import robust
from fedtune.combine.combine import Distances, above, at_least


@dataclass(frozen=True)
class Krum(Distances):
    """The one change nearest to its K-f-2 nearest others.

    Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
    NeurIPS 2017: squared distances over all tensors together. Ignores weights.
    """

    malicious: int = 1

    def __post_init__(self) -> None:
        """Refuse a negative count."""
        at_least("malicious", self.malicious, 0)

    @property
    def fewest(self) -> int:
        return 2 * self.malicious + 3

    def coefficients(self, gram: Tensor, clients: Sequence[str]) -> Tensor:
        order = robust.krum_order(robust.squared_distances(gram), self.malicious)
        return robust.mean_of(order[:1], len(gram))


@dataclass(frozen=True)
class MultiKrum(Distances):
    """The unweighted mean of the `chosen` changes with the best scores of Krum.

    Blanchard et al. 2017, section 4. All clients chosen: the unweighted mean. Ignores weights.
    """

    malicious: int = 1
    chosen: int = 2

    def __post_init__(self) -> None:
        """Refuse counts without meaning."""
        at_least("malicious", self.malicious, 0)
        at_least("chosen", self.chosen, 1)

    @property
    def fewest(self) -> int:
        return max(2 * self.malicious + 3, self.chosen)

    def coefficients(self, gram: Tensor, clients: Sequence[str]) -> Tensor:
        order = robust.krum_order(robust.squared_distances(gram), self.malicious)
        return robust.mean_of(order[: self.chosen], len(gram))


@dataclass(frozen=True)
class GeometricMedian(Distances):
    """The point of the least sum of distances, by smoothed Weiszfeld steps from the mean.

    Pillutla, Kakade and Harchaoui, "Robust Aggregation for Federated Learning" (RFA), 2019,
    https://arxiv.org/abs/1912.13445, algorithm 2, with equal weights: it ignores the examples'.
    """

    iterations: int = 8
    smoothing: float = 1e-6

    def __post_init__(self) -> None:
        """Refuse no steps and a division by zero."""
        at_least("iterations", self.iterations, 1)
        above("smoothing", self.smoothing, 0.0)

    def coefficients(self, gram: Tensor, clients: Sequence[str]) -> Tensor:
        return robust.weiszfeld(gram, self.iterations, self.smoothing)


@dataclass(frozen=True)
class NormBounded(Distances):
    """The unweighted mean of changes whose norm is cut to `norm`.

    Sun et al., "Can You Really Backdoor Federated Learning?", 2019,
    https://arxiv.org/abs/1911.07963. The norm is over adapter and head together; of two
    trained factors it is their product's, without the scaling alpha / r. Ignores weights.
    """

    norm: float

    def __post_init__(self) -> None:
        """Refuse a bound of 0."""
        above("norm", self.norm, 0.0)

    def coefficients(self, gram: Tensor, clients: Sequence[str]) -> Tensor:
        return robust.clipped(gram, self.norm, 1)


@dataclass(frozen=True)
class CenteredClipping(Distances):
    """v <- v + the unweighted mean of x_i - v, each cut to `norm`, some times from v = 0.

    Karimireddy, He and Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021,
    https://arxiv.org/abs/2012.10333. There v begins at the round before; a change begins at 0 here,
    so that a round depends on nothing but its replies. Ignores weights.
    """

    norm: float
    iterations: int = 3

    def __post_init__(self) -> None:
        """Refuse no steps and a bound of 0."""
        at_least("iterations", self.iterations, 1)
        above("norm", self.norm, 0.0)

    def coefficients(self, gram: Tensor, clients: Sequence[str]) -> Tensor:
        return robust.clipped(gram, self.norm, self.iterations)


@dataclass(frozen=True)
class DnC(Distances):
    """The unweighted mean without the `factor` f changes that stand out most along one direction.

    Shejwalkar and Houmansadr, "Manipulating the Byzantine" (divide and conquer), NDSS 2021,
    algorithm 2. The paper draws samples of the coordinates to save memory and keeps whom none
    drops; inner products see all coordinates at once, so one pass is enough. Ignores weights.
    """

    malicious: int = 1
    factor: float = 1.0

    def __post_init__(self) -> None:
        """Refuse counts without meaning."""
        at_least("malicious", self.malicious, 0)
        above("factor", self.factor, 0.0)

    @property
    def fewest(self) -> int:
        return max(2 * self.malicious, self._dropped) + 1

    @property
    def _dropped(self) -> int:
        return int(self.factor * self.malicious + 1e-9)

    def coefficients(self, gram: Tensor, clients: Sequence[str]) -> Tensor:
        return robust.mean_of(robust.least_along(gram, self._dropped), len(gram))


@dataclass(frozen=True)
class FLTrust(Distances):
    """The others' changes, weighted by their cosine with that of the client `root`, at its length.

    Cao et al., "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping", NDSS 2021,
    https://arxiv.org/abs/2012.13995. The paper's server trains on clean rows of its own; here a
    client that is trusted does, in every round. Where nobody's change points the root's way,
    nothing moves. Ignores the examples' weights.
    """

    root: str

    @property
    def fewest(self) -> int:
        return 2

    @property
    def trusted(self) -> str:
        return self.root

    def coefficients(self, gram: Tensor, clients: Sequence[str]) -> Tensor:
        return robust.trusted(gram, list(clients).index(self.root))
