"""Formulas found wrong in public code, beside the right ones, on the same updates.

Each is written here from its description (`where` says whose it is), as what it does to a module:
from the clients' factors to the dense change that the model then has, scaling s = alpha / r
included. The measure is the distance from s sum_i p_i B_i A_i over its norm, all modules together.
What a right formula does not reach either, as the mean of factors, stands in its own column.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedtune.lowrank import Product, mean_product, products, truncate
from recording import Recorded

ALPHA = 16.0
FEDIT, EXACT, BEST = "the mean of each factor", "exact", "the best of rank r"


@dataclass(frozen=True)
class Round:
    """One module's clients.

    Attributes:
        terms: B_i and A_i, in float64.
        p: weights that sum to 1.
        s: alpha / r.
    """

    terms: Sequence[Product]
    p: Sequence[float]
    s: float

    @property
    def rank(self) -> int:
        """Of a client's factors, the largest."""
        return max(len(term.A) for term in self.terms)

    def mean(self, *, weights: Sequence[float] | None = None) -> Tensor:
        """sum_i w_i B_i A_i, w = p where it is not given."""
        weights = self.p if weights is None else weights
        parts = [w * term.dense() for w, term in zip(weights, self.terms, strict=True)]
        return torch.stack(parts).sum(dim=0)

    def factors(self, *, weights: Sequence[float] | None = None) -> Product:
        """(sum_i w_i B_i, sum_i w_i A_i), w = p where it is not given."""
        weights = self.p if weights is None else weights
        pairs = list(zip(weights, self.terms, strict=True))
        return Product(
            torch.stack([w * term.B for w, term in pairs]).sum(dim=0),
            torch.stack([w * term.A for w, term in pairs]).sum(dim=0),
        )

    @property
    def uniform(self) -> list[float]:
        """1 / K each."""
        return [1 / len(self.terms)] * len(self.terms)


@dataclass(frozen=True)
class Defect:
    """One formula.

    Attributes:
        where: the repository, by its name and commit.
        what: the formula, in words.
        ours: what the right formula reaches: one of the three words above.
        change: what it makes of a module, scaling included.
        shape: "any", or what it needs of the factors: "square", or "mixed" ranks.
    """

    where: str
    what: str
    ours: str
    change: Callable[[Round], Tensor]
    shape: str = "any"


def _residual(round: Round) -> Tensor:
    return round.mean() - round.factors().dense()


def _first_client(round: Round) -> Tensor:
    return round.s * round.p[0] ** 2 * round.terms[0].dense()


def _half_a_svd(round: Round) -> Tensor:
    """U sqrt(S) V^T: a square root of the singular values is lost."""
    u, sigma, vt = torch.linalg.svd(round.mean(), full_matrices=False)
    r = round.rank
    return round.s * (u[:, :r] * sigma[:r].sqrt()) @ vt[:r]


def _qr_cut(round: Round) -> Tensor:
    q, r = torch.linalg.qr(round.mean())
    return round.s * q[:, : round.rank] @ r[: round.rank]


def _best(round: Round) -> Tensor:
    u, sigma, vt = torch.linalg.svd(round.mean(), full_matrices=False)
    return (u[:, : round.rank] * sigma[: round.rank]) @ vt[: round.rank]


def _linear(round: Round) -> Tensor:
    """sqrt(w_i s) on both factors: for two clients it has their cross products too."""
    roots = [math.sqrt(p * round.s) for p in round.p]
    return round.factors(weights=roots).dense()


def _other_means(round: Round) -> Tensor:
    """Factors by weighted means, what is added for their error by uniform ones."""
    left = round.mean(weights=round.uniform) - round.factors(weights=round.uniform).dense()
    return round.s * (round.factors().dense() + left)


def _own_scalings(round: Round) -> list[float]:
    return [ALPHA / len(term.A) for term in round.terms]


