"""FedIT: average both factors.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", 2023,
https://arxiv.org/abs/2305.05644. Clients train A and B from the global factors; the server averages
each factor. The product of the means is not the mean of the products unless all A or all B agree.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedtune.combine import DISTANCES, Family
from fedtune.strategies.strategy import Strategy


@dataclass(frozen=True)
class FedIT(Strategy):
    """The mean of A and the mean of B, weighted by examples: what the interface does by itself."""

    combines: ClassVar[frozenset[Family]] = DISTANCES
