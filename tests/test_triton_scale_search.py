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

from intlass_ops import fp4, scales
from intlass_ops import scale_search as search

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
def test_grid_search_is_as_good_as_the_float64_search(
    g: int, weighted: bool, grid_name: str
) -> None:
    from intlass_ops.triton import scale_search as kernels

    x = blocks(g, 75 if CUDA else 20, g)
    weights = weights_for(x, weighted)
    grid = (fp4.e4m3_grid() if grid_name == "e4m3" else fp4.e8m0_grid()[:-2]).to(DEVICE)
    start = torch.searchsorted(grid, x.double().abs().amax(-1) / 6).clamp(max=grid.numel() - 1)
    args = (fp4.round_e2m1, 6.0, 0.25)
    exact = search.grid_search(x.double(), start, grid, *args, weights=weights)
    found = kernels.grid_search(x, start, grid, weights)
    error, least = (fp4_error(x, grid[i], weights) for i in (found, exact))
    assert (error <= least * (1 + 2e-6)).all()
    assert (found != exact).float().mean() < 0.03


@runs_kernels
def test_grid_search_over_the_range_of_float32() -> None:
    from intlass_ops.triton import scale_search as kernels

    x = blocks(0, 16, 32)
    x = x / x.abs().amax(-1, keepdim=True) * torch.logspace(-38, 38, 16, device=DEVICE)[:, None]
    grid = fp4.e8m0_grid()[:-2].to(DEVICE)
    start = fp4.encode_e8m0_floor(x.abs().amax(-1)).view(torch.uint8).long() - 2
    start = start.clamp(min=0)
    exact = search.grid_search(x.double(), start, grid, fp4.round_e2m1, 6.0, 0.25)
    assert torch.equal(kernels.grid_search(x, start, grid), exact)


@runs_kernels
@pytest.mark.parametrize(("g", "weighted"), [(16, False), (24, True), (128, False)])
@pytest.mark.parametrize("kind", ["int4", "uint4", "int8"])
def test_sweep_is_as_good_as_the_float64_sweep(g: int, weighted: bool, kind: str) -> None:
    from intlass_ops.triton import scale_search as kernels

    # The interpreter takes about a second for one INT8 block of 128.
    count = 200 if CUDA else 1 if kind == "int8" else 4
    if not CUDA and kind != "int4":
        g = min(g, 40)
    x = blocks(g, count, g)
    weights = weights_for(x, weighted)
    limits = {
        "int4": [(-7, 7)],
        "int8": [(-127, 127)],
        "uint4": [(-z, 15 - z) for z in ((0, 3, 8, 15) if CUDA else (0, 8))],
    }[kind]

    def error(s: Tensor, low: int, high: int) -> Tensor:
        s = torch.where(s > 0, s.double(), 1.0)[:, None]
        return search.block_error(
            x.double() - s * (x.double() / s).round().clamp(low, high), weights
        )

    low, high = limits[0] if len(limits) == 1 else (-8, 7)
    s0 = x.abs().amax(-1).double() / high
    budget = error(s0, low, high)
    exact = search.sweep(x.double(), limits, budget, weights)
    found = kernels.sweep(x, limits, budget, weights)
    for column, (low, high) in enumerate(limits):
        usable = exact[:, column] > 0
        least = error(exact[:, column], low, high)
        usable &= least <= budget
        assert (error(found[:, column], low, high) <= least * (1 + 2e-5))[usable].all()


def gram(seed: int, g: int, rank: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(g, g, generator=rng, dtype=torch.float64) * 0.5 + torch.eye(g)
    x = torch.randn(rank, g, generator=rng, dtype=torch.float64) @ mix
    return (x.T @ x).to(DEVICE)


@runs_kernels
@pytest.mark.parametrize(("g", "rank", "grid_name"), [(16, 64, "e4m3"), (32, 8, "e8m0")])
def test_grid_search_under_a_hessian(g: int, rank: int, grid_name: str) -> None:
    from intlass_ops.triton import hessian_search as kernels

    x, hessian = blocks(g, 200 if CUDA else 13, g), gram(g, g, rank)
    grid = (fp4.e4m3_grid() if grid_name == "e4m3" else fp4.e8m0_grid()[:-2]).to(DEVICE)
    start = torch.searchsorted(grid, x.double().abs().amax(-1) / 6).clamp(max=grid.numel() - 1)
    args = (fp4.round_e2m1, 6.0, 0.25)
    exact = search.grid_search(x.double(), start, grid, *args, hessian=hessian)
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

    x, hessian = blocks(g, 200 if CUDA else 2, g), gram(g, g, rank)
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
    budget = search.residual_budget(start, hessian)
    found = kernels.sweep(x, limits, hessian, budget)
    for column, (low, high) in enumerate(limits):
        exact = search.sweep_hessian(x.double(), (low, high), hessian, budget)
        least = error(exact, low, high)
        assert (error(found[:, column], low, high) <= least * (1 + 1e-4))[least <= start].all()


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("arch", [80, 90, 120])
def test_kernels_compile_without_a_gpu(arch: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from intlass_ops.triton import hessian_search
    from intlass_ops.triton import scale_search as kernels

    indices: dict[str, str] = {"start_ptr": "*i32", "out_ptr": "*i32"}
    plain: tuple[Any, ...] = (
        (
            kernels._grid_kernel,
            indices,
            ("count", "last"),
            {"G": 16, "ROWS": 16, "WEIGHTED": True},
        ),
        (
            kernels._sweep_kernel,
            {},
            ("columns", "g"),
            {"LEVELS": 7, "G": 128, "EVENTS": 32, "WEIGHTED": True},
        ),
    )
    hessian: tuple[Any, ...] = (
        (hessian_search._grid_kernel, indices, ("count", "last", "g"), {"G": 16, "ROWS": 16}),
        (hessian_search._sweep_kernel, {}, ("columns", "g"), {"LEVELS": 7, "G": 32, "EVENTS": 32}),
    )
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
        assert triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["cubin"]


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
