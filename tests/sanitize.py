"""A covering set of small kernel launches, to be run under NVIDIA's compute-sanitizer:

    compute-sanitizer --tool memcheck --error-exitcode 1 python3 tests/sanitize.py

Also for racecheck, initcheck and synccheck; of parts alone: experts, fp4, others. No references
here: test_cuda_ops.py checks the values.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch

import intlass_ops
from intlass_ops import config
from intlass_ops.config import PAIRS
from intlass_ops.config.gemm_tiles import gemm_candidates
from intlass_ops.config.skinny_mx import mx_candidates
from intlass_ops.cuda import jit, launch, launch_experts, launch_fp4
from intlass_ops.cuda.plans import TYPE, device_of

# (M, N, K, group_size): skinny and tiled, tails of every kind, K split, groups inside a span
SHAPES = (
    (1, 48, 512, 128),
    (9, 65, 512, 64),
    (3, 70, 304, 16),
    (33, 200, 1024, 1024),
    (65, 130, 480, 48),
    (70, 65, 101, 101),
    (17, 64, 4096, 128),
)
# The same, for every way in which the threads of a kernel share the work, picked or not
SHARED = ((12, 1100, 4096, 128), (60, 1100, 1280, 128), (300, 600, 1408, 1408))
WITH_REST = ((20, 11000, 384, 128), (20, 22000, 384, 128), (20, 26000, 384, 128))  # rows left over
SHARING = "split_k", "stream_k", "by_stages", "consumers", "in_turns", "share_x", "share_w"


def shared(
    device: config.Device,
) -> Iterator[tuple[config.Matmul, tuple[str, str], tuple[int, int, int, int], torch.dtype]]:
    """One configuration of each kernel, way of sharing and shape."""
    pairs = ("bf16", "s4"), ("bf16", "e4m3"), ("bf16", "nf4"), ("s8", "s4"), ("s8", "s8")
    for (x, w), (m, n, k, group_size) in itertools.product(pairs, SHARED + WITH_REST):
        g = k if w == "s8" else group_size
        dtype = torch.bfloat16 if x == "bf16" and g < k else torch.float32
        shape = config.Shape(
            x_kind=x,
            w_kind=w,
            scale_type=TYPE[dtype],
            zero_type="float",
            out_type=TYPE[torch.bfloat16],
            has_zeros=False,
            has_a_zero=False,
            aligned=True,
            m=m,
            n=n,
            k=k,
            group_size=g,
        )
        found: dict[object, config.Matmul] = {}
        for c in config.candidates(device, shape):
            if (m, n, k, group_size) in WITH_REST and not getattr(c, "rest_by_k", False):
                continue
            way = [getattr(c, name, 0) for name in (*SHARING, "x_staged", "grouping")]
            found.setdefault((type(c), *way), c)
        for c in found.values():
            yield c, (x, w), (m, n, k, g), dtype


def product(
    x: str, w: str, m: int, n: int, k: int, group_size: int, dtype: torch.dtype = torch.float32
) -> None:
    ranges = {"s8": (-128, 128), "s4": (-8, 8), "u4": (0, 16), "e4m3": (0, 127)}
    low, high = ranges.get(w, (0, 16))
    codes = torch.randint(low, high, (n, k), dtype=torch.int8, device="cuda")
    scales = torch.rand(n, k // group_size, device="cuda", dtype=dtype)
    if dtype == torch.bfloat16:
        scales[0, -1] = 2.0**100  # which hopper.cu sums again, slowly
    zeros = torch.rand_like(scales) * 15 if w == "u4" else None
    a_scale = a_zero = None
    if x in ("bf16", "fp16"):
        a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16 if x == "bf16" else torch.half)
    else:
        low, high = ranges[x]
        a = torch.randint(low, high, (m, k), dtype=torch.int8, device="cuda")
        a = a if x == "s8" else intlass_ops.pack_int4(a)
        a_scale = torch.rand(m, 1, device="cuda")
        if x == "u4" or (x == "s8" and m % 2):
            a_zero = torch.randint(0, 16, (m, 1), dtype=torch.int32, device="cuda")
    bias = torch.randn(n, device="cuda")
    if w == "e4m3":
        intlass_ops.matmul_fp8_bf16_tn(a, codes.view(torch.float8_e4m3fn), scales, bias=bias)
    elif w in config.LUT4:
        packed = intlass_ops.pack_int4(codes)
        intlass_ops.matmul_lut4_bf16_tn(a, packed, scales, table=w, k=k, bias=bias)
    elif w == "s8":
        intlass_ops.matmul_int8_bf16_tn(a, codes, a_scale, scales, a_zero=a_zero, bias=bias)
    else:
        packed = intlass_ops.pack_int4(codes)
        intlass_ops.matmul_int4_bf16_tn(
            a, packed, scales, zeros, k=k, a_scale=a_scale, a_zero=a_zero, bias=bias
        )


FP4_SCALES = {"e8m0": (32, 118, 136), "e4m3": (16, 40, 100)}  # k of a group; bytes, wide ones too


def fp4_scales(kind: str, *shape: int) -> torch.Tensor:
    group, low, high = FP4_SCALES[kind]
    size = *shape[:-1], shape[-1] // group
    return torch.randint(low, high, size, dtype=torch.uint8, device="cuda")


def grouped(device: config.Device) -> int:
    """Each kernel of experts' products, few tokens and many, of some experts and of none."""
    launches = 0
    ends = torch.tensor([5, 5, 40, 90], device="cuda")
    kinds = *itertools.product(("bf16", "s8"), ("s4", "s8")), ("bf16", "e8m0"), ("bf16", "e4m3")
    for (x, w), per_expert in itertools.product(kinds, (1, 16, 100)):
        fp4 = w in FP4_SCALES
        k, n = 448 if fp4 else 512, 200
        scale_type = "__nv_bfloat16" if w == "s4" and x == "bf16" else w if fp4 else "float"
        shape = config.Shape(
            x_kind=x,
            w_kind="e2m1" if fp4 else w,
            scale_type=scale_type,
            zero_type="float",
            out_type="__nv_bfloat16",
            has_zeros=False,
            has_a_zero=False,
            aligned=True,
            m=4 * per_expert,
            n=n,
            k=k,
            group_size=FP4_SCALES[w][0] if fp4 else 128 if w == "s4" else k,
        )
        dtype = torch.bfloat16 if scale_type == "__nv_bfloat16" else torch.float32
        a = torch.randint(-9, 9, (100, k), device="cuda")
        a = a.bfloat16() if x == "bf16" else a.to(torch.int8)
        codes = torch.randint(0, 256, (4, n, k if w == "s8" else k // 2), device="cuda")
        codes = codes.to(torch.uint8) if w != "s8" else codes.to(torch.uint8).view(torch.int8)
        scales = torch.rand(4, n, k // shape.group_size, device="cuda", dtype=dtype)
        scales = fp4_scales(w, 4, n, k) if fp4 else scales
        bias = torch.randn(4, n, device="cuda")
        a_scale = None if x == "bf16" else torch.rand(100, 1, device="cuda")
        for d in {device, config.without_wgmma(device)}:
            picked = config.pick_experts(d, shape, 4)
            launch_experts._plans.clear()
            with mock.patch.object(config, "pick_experts", return_value=picked):
                intlass_ops.matmul_experts(
                    a, codes, scales, ends=ends, a_scale=a_scale, bias=bias,
                    alpha=torch.rand(4, device="cuda"),
                )  # fmt: skip
            launches += 1
    return launches


def fp4_weights(device: config.Device) -> int:
    """Under bf16 activations, scales in rows: gemm.cu's tiles and hopper.cu's."""
    launches = 0
    for kind, (m, n, k) in itertools.product(
        FP4_SCALES, ((5, 130, 48), (40, 300, 448), (130, 260, 1088))
    ):
        if k % FP4_SCALES[kind][0]:
            continue
        x = torch.randn(m, k, device="cuda").bfloat16()
        w = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        dtype = torch.float8_e8m0fnu if kind == "e8m0" else torch.float8_e4m3fn
        scales = fp4_scales(kind, n, k).view(dtype)
        aligned = k % 32 == 0
        shape = launch_fp4._shape("bf16", m, w.shape, aligned, dtype, torch.bfloat16, False)
        tiles = [*gemm_candidates(config.without_wgmma(device), shape, measured=False)]
        if config.why_not_hopper(device, shape) is None:
            tiles += [c for c, _ in config.hopper_candidates(device, shape)]
        for c in tiles:
            launch_fp4._plans.clear()
            with mock.patch.object(config, "pick_fp4", return_value=c):
                launch_fp4.run(x, w, None, scales, False, None, k, torch.bfloat16)
            launches += 1
    launch_fp4._plans.clear()
    return launches


def others() -> int:
    launches = 0
    for (x, w), shape in itertools.product(PAIRS, SHAPES):
        product(x, w, *shape)
        launches += 1
    tiles = list(shared(device_of(0)))
    jit.warmup([c for c, *_ in tiles], progress=False)
    for c, kinds, shape, dtype in tiles:
        with launch.forced(c):
            product(*kinds, *shape, dtype)
        launches += 1
    for dtype, quantize, symmetric, (m, k) in itertools.product(
        (torch.bfloat16, torch.float32),
        (intlass_ops.quantize_int8, intlass_ops.quantize_int4),
        (True, False),
        ((5, 33), (3, 4096), (1, 70_000), (700, 1000), (2, 14336)),
    ):
        quantize(torch.randn(m, k, dtype=dtype, device="cuda"), symmetric=symmetric)
        launches += 1
    for m, k in ((3, 4096), (700, 1000), (2, 14336)):
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        torch.ops.intlass.rms_norm_quantize(x, x[0].clone(), 1e-6)
        torch.ops.intlass.silu_mul_quantize(x, x.clone())
        intlass_ops.quantize_int8(x, full_range=True)
        launches += 3
    for (format_, k, group_size), dtype, r in itertools.product(
        (("int8", 768, 8), ("int8", 768, 256), ("int4", 5120, 5120), ("int8", 69632, 69632)),
        (torch.bfloat16, torch.float32),
        (16, 256),
    ):
        x = torch.randn(5, k, dtype=dtype, device="cuda")
        call = getattr(intlass_ops, f"fused_quantize_{format_}")
        h = intlass_ops.hadamard_matrix(r, device="cuda")
        call(x, h, group_size=group_size, return_mask=True)
        launches += 1
    for call, r in itertools.product(
        (intlass_ops.fused_quantize_mx, intlass_ops.fused_quantize_nv), (32, 64, 128)
    ):
        x = torch.randn(7, 384, dtype=torch.bfloat16, device="cuda")
        call(x, intlass_ops.hadamard_matrix(r, device="cuda"), return_mask=True)
        launches += 1
    for r in (64, 128):  # a group a unit
        x = torch.randn(7, 5120, dtype=torch.bfloat16, device="cuda")
        h = intlass_ops.hadamard_matrix(r, device="cuda")
        intlass_ops.fused_quantize_int4(x, h, return_mask=True)
        launches += 1
    for m, (n, k, g) in itertools.product((5, 40), ((200, 192, 32), (2048, 256, 128))):
        packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        s = torch.rand(k // g, n, dtype=torch.bfloat16, device="cuda")
        x = torch.randn(m, n, dtype=torch.bfloat16, device="cuda")
        for zeros in (s, None):
            intlass_ops.mixed_mm(x, packed.T, s, zeros, g, transposed=True)
            launches += 1
    w = torch.randint(0, 256, (17000, 1024), dtype=torch.uint8, device="cuda")
    for m, blocked, last in itertools.product((5, 16), (True, False), (131, 200)):  # skinny_mx.cu
        scales = torch.randint(124, last, (17000, 64), dtype=torch.uint8, device="cuda")
        scales = scales.view(torch.float8_e8m0fnu)
        x_scales = intlass_ops.to_blocked(scales[:m]) if blocked else scales[:m]
        w_scales = intlass_ops.to_blocked(scales) if blocked else scales
        shape = launch_fp4._shape(
            "e2m1", m, w.shape, True, scales.dtype, torch.bfloat16, blocked=blocked
        )
        for c in mx_candidates(device_of(0), shape):
            launch_fp4._plans.clear()
            with mock.patch.object(config, "pick_fp4", return_value=c):
                launch_fp4.run(w[:m], w, x_scales, w_scales, blocked, None, 2048, torch.bfloat16)
            launches += 1
    w = w[:1100]
    for blocked, wide in itertools.product((True, False), repeat=2):  # mx_codes.cu
        scales = torch.randint(124, 128, (1100, 64), dtype=torch.uint8, device="cuda")
        scales[77, 3] = 131 if wide else 124
        scales = scales.view(torch.float8_e8m0fnu)
        operands = (
            intlass_ops.to_blocked(scales[:m]) if blocked else scales[:m] for m in (300, 1100)
        )
        shape = launch_fp4._shape(
            "e2m1", 300, w.shape, True, scales.dtype, torch.bfloat16, blocked=blocked
        )
        integers = replace(shape, x_kind="s8", w_kind="s8", scale_type="float", group_size=2048)
        c = replace(config.pick(device_of(0), integers), only_if=0)
        launch_fp4._plans.clear()
        with mock.patch.object(config, "pick_mx_integers", return_value=c):
            launch_fp4.run(w[:300], w, *operands, blocked, None, 2048, torch.bfloat16)
        launches += 5
    return launches


def main() -> None:
    parts = {
        "experts": lambda: grouped(device_of(0)),
        "fp4": lambda: fp4_weights(device_of(0)),
        "others": others,
    }
    wanted = sys.argv[1:] or parts
    launches = sum(parts[name]() for name in wanted)
    torch.cuda.synchronize()
    print(f"{launches} launches on {torch.cuda.get_device_name()}, {jit.arch_of(0)}")


if __name__ == "__main__":
    main()
