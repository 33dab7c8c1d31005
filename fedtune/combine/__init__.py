"""Every rule that joins a cohort's deltas by its name in a recipe.

Krum and its kin give each client a coefficient; the median and its kin look at each entry alone.
"""

from fedtune.combine.combine import DISTANCES, EVERY, MEAN, Combine, Family, Mean
from fedtune.combine.coordinates import Bulyan, Median, TrimmedMean
from fedtune.combine.distances import (
    CenteredClipping,
    DnC,
    FLTrust,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormBounded,
)

__all__ = ["COMBINES", "DISTANCES", "EVERY", "MEAN", "Combine", "Family", "Mean"]

COMBINES: dict[str, type[Combine]] = {
    "mean": Mean,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "krum": Krum,
    "multi_krum": MultiKrum,
    "bulyan": Bulyan,
    "geometric_median": GeometricMedian,
    "norm_bounded": NormBounded,
    "centered_clipping": CenteredClipping,
    "dnc": DnC,
    "fltrust": FLTrust,
}
