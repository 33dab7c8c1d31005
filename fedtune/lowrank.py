"""Products B A of LoRA factors, without a dense matrix.

A module's change is B A with B (d_out, rank) and A (rank, d_in); averaging factors is not averaging
products. A weighted sum of products is again one product, of stacked factors, and its singular
values are those of a small core. Everything is computed in float64 and returned in the dtype given.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.adapter import Adapter, pick


@dataclass(frozen=True)
class Product:
    """B (d_out, rank) times A (rank, d_in)."""

    B: Tensor
    A: Tensor

    def dense(self) -> Tensor:
        """The (d_out, d_in) matrix: for tests and tiny models."""
        return self.B.double() @ self.A.double()


def products(adapter: Adapter) -> Iterator[tuple[str, Product]]:
    """(module, product) of every adapted module.

    Raises:
        ValueError: a factor has no partner.
    """
    for name, a in adapter.items():
        if ".lora_A." in name:
            partner = _partner(name)
            if partner not in adapter:
                raise ValueError(f"'{name}' has no '{partner}'")
            yield name.split(".lora_A.")[0], Product(adapter[partner], a)


def with_products(adapter: Adapter, change: Callable[[str, Product], Product]) -> Adapter:
    """The adapter, each module's factors replaced by `change(module, factors)`."""
    changed = dict(adapter)
    for module, product in products(adapter):
        new = change(module, product)
        for key, tensor in (("A", new.A), ("B", new.B)):
            name = f"{module}.lora_{key}.weight"
            changed[name] = tensor.to(adapter[name].dtype)
    return changed


def stack(terms: Sequence[Product], weights: Sequence[float]) -> Product:
    """sum_i w_i B_i A_i as one product of rank sum_i r_i; the weights stand on B alone."""
    left = [weight * term.B.double() for term, weight in zip(terms, weights, strict=True)]
    return Product(torch.cat(left, dim=1), torch.cat([term.A.double() for term in terms]))


def svd(product: Product) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, k), S (k,), V^T (k, d_in) of B A with k = min(rank, d_out, d_in).

    QR of both factors leaves a core of the size of the rank. Of the two signs that a pair of
    vectors may have, it is the one that makes the largest entry of the right one positive: equal
    products give equal factors, whatever they were stacked of.

    Raises:
        ValueError: a factor is not finite.
    """
    b, a = product.B.double(), product.A.double()
    if not (torch.isfinite(b).all() and torch.isfinite(a).all()):
        raise ValueError("a factor holds NaN or infinity")
    left, right_of_left = torch.linalg.qr(b)
    right, left_of_right = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(right_of_left @ left_of_right.T, full_matrices=False)
    u, vt = left @ u, vt @ right.T
    largest = vt.abs().argmax(dim=1, keepdim=True)
    signs = torch.where(vt.gather(1, largest) < 0, -1.0, 1.0).to(vt)
    return u * signs.T, s, vt * signs


def truncate(product: Product, rank: int, *, balanced: bool) -> Product:
    """The best approximation of B A of at most `rank` (Eckart and Young 1936), zeros beyond.

    Args:
        product: of any rank.
        rank: of the result's factors.
        balanced: B = U sqrt(S) and A = sqrt(S) V^T; else B = U S and A = V^T, whose rows are
            orthonormal.
    """
    u, s, vt = svd(product)
    kept = min(rank, len(s))
    u, s, vt = u[:, :kept], s[:kept], vt[:kept]
    b, a = (u * s.sqrt(), s.sqrt().unsqueeze(1) * vt) if balanced else (u * s, vt)
    missing = rank - kept
    return Product(
        torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))
    )


def factors(adapter: Adapter) -> frozenset[str]:
    """The names of all factors whose partner is there too."""
    first = {name for name in adapter if ".lora_A." in name and _partner(name) in adapter}
    return frozenset(first | {_partner(name) for name in first})


def _partner(name: str) -> str:
    return name.replace(".lora_A.", ".lora_B.")


def changes(before: Adapter, delta: Adapter) -> dict[str, Product]:
    """The change of each module's product of which `delta` moves both factors.

    (B + dB)(A + dA) - B A = [dB, B] [A + dA; dA]: of twice the rank, and without the difference of
    two large products, in which a small change would be lost.
    """
    moved = {}
    for module, d in products(pick(delta, factors(delta))):
        a, b = (before[f"{module}.lora_{key}.weight"].double() for key in ("A", "B"))
        d_a, d_b = d.A.double(), d.B.double()
        moved[module] = Product(torch.cat([d_b, b], dim=1), torch.cat([a + d_a, d_a]))
    return moved


def gram(terms: Sequence[Mapping[str, Product]]) -> Tensor:
    """<X_i, X_j> = sum over modules of tr((B_i^T B_j)(A_j A_i^T)), (clients, clients) float64.

    Args:
        terms: module -> product of each client, of the same modules and any ranks.
    """
    count = len(terms)
    inner = torch.zeros(count, count, dtype=torch.float64)
    for module in terms[0] if terms else ():
        own = [term[module] for term in terms]
        columns = torch.cat([product.B.double() for product in own], dim=1)
        rows = torch.cat([product.A.double() for product in own])
        whose = torch.cat([torch.full((len(p.A),), i) for i, p in enumerate(own)])
        for i, product in enumerate(own):
            traces = (product.B.double().T @ columns) * (product.A.double() @ rows.T)
            inner[i].index_add_(0, whose, traces.sum(dim=0))
    return (inner + inner.T) / 2
