"""Products B A of LoRA factors, without a dense matrix.

A module's change is B A with B (d_out, rank) and A (rank, d_in); averaging factors is not averaging
products. A weighted sum of products is again one product, of stacked factors, and its singular
values are those of a small core. Everything is computed in float64 and returned in the dtype given.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.adapter import Adapter


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
            partner = name.replace(".lora_A.", ".lora_B.")
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


def mean_product(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """sum_i w_i B_i A_i / sum_i w_i of every module, as stacked factors.

    Args:
        adapters: of any ranks, of the same modules.
        weights: above 0.
    """
    terms = [dict(products(adapter)) for adapter in adapters]
    shares = [weight / sum(weights) for weight in weights]
    stacked = {module: stack([term[module] for term in terms], shares) for module in terms[0]}
    return _adapter(stacked, adapters[0])


def added(base: Adapter, change: Adapter) -> Adapter:
    """The sum of both products, stacked; `base` may be {}.

    A stack of more ranks than the matrix has is brought down to them, which loses nothing.
    """
    before = dict(products(base))
    sums = {}
    for module, own in products(change):
        whole = stack([before[module], own], [1.0, 1.0]) if module in before else own
        most = min(whole.B.shape[0], whole.A.shape[1])
        sums[module] = truncate(whole, most, balanced=True) if len(whole.A) > most else whole
    return _adapter(sums, change)


def keep_energy(adapter: Adapter, energy: float) -> Adapter:
    """The first singular values of every module, until their squares sum to the share `energy`."""
    kept = {}
    for module, product in products(adapter):
        squares = svd(product)[1].square().cumsum(0)
        rank = int((squares < energy * squares[-1]).sum()) + 1
        kept[module] = truncate(product, min(rank, len(squares)), balanced=True)
    return _adapter(kept, adapter)


def _adapter(modules: dict[str, Product], like: Adapter) -> Adapter:
    """Products under PEFT's names, in the dtype of `like`."""
    named: Adapter = {}
    for module, product in modules.items():
        for key, tensor in (("A", product.A), ("B", product.B)):
            name = f"{module}.lora_{key}.weight"
            named[name] = tensor.to(like[name].dtype)
    return named


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
