"""The Triton searches against the float64 ones: on the GPU, or under Triton's interpreter.

The interpreter must be chosen before triton is imported, so without a GPU one test runs this whole
file again in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from intlass_ops import block_quantize, fp4, reference, scales
from intlass_ops import scale_search as search
from intlass_ops.cuda import cubin

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"
runs_kernels = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="runs in the interpreter below")


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests run directly")
def test_all_under_the_interpreter() -> None:
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, str(Path(__file__))], env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr


def blocks(seed: int, count: int, g: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, g, generator=rng)
    x[1::4] = x[1::4] ** 3
    x[2::4, 0] *= 30
    x[3::4, g // 2 :] = 0
    return (x * torch.rand(count, 1, generator=rng).mul(12).sub(6).exp2()).to(DEVICE)


def weights_for(x: Tensor, weighted: bool) -> Tensor | None:
    if not weighted:
        return None
    w = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) ** 3
    w[:, 1] = 0
    return w.double().to(x.device)


def fp4_error(x: Tensor, s: Tensor, weights: Tensor | None) -> Tensor:
    x, s = x.double(), s[:, None]
    return search.block_error(x - s * fp4.round_e2m1(x / s), weights)


@runs_kernels
@pytest.mark.parametrize("g", [16, 32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("grid_name", ["e4m3", "e8m0"])
def test_grid_search_is_the_float64_search(g: int, weighted: bool, grid_name: str) -> None:
    from intlass_ops.triton import scale_search as kernels

    x = blocks(g, 4999 if CUDA else 16, g)
    weights = weights_for(x, weighted)
    grid = (fp4.e4m3_grid() if grid_name == "e4m3" else fp4.e8m0_grid()[:-2]).to(DEVICE)
    by = 1.37 if grid_name == "e4m3" else 1.0
    wide = x.double() * by
    start = torch.searchsorted(grid, wide.abs().amax(-1) / 6).clamp(max=grid.numel() - 1)
    args = (fp4.round_e2m1, 6.0, 0.25)
    exact = search.grid_search(wide, start, grid, *args, weights=weights)
    x[3:5] = torch.tensor([[-0.0], [torch.nan]], device=DEVICE)
    x[4, 1:] = 1
    s, codes = kernels.grid_search(x, by, grid, weights)
    assert s[3] == 1
    assert s[4].isnan()
    assert codes[3:5].unique().tolist() == [0, 8]
    searched = torch.ones(x.shape[0], dtype=torch.bool, device=DEVICE)
    searched[3:5] = False
    wide, found, exact = wide[searched], s[searched].double(), grid[exact[searched]]
    weights = None if weights is None else weights[searched]
    error, least = (fp4_error(wide, one, weights) for one in (found, exact))
    # Errors that differ by the order of their sums alone may change places.
    assert torch.allclose(error, least, rtol=1e-14, atol=0)
    assert (found != exact).sum() <= found.numel() // 1000
    assert torch.equal(codes[searched].to(torch.uint8), fp4.encode_e2m1(wide / found[:, None]))


@runs_kernels
def test_grid_search_over_the_range_of_float32() -> None:
    from intlass_ops.triton import scale_search as kernels

    x = blocks(0, 16, 32)
    x = x / x.abs().amax(-1, keepdim=True) * torch.logspace(-38, 38, 16, device=DEVICE)[:, None]
    grid = fp4.e8m0_grid()[:-2].to(DEVICE)
    start = fp4.encode_e8m0_floor(x.abs().amax(-1)).view(torch.uint8).long() - 2
    start = start.clamp(min=0)
    exact = search.grid_search(x.double(), start, grid, fp4.round_e2m1, 6.0, 0.25)
    assert torch.equal(kernels.grid_search(x, 1.0, grid)[0], grid[exact].float())


@runs_kernels
@pytest.mark.parametrize(
    ("kind", "g", "weighted"),
    [
        ("int4", 16, False),
        ("int4", 100, True),
        ("int4", 600, False),
        ("int8", 16, False),
        ("int8", 128, True),
        ("uint4", 32, False),
        ("uint4", 128, True),
    ],
)
def test_integer_search_is_as_good_as_the_float64_sweep(kind: str, g: int, weighted: bool) -> None:
    from intlass_ops.triton import integer_search as kernels

    bits, symmetric = (8 if kind == "int8" else 4), kind != "uint4"
    x = blocks(g, 400 if CUDA else 9 if (kind, g) == ("int4", 16) else 2, g)
    if kind == "int4" and g == 16:
        x[5:9] = torch.tensor([[0.0], [torch.nan], [torch.inf], [2.0**-149]], device=DEVICE)
    weights = weights_for(x, weighted)
    start = reference.quantization_parameters(x, bits, symmetric)
    scale, zero = kernels.improve(
        x, *start, 15 if kind == "uint4" else 2 ** (bits - 1) - 1, weights
    )
    if kind == "int4" and g == 16:
        assert torch.equal(scale[5:8].nan_to_num(), start[0][5:8].nan_to_num())

    # On the CPU the search is that in PyTorch.
    keep = (x.isfinite().all(-1) & (x != 0).any(-1)).cpu()
    part = block_quantize.Blocks(
        x.cpu()[keep], True, None if weights is None else weights.cpu()[keep], None
    )
    cut = [None if p is None else p.cpu()[keep] for p in (*start, scale, zero)]
    exact = block_quantize._best_integer(part, cut[0], cut[1], bits)
    errors = [block_quantize._integer_error(part, bits, *p) for p in (exact, cut[2:], cut[:2])]
    least, error, first = errors
    size = search.block_error(part.x.double(), part.weights)
    # float32 scales, as in test_scales.py
    assert (error <= least * (1 + 4e-6) + 1e-6 * (least * size).sqrt() + 1e-12 * size).all()
    assert (error <= first).all()


def gram(seed: int, g: int, rank: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(g, g, generator=rng, dtype=torch.float64) * 0.5 + torch.eye(g)
    x = torch.randn(rank, g, generator=rng, dtype=torch.float64) @ mix
    return (x.T @ x).to(DEVICE)


@runs_kernels
@pytest.mark.parametrize(("g", "rank", "grid_name"), [(16, 64, "e4m3"), (32, 8, "e8m0")])
def test_grid_search_under_a_hessian(g: int, rank: int, grid_name: str) -> None:
    from intlass_ops.triton import hessian_search as kernels

    hessian = torch.stack([gram(g + j, g, rank) for j in range(2)])
    x = blocks(g, 200 if CUDA else 26, g)
    grid = (fp4.e4m3_grid() if grid_name == "e4m3" else fp4.e8m0_grid()[:-2]).to(DEVICE)
    start = torch.searchsorted(grid, x.double().abs().amax(-1) / 6).clamp(max=grid.numel() - 1)
    args = (fp4.round_e2m1, 6.0, 0.25)
    exact = start.clone()
    for j in range(2):
        exact[j::2] = search.grid_search(
            x[j::2].double(), start[j::2], grid, *args, hessian=hessian[j]
        )
    found = kernels.grid_search(x, start, grid, hessian)

    def error(index: Tensor) -> Tensor:
        s = grid[index][:, None]
        return search.block_error(x - s * fp4.round_e2m1(x.double() / s), None, hessian)

    assert (error(found) <= error(exact) * (1 + 1e-5)).all()
    assert (found != exact).float().mean() < 0.03


@runs_kernels
@pytest.mark.parametrize(("kind", "g", "rank"), [("int4", 24, 96), ("uint4", 16, 8)])
def test_sweep_under_a_hessian(kind: str, g: int, rank: int) -> None:
    from intlass_ops.triton import hessian_search as kernels

    hessian = torch.stack([gram(g + j, g, rank) for j in range(2)])
    x = blocks(g, 200 if CUDA else 2, g)
    limits = [(-7, 7)] if kind == "int4" else [(-z, 15 - z) for z in ((3, 8) if CUDA else (3,))]

    def error(s: Tensor, low: int, high: int) -> Tensor:
        """Of the better of s and its neighbours: the best lies at the edge of an interval."""
        s = torch.where(s > 0, s.float(), 1.0)
        near = [s, *(s * (1 + i * 2.0**-23) for i in (-2, -1, 1, 2))]
        errors = []
        for one in near:
            one = one.double()[:, None]
            r = x.double() - one * (x.double() / one).round().clamp(low, high)
            errors.append(search.block_error(r, None, hessian))
        return torch.stack(errors).amin(0)

    low, high = limits[0]
    start = error(x.abs().amax(-1) / min(-low, high), low, high)
    found = kernels.sweep(x, limits, hessian, start)
    for column, (low, high) in enumerate(limits):
        exact = torch.empty_like(start)
        for j in range(2):
            budget = search.residual_budget(start[j::2], hessian[j])
            exact[j::2] = search.sweep_hessian(x[j::2].double(), (low, high), hessian[j], budget)
        least = error(exact, low, high)
        assert (error(found[:, column], low, high) <= least * (1 + 1e-4))[least <= start].all()


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("arch", [80, 90, 120])
def test_kernels_compile_without_a_gpu(arch: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from intlass_ops.triton import hessian_search, integer_search, scale_search

    indices: dict[str, str] = {"start_ptr": "*i32", "out_ptr": "*i32"}
    wide = {"w_ptr": "*fp64", "by_ptr": "*fp64", "grid_ptr": "*fp64"}
    plain: tuple[Any, ...] = (
        (
            scale_search._grid_kernel,
            wide | {"codes_ptr": "*i8"},
            ("count", "last"),
            {"G": 16, "ROWS": 8, "WEIGHTED": True, "STEPS": 7},
        ),
        (
            integer_search._walk_kernel,
            {"zero_ptr": "*i32"},
            ("count", "g"),
            {"G": 128, "ROWS": 1, "WEIGHTED": True, "ZEROS": 16},
        ),
    )
    hessian: tuple[Any, ...] = (
        (
            hessian_search._grid_kernel,
            indices,
            ("count", "last", "columns", "g"),
            {"G": 16, "ROWS": 16},
        ),
        (
            hessian_search._sweep_kernel,
            {},
            ("columns", "ranges", "g"),
            {"LEVELS": 7, "G": 32, "EVENTS": 32},
        ),
    )
    single = scale_search._grid_kernel, integer_search._walk_kernel
    for kernel, pointers, integers, constants in hessian if arch == 90 else plain:
        signature = {
            name: pointers.get(name, "*fp32")
            if name.endswith("_ptr")
            else "i32"
            if name in integers
            else "constexpr"
            if name in constants
            else "fp32"
            for name in kernel.arg_names
        }
        source = triton.compiler.ASTSource(kernel, signature, constexprs=constants)
        target, warps = GPUTarget("cuda", arch, 32), 1 if kernel in single else 4
        image = triton.compile(source, target=target, options={"num_warps": warps}).asm["cubin"]
        assert cubin.stack_bytes(image) == 0, kernel


@pytest.mark.gpu
def test_quantisers_on_the_gpu_are_as_good_as_on_the_cpu() -> None:
    w = blocks(9, 512, 256).cpu()
    for f, more in (
        (scales.nvfp4_optimal, {}),
        (scales.mxfp4_optimal, {}),
        (scales.int4_optimal, {"group_size": 128}),
        (scales.uint4_optimal, {"group_size": 128}),
        (scales.int8_optimal, {"group_size": 32}),
        (scales.nvfp4_optimal_hessian, {"hessian": gram(0, 16, 64).expand(16, 16, 16)}),
        (scales.mxfp4_optimal_hessian, {"hessian": gram(0, 32, 8).expand(8, 32, 32)}),
        (
            scales.int4_optimal_hessian,
            {"group_size": 128, "hessian": gram(0, 128, 999).expand(2, 128, 128)},
        ),
        (
            scales.uint4_optimal_hessian,
            {"group_size": 32, "hessian": gram(0, 32, 99).expand(8, 32, 32)},
        ),
    ):
        here, there = (f(v, -1, True, **more)[-1].cpu() for v in (w, w.cuda()))
        hessian = more.get("hessian")
        if isinstance(hessian, Tensor):  # one for all blocks
            g, one = hessian.shape[-1], hessian[0].cpu()
            parts = [(d - w).double().view(-1, g) for d in (there, here)]
            error, least = (search.block_error(r, None, one).view(512, -1).sum(-1) for r in parts)
        else:
            error, least = ((d - w).double().square().sum(-1) for d in (there, here))
        assert (error <= least * (1 + 1e-4)).all(), f.__name__


@pytest.mark.gpu
def test_int4_search_of_a_large_layer_takes_less_than_a_second() -> None:
    w = torch.randn(4096, 14336, device="cuda")
    scales.int4_optimal(w[:128], group_size=128)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    scales.int4_optimal(w, group_size=128)
    end.record()
    torch.cuda.synchronize()
    assert start.elapsed_time(end) < 1000
