"""What the block scales of all formats share: Hessians of blocks, one value for each code."""

from __future__ import annotations

from torch import Tensor

from .. import block_quantize as bq
from .. import fp4


def block_hessians(x: Tensor, group_size: int) -> Tensor:
    """H_j = X_jᵀ X_j, float64 [K/group_size, group_size, group_size], of activations [..., K]."""
    k = x.shape[-1]
    if group_size < 1 or k % group_size:
        raise ValueError(f"block_hessians: K={k} is not a multiple of group_size={group_size}")
    columns = x.reshape(-1, k // group_size, group_size).movedim(1, 0).double()
    return columns.mT @ columns


def expand(per_block: Tensor, codes: Tensor, dim: int) -> Tensor:
    """One float32 value for each code."""
    values = fp4.scale_values(per_block)
    if not values.shape[dim] or codes.shape[dim] % values.shape[dim]:
        raise ValueError(
            f"dequantize: {values.shape[dim]} blocks do not divide size {codes.shape[dim]} "
            f"of dim={dim}"
        )
    return values.repeat_interleave(codes.shape[dim] // values.shape[dim], dim)


def hessian_goal(
    op: str, w: Tensor, dim: int, group_size: int | None, x: Tensor | None, hessian: Tensor | None
) -> bq.Goal:
    """The goal given by activations or by their Hessian blocks, whichever the caller passed."""
    if (x is None) == (hessian is None):
        raise ValueError(f"{op}: give either X or hessian")
    if x is not None:
        if x.shape[-1] != w.shape[dim]:
            raise ValueError(
                f"{op}: X has {x.shape[-1]} columns, dim={dim} of w has {w.shape[dim]}"
            )
        hessian = block_hessians(x, w.shape[dim] if group_size is None else group_size)
    return bq.Goal(hessian=hessian)
