"""Robust choices from inner products alone.

Every function takes a cohort's Gram matrix G, G_ij = <x_i, x_j> of the clients' changes in float64,
and returns coefficients c or a choice: the joined change is sum_i c_i x_i. So no rule needs to know
what the changes are, the factors of a product or plain coordinates. Distances come from G with an
error near 1e-8 of the changes' norms: too coarse only to tell apart clients that say the same.
"""

import torch
from torch import Tensor


def squared_distances(gram: Tensor) -> Tensor:
    """|x_i - x_j|^2 = G_ii + G_jj - 2 G_ij, (clients, clients)."""
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp(min=0)


def distances_to(gram: Tensor, coefficients: Tensor) -> Tensor:
    """|x_i - sum_j c_j x_j| of each client."""
    inner = gram @ coefficients
    squared = gram.diagonal() - 2 * inner + coefficients @ inner
    return squared.clamp(min=0).sqrt()


def mean_of(chosen: list[int], clients: int) -> Tensor:
    """The coefficients of the mean of some of the clients."""
    coefficients = torch.zeros(clients, dtype=torch.float64)
    coefficients[chosen] = 1 / len(chosen)
    return coefficients


def krum_order(squared: Tensor, malicious: int) -> list[int]:
    """Clients by Krum's score, the best first.

    The score is the sum of the K - f - 2 smallest squared distances to other clients, at least one.
    With one, two clients that are each other's nearest have the same: their next distances decide,
    so that the order of clients does not matter.
    """
    others = squared + torch.diag(torch.full((len(squared),), torch.inf, dtype=squared.dtype))
    neighbours = max(1, len(squared) - malicious - 2)
    nearest = others.sort(dim=1).values
    scores = nearest[:, :neighbours].sum(dim=1).tolist()
    further = nearest.tolist()
    return sorted(range(len(scores)), key=lambda i: (scores[i], further[i]))


def bulyan_choice(squared: Tensor, malicious: int) -> list[int]:
    """The K - 2 f clients that Krum chooses one after another, each from those that are left."""
    left, chosen = list(range(len(squared))), []
    for _ in range(len(squared) - 2 * malicious):
        best = krum_order(squared[left][:, left], malicious)[0]
        chosen.append(left.pop(best))
    return sorted(chosen)


def weiszfeld(gram: Tensor, iterations: int, smoothing: float) -> Tensor:
    """Smoothed Weiszfeld steps towards the geometric median, from the mean.

    c_i is proportional to 1 / max(nu, |x_i - z|) with z the point before; no step makes the sum of
    smoothed distances larger.
    """
    coefficients = mean_of(list(range(len(gram))), len(gram))
    for _ in range(iterations):
        inverse = 1 / distances_to(gram, coefficients).clamp(min=smoothing)
        coefficients = inverse / inverse.sum()
    return coefficients


def clipped(gram: Tensor, norm: float, iterations: int) -> Tensor:
    """V <- v + mean_i (x_i - v) min(1, norm / |x_i - v|), from v = 0."""
    coefficients = torch.zeros(len(gram), dtype=torch.float64)
    for _ in range(iterations):
        away = distances_to(gram, coefficients)
        shares = torch.where(away > norm, norm / away, 1.0)
        coefficients = coefficients + (shares - shares.sum() * coefficients) / len(gram)
    return coefficients


def least_along(gram: Tensor, dropped: int) -> list[int]:
    """All but the clients with the `dropped` largest projections on the top singular vector.

    The vector is that of the centred changes. The squared projections on it are the first
    eigenvalue of their Gram matrix times the squared entries of its eigenvector.
    """
    means = gram.mean(dim=0)
    centred = gram - means[:, None] - means[None, :] + means.mean()
    top = torch.linalg.eigh(centred).eigenvectors[:, -1]
    order: list[int] = top.abs().argsort(stable=True).tolist()
    return sorted(order[: len(gram) - dropped])


def trusted(gram: Tensor, root: int) -> Tensor:
    """Each other client by ReLU(cos(x_i, x_root)), its change given the length of x_root.

    All zeros where no client points the root's way.
    """
    norms = gram.diagonal().clamp(min=0).sqrt()
    length = norms[root]
    known = (norms > 0) & (length > 0)
    cosines = torch.where(known, gram[root] / (norms * length).where(known, 1.0), 0.0)
    weights = cosines.clamp(min=0)
    weights[root] = 0.0
    total = weights.sum()
    if not total:
        return torch.zeros_like(weights)
    return weights / total * length / norms.where(known, 1.0)