FEDERATED_LLM, FACTORY = "ATP-1010/FederatedLLM@7bea158", "boyi-liu/FedLLM-Factory@6a06799"
RB_LORA, FEDEX = "seonha01/rb-lora@99cdb5a", "RaghavSinghal10/fedex-lora@683a3f3"
DEFECTS = (
    Defect(
        FEDERATED_LLM,
        "FedIT: a misspelt name leaves the first client, its weight on both factors",
        FEDIT,
        _first_client,
    ),
    Defect(
        FEDERATED_LLM,
        "zero padding: the adapter's alpha becomes 32 times the largest rank",
        FEDIT,
        lambda round: 32 * round.factors().dense(),
    ),
    Defect(
        RB_LORA,
        "FLoRA: the stack has no weights",
        EXACT,
        lambda round: round.s * round.mean(weights=[1.0] * len(round.p)),
    ),
    Defect(
        "none read; what a stack invites",
        "FLoRA: the stack has the weights on both factors",
        EXACT,
        lambda round: round.s * round.mean(weights=[p * p for p in round.p]),
    ),
    Defect(
        FACTORY,
        "FLoRA: the stack joins the base without alpha / r",
        EXACT,
        lambda round: round.mean(),
    ),
    Defect(
        FACTORY,
        "FedEx-LoRA: the residual joins the base without alpha / r",
        EXACT,
        lambda round: round.s * round.factors().dense() + _residual(round),
    ),
    Defect(
        FACTORY,
        "FedMomentum: what is beyond rank r joins the base without alpha / r",
        EXACT,
        lambda round: round.mean() + (round.s - 1) * _best(round),
    ),
    Defect(
        FACTORY,
        "FedEx-LoRA: weighted means of factors, uniform ones in the residual",
        EXACT,
        _other_means,
    ),
    Defect(
        FEDEX,
        "FedEx-LoRA: the residual is transposed, which square modules do not notice",
        EXACT,
        lambda round: round.s * (round.factors().dense() + _residual(round).T),
        "square",
    ),
    Defect(FACTORY, "FlexLoRA: returns U sqrt(S) and V", BEST, _half_a_svd),
    Defect("ILoRA, arXiv:2511.16069", "cut to rank r by QR, not by SVD", BEST, _qr_cut),
    Defect(
        "huggingface/peft@5d602fd",
        "add_weighted_adapter's `linear` taken for FedIT's mean",
        FEDIT,
        _linear,
    ),
    Defect(
        RB_LORA,
        "mixed ranks: divides by alpha / r_i what was never multiplied by it",
        EXACT,
        lambda round: round.mean(),
        "mixed",
    ),
)


def drawn(*, square: bool = False, ranks: Sequence[int] = (4,) * 5, seed: int = 0) -> list[Round]:
    """One module of 48 x 40, or 48 x 48, and five clients of independent normal factors."""
    draws = torch.Generator().manual_seed(seed)
    m, n = 48, 48 if square else 40
    terms = [
        Product(
            torch.randn(m, rank, generator=draws, dtype=torch.float64),
            torch.randn(rank, n, generator=draws, dtype=torch.float64),
        )
        for rank in ranks
    ]
    weights = [2.0, 3.0, 4.0, 5.0, 6.0]
    return [Round(terms, [w / sum(weights) for w in weights], 2.0)]


def of_recorded(recorded: Recorded) -> list[Round]:
    """The modules of a recorded round."""
    total = sum(client.weight for client in recorded.clients)
    p = [client.weight / total for client in recorded.clients]
    ended = [dict(products(client.ended)) for client in recorded.clients]
    return [
        Round(
            [Product(one[module].B.double(), one[module].A.double()) for one in ended],
            p,
            recorded.scaling,
        )
        for module in ended[0]
    ]


def ideal_of(defect: Defect, round: Round) -> Tensor:
    """S sum_i p_i B_i A_i; with mixed ranks at a fixed alpha, each client with its own s_i."""
    if defect.shape == "mixed":
        scaled = [p * s for p, s in zip(round.p, _own_scalings(round), strict=True)]
        return round.mean(weights=scaled)
    return round.s * round.mean()


def right(defect: Defect, round: Round) -> Tensor:
    """What FedTune's formula makes of it: FLoRA's stack, FlexLoRA's cut or FedIT's means."""
    if defect.ours == FEDIT:
        return round.s * round.factors().dense()
    scalings = _own_scalings(round) if defect.shape == "mixed" else [round.s] * len(round.p)
    # An adapter that was trained elsewhere is imported on one scale: B_i s_i / s.
    imported = [
        {"x.lora_A.weight": term.A, "x.lora_B.weight": term.B * s / round.s}
        for term, s in zip(round.terms, scalings, strict=True)
    ]
    stacked = dict(products(mean_product(imported, round.p)))["x"]
    if defect.ours == BEST:
        stacked = truncate(stacked, round.rank, balanced=True)
    return round.s * stacked.dense()


def errors(defect: Defect, rounds: Sequence[Round]) -> tuple[float, float]:
    """(ours, theirs): relative distances from the ideal, over all modules."""
    sums = [0.0, 0.0, 0.0]
    for round in rounds:
        ideal = ideal_of(defect, round)
        found = (right(defect, round) - ideal, defect.change(round) - ideal, ideal)
        sums = [a + float(b.square().sum()) for a, b in zip(sums, found, strict=True)]
    return math.sqrt(sums[0] / sums[2]), math.sqrt(sums[1] / sums[2])


def table(recorded: Recorded | None) -> list[dict[str, Any]]:
    """Every defect on drawn clients, and on a recorded round's where it has the shape."""
    lines = []
    for defect in DEFECTS:
        mixed = defect.shape == "mixed"
        ranks = (4, 8, 16, 4, 8) if mixed else (4,) * 5
        ours, theirs = errors(defect, drawn(square=defect.shape == "square", ranks=ranks))
        line: dict[str, Any] = {"where": defect.where, "what": defect.what, "right": defect.ours}
        line |= {"drawn_ours": ours, "drawn_theirs": theirs}
        if recorded is not None and not mixed:
            rounds = of_recorded(recorded)
            if defect.shape == "square":
                rounds = [r for r in rounds if len(r.terms[0].B) == r.terms[0].A.shape[1]]
            if rounds:
                line["ours"], line["theirs"] = errors(defect, rounds)
        lines.append(line)
    return lines
