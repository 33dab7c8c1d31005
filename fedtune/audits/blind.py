"""Whether two groups of rows differ by themselves, seen by a classifier that knows no model.

Members and others that come from different times or places can be told apart by their words; a
model's losses then differ between them without any memory. What a bag of words finds by
cross-validation, no audit may claim.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

from fedtune.audits.ranking import Scores
from fedtune.dealing import permutation
from fedtune.tasks.task import Example

FOLDS = 5
RIDGE = 1.0
WORDS = 20_000  # the most frequent


def guesses(
    first: Sequence[Example], second: Sequence[Example], seed: int
) -> tuple[Scores, Scores]:
    """How much each row looks like one of `first`, by words and label alone.

    Each score comes from a logistic regression on the other folds, in which both groups weigh the
    same.
    """
    rows = [*first, *second]
    mine = np.arange(len(rows)) < len(first)
    features = bag(rows)
    fold = np.empty(len(rows), dtype=np.int64)
    for group in (True, False):
        own = np.flatnonzero(mine == group)
        order = permutation(len(own), seed, "folds", int(group))
        fold[own[order]] = np.arange(len(own)) % FOLDS
    scores = np.empty(len(rows))
    for number in range(FOLDS):
        test = fold == number
        weights = fitted(features[~test], mine[~test])
        scores[test] = features[test] @ weights
    return scores[mine], scores[~mine]


def bag(rows: Sequence[Example]) -> csr_matrix:
    """Which tokens and labels a row has, and a constant, one column each."""
    found = [
        {
            *((0, token) for token in row["input_ids"]),
            *((1, label) for label in row.get("label", [])),
        }
        for row in rows
    ]
    frequent = Counter(feature for own in found for feature in own).most_common(WORDS)
    places = {feature: place for place, (feature, _) in enumerate(frequent, start=1)}
    columns = [[0, *sorted(places[f] for f in own if f in places)] for own in found]
    bounds = np.cumsum([0, *map(len, columns)])
    flat = np.concatenate(columns)
    return csr_matrix((np.ones(len(flat)), flat, bounds), shape=(len(rows), len(places) + 1))


def fitted(features: csr_matrix, mine: NDArray[np.bool_]) -> Scores:
    """The weights of a logistic regression with a ridge penalty, the groups weighing the same."""
    sign = np.where(mine, 1.0, -1.0)
    share = np.where(mine, mine.mean(), 1 - mine.mean())
    each = 0.5 / share

    def loss(weights: Scores) -> tuple[float, Scores]:
        margin = sign * (features @ weights)
        slope = -sign * each / (1 + np.exp(np.clip(margin, -500, 500)))
        value = float((each * np.logaddexp(0, -margin)).sum() + RIDGE * (weights @ weights) / 2)
        return value, features.T @ slope + RIDGE * weights

    found = minimize(loss, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B")
    weights: Scores = found.x
    return weights
