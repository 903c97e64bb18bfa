"""What the block scales of all formats share: Hessians of blocks, one value for each code."""

from __future__ import annotations

from torch import Tensor

from .. import block_quantize as bq
from .. import fp4
from ..ops._library import INTEGERS, require_device, require_dtype


def block_hessians(x: Tensor, group_size: int, op: str = "block_hessians") -> Tensor:
    """H_j = X_jᵀ X_j, float64 [K/group_size, group_size, group_size], of activations [..., K]."""
    k = x.shape[-1]
    if group_size < 1 or k % group_size:
        raise ValueError(f"{op}: K={k} is not a multiple of group_size={group_size}")
    columns = x.reshape(-1, k // group_size, group_size).movedim(1, 0).double()
    return columns.mT @ columns


def expand(op: str, name: str, per_block: Tensor, codes: Tensor, dim: int) -> Tensor:
    """One float32 value for each code, of the scales or zeros ``name``."""
    require_dtype(op, "codes", codes.dtype, INTEGERS)
    bq.check_dim(op, codes, dim)
    require_device(op, codes, **{name: per_block})
    size, other = codes.shape[dim], list(codes.shape)
    blocks = other[dim] = per_block.shape[dim] if per_block.ndim == codes.ndim else 0
    if list(per_block.shape) != other:
        raise ValueError(
            f"{op}: {name} has shape {tuple(per_block.shape)}, codes {tuple(codes.shape)}; "
            f"they must be the same but for dim={dim}"
        )
    if size % max(blocks, 1) or (size and not blocks):
        raise ValueError(f"{op}: {blocks} blocks do not divide size {size} of dim={dim}")
    return fp4.scale_values(per_block).repeat_interleave(size // max(blocks, 1), dim)


def hessian_goal(
    op: str, w: Tensor, dim: int, group_size: int | None, x: Tensor | None, hessian: Tensor | None
) -> bq.Goal:
    """The goal given by activations or by their Hessian blocks, whichever the caller passed."""
    if (x is None) == (hessian is None):
        raise ValueError(f"{op}: give either X or hessian")
    if x is not None:
        bq.check_dim(op, w, dim)
        if x.ndim == 0 or x.shape[-1] != w.shape[dim]:
            raise ValueError(
                f"{op}: X has shape {tuple(x.shape)}; dim={dim} of w has {w.shape[dim]}"
            )
        hessian = block_hessians(x, w.shape[dim] if group_size is None else group_size, op)
    return bq.Goal(hessian=hessian)
