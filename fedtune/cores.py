"""A small matrix C between a module's two LoRA factors: its change is B C A.

C = diag(s_1 H_1, ..., s_h H_h) has h heads of equal size, each with a square block H and a scale s.
Both are tensors beside the factors, in a state's group "core": `{module}.core.blocks` (h, k, k) and
`{module}.core.scales` (h,), with h k ranks. Where one of them is missing its place is taken by
identities, or by ones.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedtune.adapter import Adapter
from fedtune.lowrank import Product, with_products

BLOCKS, SCALES = ".core.blocks", ".core.scales"


def modules_of(core: Mapping[str, Tensor]) -> list[str]:
    """The modules that have a core, in order."""
    return list(dict.fromkeys(name.rsplit(".core.", 1)[0] for name in core))


def between(blocks: Tensor | None, scales: Tensor | None, rank: int) -> Tensor:
    """C, (..., rank, rank), differentiable in both.

    Args:
        blocks: (..., heads, k, k), or None for identities.
        scales: (..., heads), or None for ones.
        rank: heads times k.
    """
    if blocks is None:
        assert scales is not None
        return torch.diag_embed(scales.repeat_interleave(rank // scales.shape[-1], dim=-1))
    own = blocks if scales is None else blocks * scales[..., None, None]
    each = torch.eye(own.shape[-3], dtype=own.dtype, device=own.device)
    return torch.einsum("...hij,hg->...higj", own, each).reshape(*own.shape[:-3], rank, rank)


def gradients(
    gradient: Tensor, blocks: Tensor | None, scales: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What a loss's gradient by C is by (blocks, scales): the chain rule, for each row.

    Args:
        gradient: (rows, rank, rank).
        blocks: (heads, k, k), or None.
        scales: (heads,), or None.
    """
    some = blocks if blocks is not None else scales
    assert some is not None
    heads, rank = len(some), gradient.shape[-1]
    cut = gradient.reshape(len(gradient), heads, rank // heads, heads, rank // heads)
    own = torch.einsum("rhihj->rhij", cut)  # off the diagonal C is constant
    if blocks is None:
        return None, own.diagonal(dim1=2, dim2=3).sum(2)
    if scales is None:
        return own, None
    return own * scales[:, None, None], (own * blocks).sum((2, 3))


def matrix(core: Mapping[str, Tensor], module: str, rank: int) -> Tensor:
    """The module's C, (rank, rank)."""
    return between(core.get(module + BLOCKS), core.get(module + SCALES), rank)


def merged(core: Adapter) -> Adapter:
    """The blocks s H: the same C with all scales one."""
    return {
        name: tensor * core[name.replace(BLOCKS, SCALES)][:, None, None]
        if name.replace(BLOCKS, SCALES) in core
        else tensor
        for name, tensor in core.items()
        if name.endswith(BLOCKS)
    }


def folded(adapter: Adapter, core: Adapter) -> Adapter:
    """An ordinary adapter of the same change: B C in the place of B, summed in float64."""
    modules = set(modules_of(core))

    def fold(module: str, product: Product) -> Product:
        if module not in modules:
            return product
        return Product(
            product.B.double() @ matrix(core, module, len(product.A)).double(), product.A
        )

    return with_products(adapter, fold)
