"""Cutting tensors into blocks and solving every block: what stands between scales/ and the maths.

`in_blocks` shapes and chunks; a solver turns blocks [B, g] into scales, zeros and codes, treats
blocks of zeros and blocks that are not finite, and hands the others to scale_search.py.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import fp4, reference
from . import scale_search as search

# float64 elements of one temporary of a search, which holds about ten of them.
_CHUNK_ELEMENTS = 1 << 22
_CHUNK_ELEMENTS_ON_GPU = 1 << 24
# Blocks up to this size are searched by Triton on a GPU, larger ones by PyTorch there too: those
# of FP4 lie in registers, a Hessian in shared memory, and one program takes long for a large one.
_TRITON_MAX_GROUP = 1 << 16
_TRITON_MAX_FP4 = 256
_TRITON_MAX_HESSIAN = 128


@dataclass(frozen=True)
class Goal:
    """What to minimise for all blocks of a tensor; NAIVE takes the naive scale instead."""

    exact: bool = True
    weights: Tensor | None = None  # broadcasts to the tensor
    hessian: Tensor | None = None  # [K/g, g, g]


NAIVE = Goal(exact=False)


@dataclass(frozen=True)
class Blocks:
    """Blocks [B, g] that share a goal, as a solver gets them."""

    x: Tensor  # [B, g] float32
    exact: bool
    weights: Tensor | None  # [B, g] float64
    hessian: Tensor | None  # [g, g] float64, or [J, g, g]: block i belongs to the (i % J)th

    def error(self, approximation: Tensor) -> Tensor:
        """The goal's value for each block, [B] float64."""
        r = self.x.double() - approximation
        return search.block_error(r, self.weights, self.hessian)


# scales [B] float32, zeros [B] int32 or None, codes [B, g]
Result = tuple[Tensor, Tensor | None, Tensor]
Solver = Callable[[Blocks], Result]


