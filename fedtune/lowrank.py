"""Products B A of LoRA factors, without a dense matrix.

A module's change is B A with B (d_out, rank) and A (rank, d_in); averaging factors is not averaging
products. A weighted sum of products is again one product, of stacked factors, and its singular
values are those of a small core. Everything is computed in float64 and returned in the dtype given.
"""

import math
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
            changed[name] = tensor.to(adapter[name].dtype).contiguous()
    return changed


def stack(terms: Sequence[Product], weights: Sequence[float]) -> Product:
    """sum_i w_i B_i A_i as one product of rank sum_i r_i; the weights stand on B alone."""
    left = [weight * term.B.double() for term, weight in zip(terms, weights, strict=True)]
    return Product(torch.cat(left, dim=1), torch.cat([term.A.double() for term in terms]))


def mean_products(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Product]:
    """sum_i w_i B_i A_i / sum_i w_i of every module, as stacked factors in float64.

    Args:
        adapters: of any ranks, of the same modules.
        weights: above 0.
    """
    terms = [dict(products(adapter)) for adapter in adapters]
    shares = [weight / sum(weights) for weight in weights]
    return {module: stack([term[module] for term in terms], shares) for module in terms[0]}


def mean_product(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The same under PEFT's names, in the dtype of the first adapter."""
    return named(mean_products(adapters, weights), adapters[0])


def residual(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Product]:
    """The mean of the products minus the product of the means, of rank (K - 1) r at most.

    sum_i p_i B_i A_i - B-bar A-bar = sum_{i<K} p_i (B_i - B-bar)(A_i - A_K), since the B_i - B-bar
    add up to zero. Modules where it is zero, by equal A or for K = 1, are left out.
    """
    terms = [dict(products(adapter)) for adapter in adapters]
    shares = [weight / sum(weights) for weight in weights]
    left: dict[str, Product] = {}
    for module, last in terms[-1].items():
        own = [term[module] for term in terms]
        mean = sum(p * term.B.double() for p, term in zip(shares, own, strict=True))
        parts = [Product(t.B.double() - mean, t.A.double() - last.A.double()) for t in own[:-1]]
        if any(bool(part.B.any() and part.A.any()) for part in parts):
            left[module] = stack(parts, shares[:-1])
    return left


def moved_most(before: Adapter, after: Adapter, share: float) -> Adapter:
    """Masks of the ranks whose products moved most, over all modules, where one factor was frozen.

    Rank i of a module moved by |dB[:, i] A[i, :]|, or by |B[:, i] dA[i, :]|, in the Frobenius norm.

    Args:
        before: the adapter at first.
        after: the same after training.
        share: of all ranks, at least one.

    Returns:
        For each lora_A (rank, 1) and each lora_B (1, rank) of ones and zeros.
    """
    own, theirs = dict(products(before)), dict(products(after))
    scores = []
    for module, was in own.items():
        b, a = was.B.double(), was.A.double()
        moved_b = (theirs[module].B.double() - b).norm(dim=0) * a.norm(dim=1)
        moved_a = (theirs[module].A.double() - a).norm(dim=1) * b.norm(dim=0)
        scores.append(moved_b + moved_a)
    flat = torch.cat(scores)
    chosen = torch.zeros_like(flat)
    count = max(1, round(share * len(flat)))
    chosen[torch.sort(flat, descending=True, stable=True).indices[:count]] = 1.0
    masks = {}
    parts = torch.split(chosen, [len(part) for part in scores])
    for module, part in zip(own, parts, strict=True):
        masks[f"{module}.lora_A.weight"] = part.unsqueeze(1)
        masks[f"{module}.lora_B.weight"] = part.unsqueeze(0)
    return masks


def added(base: Adapter, change: Adapter) -> Adapter:
    """The sum of both products, stacked; each may lack modules.

    A stack of more ranks than the matrix has is brought down to them, which loses nothing.
    """
    sums = dict(products(base))
    for module, own in products(change):
        whole = stack([sums[module], own], [1.0, 1.0]) if module in sums else own
        most = min(whole.B.shape[0], whole.A.shape[1])
        sums[module] = truncate(whole, most, balanced=True) if len(whole.A) > most else whole
    return named(sums, {**base, **change})


def keep_energy(adapter: Adapter, energy: float) -> Adapter:
    """The first singular values of every module, until their squares sum to the share `energy`."""
    kept = {}
    for module, product in products(adapter):
        u, s, vt = svd(product)
        kept[module] = split(u, s, vt, max(1, energy_rank(s, energy)), balanced=True)
    return named(kept, adapter)


def energy_rank(s: Tensor, energy: float) -> int:
    """How many of the descending singular values have the share `energy` of their squares' sum.

    Those that are rounding beside the largest do not count, even for a share of 1.
    """
    genuine = int((s > len(s) * torch.finfo(s.dtype).eps * s[0]).sum())
    if energy >= 1:
        return genuine
    squares = s.square().cumsum(0)
    return min(genuine, int((squares < energy * squares[-1]).sum()) + 1)


def named(modules: Mapping[str, Product], like: Adapter) -> Adapter:
    """Products under PEFT's names, in the dtype of `like`."""
    adapter: Adapter = {}
    for module, product in modules.items():
        for key, tensor in (("A", product.A), ("B", product.B)):
            name = f"{module}.lora_{key}.weight"
            adapter[name] = tensor.to(like[name].dtype).contiguous()
    return adapter


def product_norm(adapter: Adapter) -> float:
    """The Frobenius norm of all modules' products together: |B A|^2 = sum((B^T B) * (A A^T))."""
    total = 0.0
    for _, product in products(adapter):
        b, a = product.B.double(), product.A.double()
        total += float(((b.T @ b) * (a @ a.T)).sum())
    return math.sqrt(max(total, 0.0))


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
    return _signed(left @ u, s, vt @ right.T)


def _signed(u: Tensor, s: Tensor, vt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    largest = vt.abs().argmax(dim=1, keepdim=True)
    signs = torch.where(vt.gather(1, largest) < 0, -1.0, 1.0).to(vt)
    return u * signs.T, s, vt * signs


def principal(matrix: Tensor, rank: int) -> Product:
    """The best approximation of a dense matrix of at most `rank`, split evenly, zeros beyond."""
    u, s, vt = _signed(*torch.linalg.svd(matrix.double(), full_matrices=False))
    return split(u, s, vt, rank, balanced=True)


def truncate(product: Product, rank: int, *, balanced: bool) -> Product:
    """The best approximation of B A of at most `rank` (Eckart and Young 1936), zeros beyond.

    Args:
        product: of any rank.
        rank: of the result's factors.
        balanced: see `split`.
    """
    return split(*svd(product), rank, balanced=balanced)


def split(u: Tensor, s: Tensor, vt: Tensor, rank: int, *, balanced: bool) -> Product:
    """The first `rank` components of U S V^T as two factors, zeros beyond.

    Args:
        u: (d_out, k).
        s: (k,), descending.
        vt: (k, d_in).
        rank: of the factors.
        balanced: B = U sqrt(S) and A = sqrt(S) V^T; else B = U S and A = V^T, whose rows are
            orthonormal.
    """
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