def in_blocks(
    op: str,
    w: Tensor,
    dim: int,
    group_size: int | None,
    solver: Solver,
    expansion: int,
    goal: Goal,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``solver`` on chunks of w's blocks; scales, zeros and int8 codes back in w's order.

    ``expansion``: float64 numbers that the search holds for each element of a block.
    """
    if not w.is_floating_point() or w.ndim == 0:
        raise TypeError(
            f"{op}: expected a floating-point tensor of at least one dimension, "
            f"got {w.dtype} {tuple(w.shape)}"
        )
    check_dim(op, w, dim)
    rows = w.detach().movedim(dim, -1)
    k = rows.shape[-1]
    g = k if group_size is None else group_size
    if g < 1 or k % g:
        raise ValueError(f"{op}: size {k} of dim={dim} is not a multiple of group_size={g}")
    blocks = rows.float().reshape(math.prod(rows.shape[:-1]), k // g, g)
    n, j = blocks.shape[:2]
    weights, hessian = _aligned(op, w, dim, blocks, goal)

    scales, zeros = w.new_empty(n, j, dtype=torch.float32), w.new_zeros(n, j, dtype=torch.int32)
    codes = w.new_empty(n, j, g, dtype=torch.int8)
    # Under a Hessian only the blocks of one column are alike; the kernels can tell them apart.
    by_column = hessian is not None and not _by_triton(blocks, hessian)
    width = 1 if by_column else max(j, 1)
    if _by_triton(blocks, hessian):
        expansion = 1
    chunk_elements = _CHUNK_ELEMENTS_ON_GPU if w.is_cuda else _CHUNK_ELEMENTS
    step = max(1, chunk_elements // (expansion * g * width))
    for left in range(0, j, width):
        for top in range(0, n, step):
            part = slice(top, top + step), slice(left, left + width)
            chunk = Blocks(
                blocks[part].reshape(-1, g),
                goal.exact,
                None if weights is None else weights[part].reshape(-1, g).double(),
                hessian[left] if hessian is not None and by_column else hessian,
            )
            s, z, q = solver(chunk)
            scales[part] = s.view_as(scales[part])
            codes[part] = q.to(torch.int8).view_as(codes[part])
            if z is not None:
                zeros[part] = z.view_as(zeros[part])
    per_block = (*rows.shape[:-1], j)
    return (
        scales.view(per_block).movedim(-1, dim),
        zeros.view(per_block).movedim(-1, dim),
        codes.view(rows.shape).movedim(-1, dim),
    )


def check_dim(op: str, t: Tensor, dim: int) -> None:
    if not -t.ndim <= dim < t.ndim:
        raise ValueError(f"{op}: dim={dim} is none of a tensor of shape {tuple(t.shape)}")


def _aligned(
    op: str, w: Tensor, dim: int, blocks: Tensor, goal: Goal
) -> tuple[Tensor | None, Tensor | None]:
    """The goal's weights in the shape of ``blocks`` and its Hessian, checked."""
    weights, hessian = goal.weights, goal.hessian
    if weights is not None:
        try:
            weights = weights.expand(w.shape)
        except RuntimeError:
            raise ValueError(
                f"{op}: weights is {tuple(weights.shape)}, w {tuple(w.shape)}; it must broadcast"
            ) from None
        if not bool((weights >= 0).all()):
            raise ValueError(f"{op}: weights must be >= 0, the smallest is {float(weights.min())}")
        weights = weights.movedim(dim, -1).reshape(blocks.shape)
    if hessian is not None:
        expected = (*blocks.shape[1:], blocks.shape[-1])
        if tuple(hessian.shape) != expected:
            raise ValueError(f"{op}: hessian is {tuple(hessian.shape)}, expected {expected}")
        if not bool(hessian.isfinite().all()):
            raise ValueError(f"{op}: the Hessian holds an infinity or a NaN")
        hessian = hessian.to(w.device, torch.float64)
    return weights, hessian


def _by_triton(x: Tensor, hessian: Tensor | None) -> bool:
    """Whether the searches in triton/ take blocks [..., g]; for FP4 see `_by_fp4_kernel`."""
    largest = _TRITON_MAX_GROUP if hessian is None else _TRITON_MAX_HESSIAN
    return x.is_cuda and x.shape[-1] <= largest and importlib.util.find_spec("triton") is not None


def _fp4_solver(grid: Tensor, start: Callable[[Tensor], Tensor], global_scale: float) -> Solver:
    """``start``: largest magnitude [B] -> index into ``grid`` of the naive scale."""

    def solve(blocks: Blocks) -> Result:
        if blocks.exact and _by_fp4_kernel(blocks):
            from .triton import scale_search as kernels

            s, codes = kernels.grid_search(blocks.x, global_scale, grid, blocks.weights)
            return s, None, codes
        x = blocks.x.double() * global_scale
        amax = x.abs().amax(-1)
        usable = amax.isfinite() & (amax > 0)
        index = start(amax).clamp(0, grid.numel() - 1).where(usable, 0)
        if blocks.exact and amax.numel():
            # In place of the others a block whose best scale is known and found at once.
            searched = torch.where(usable[:, None], x, fp4.E2M1_MAX * grid[0])
            index = _grid_search(blocks, searched, index, grid)
        unusable = torch.where(amax == 0, 1.0, torch.full_like(amax, torch.nan))
        scale = torch.where(usable, grid[index], unusable)
        return scale.float(), None, fp4.encode_e2m1(x / scale[:, None])

    return solve


def _by_fp4_kernel(blocks: Blocks) -> bool:
    g = blocks.x.shape[-1]
    fits = g <= _TRITON_MAX_FP4 and g & (g - 1) == 0
    return fits and blocks.hessian is None and _by_triton(blocks.x, None)


def _grid_search(blocks: Blocks, x: Tensor, start: Tensor, grid: Tensor) -> Tensor:
    """Index of the best scale for x, which is blocks.x times the global scale."""
    if blocks.hessian is not None and _by_triton(x, blocks.hessian):
        return _no_worse(blocks.hessian, x, start, grid)
    return search.grid_search(
        x,
        start,
        grid,
        fp4.round_e2m1,
        fp4.E2M1_MAX,
        0.25,
        weights=blocks.weights,
        hessian=blocks.hessian,
    )


def _no_worse(hessian: Tensor, x: Tensor, start: Tensor, grid: Tensor) -> Tensor:
    """What the kernel finds in float32, and ``start`` where float64 says that it is better."""
    from .triton import hessian_search as kernels

    found = kernels.grid_search(x, start, grid, hessian)
    errors = []
    for index in (found, start):
        s = grid[index][:, None]
        errors.append(search.block_error(x - s * fp4.round_e2m1(x / s), None, hessian))
    return torch.where(errors[0] <= errors[1], found, start)


def nvfp4_solver(op: str, device: torch.device, global_scale: float) -> Solver:
    if not 0 < global_scale < float("inf"):
        raise ValueError(f"{op}: global_scale={global_scale} is not a positive number")

    def start(amax: Tensor) -> Tensor:
        # Code 1 is the smallest positive e4m3: no block but one of zeros loses its scale.
        return fp4.encode_e4m3(amax / fp4.E2M1_MAX).view(torch.uint8).long() - 1

    return _fp4_solver(fp4.e4m3_grid(device), start, global_scale)


def mxfp4_solver(device: torch.device) -> Solver:
    def start(amax: Tensor) -> Tensor:
        # The exponent of the largest magnitude less that of the largest element, 4 = 2^2.
        return fp4.encode_e8m0_floor(amax).view(torch.uint8).long() - 2

    # 6·2^126 and 4·2^127 are beyond float32: stop at 2^125.
    return _fp4_solver(fp4.e8m0_grid(device)[:-2], start, 1.0)


def integer_solver(bits: int, symmetric: bool) -> Solver:
    """Symmetric codes of ``bits``, or u4 with an integer zero."""

    def solve(blocks: Blocks) -> Result:
        scale, zero = reference.quantization_parameters(blocks.x, bits, symmetric)
        if blocks.exact and blocks.x.numel():
            scale, zero = _best_integer(blocks, scale, zero, bits)
        codes = reference.quantize(blocks.x, scale, zero, bits, None)
        return scale.squeeze(-1), None if zero is None else zero.squeeze(-1), codes

    return solve


def _best_integer(
    blocks: Blocks, scale: Tensor, zero: Tensor | None, bits: int
) -> tuple[Tensor, Tensor | None]:
    """(scale, zero) [B, 1]: the better of those given and the optimum over all of them."""
    if blocks.hessian is None and _by_triton(blocks.x, None):
        from .triton import integer_search as kernels

        qmax = reference.code_range(bits, zero is None)[1]
        return kernels.improve(blocks.x, scale, zero, qmax, blocks.weights)
    usable = (blocks.x.isfinite().all(-1) & (blocks.x != 0).any(-1))[:, None]
    # In place of the others one whose best scale, 1, is known and found at once.
    part = replace(blocks, x=torch.where(usable, blocks.x, 1.0))
    start = torch.where(usable, scale, 1.0)
    if zero is None:
        found, _ = _best_symmetric(part, start, bits)
        return torch.where(usable, found, scale), None
    found, found_zero = _best_asymmetric(part, start, torch.where(usable, zero, 0))
    return torch.where(usable, found, scale), torch.where(usable, found_zero, zero)


def _integer_error(blocks: Blocks, bits: int, scale: Tensor, zero: Tensor | None) -> Tensor:
    q = reference.quantize(blocks.x, scale, zero, bits, None).double()
    return blocks.error((q if zero is None else q - zero) * scale.double())


def _sweeps(blocks: Blocks, error: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    """Best scale [B, len(ranges)] float32 for codes within each range, given an error reached."""
    if _by_triton(blocks.x, blocks.hessian) and blocks.hessian is not None:
        from .triton import hessian_search as kernels

        return kernels.sweep(blocks.x, ranges, blocks.hessian, error)
    x = blocks.x.double()
    budget = search.residual_budget(error, blocks.hessian)
    if blocks.hessian is None:
        return search.sweep(x, ranges, budget, blocks.weights).float()
    found = [search.sweep_hessian(x, limits, blocks.hessian, budget) for limits in ranges]
    return torch.stack(found, -1).float()


def _best_symmetric(blocks: Blocks, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale, error) of the better of ``scale`` [B, 1] and the optimum over all scales."""
    error = _integer_error(blocks, bits, scale, None)
    qmax = reference.QMAX[bits]
    found = _sweeps(blocks, error, [(-qmax, qmax)])
    for candidate in _with_neighbours(found, blocks):
        s = torch.where(candidate.isfinite() & (candidate > 0), candidate, scale)
        e = _integer_error(blocks, bits, s, None)
        scale = torch.where((e < error)[:, None], s, scale)
        error = torch.minimum(e, error)
    return scale, error


def _best_asymmetric(blocks: Blocks, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, zero) [B, 1]: the better of those given and the optimum over all of them."""
    error = _integer_error(blocks, 4, scale, zero)
    found = _sweeps(blocks, error, [(-z, 15 - z) for z in range(16)])
    for candidates in _with_neighbours(found, blocks):
        for z in range(16):
            candidate = candidates[:, z : z + 1]
            s = torch.where(candidate.isfinite() & (candidate > 0), candidate, scale)
            zeros = torch.full_like(zero, z)
            e = _integer_error(blocks, 4, s, zeros)
            better = (e < error)[:, None]
            scale, zero = torch.where(better, s, scale), torch.where(better, zeros, zero)
            error = torch.minimum(e, error)
    return scale, zero


def _with_neighbours(scales: Tensor, blocks: Blocks) -> list[Tensor]:
    """``scales``, and under a Hessian the two float32 numbers on either side of them.

    There the best scale may lie at the edge of an interval of constant codes. Rounding it to
    float32 may cross that edge, and so may the division by its neighbour.
    """
    found = [scales]
    if blocks.hessian is not None:
        for end in (scales.new_tensor(0.0), scales.new_tensor(torch.inf)):
            near = scales.nextafter(end)
            found += [near, near.nextafter(end)]
    return found
