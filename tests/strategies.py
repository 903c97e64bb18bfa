"""Which GEMM calls are tested: fixed lists of cases, and hypothesis strategies over legal ones.

The fixed lists stand here and not beside their tests because a GPU run compiles the kernels of all
of them first, in parallel (warm_kernels.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from gemm_case import CODES, LAYOUTS, Case
from hypothesis import strategies as st

import intlass_ops as ia

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FLOATS = (FP32, BF16, FP16)
INTS = (torch.uint8, torch.int8, torch.int32)
ZERO_DTYPES = (*INTS, *FLOATS)
ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")
# Every pair of an activation and a weight that has an op; of tables that NF4 stands for, some.
PAIRS = (
    *((x, w) for x in ("bf16", "fp16", "fp32", "s8") for w in ("s4", "u4", "s8")),
    *((x, w) for x in ("s4", "u4") for w in ("s4", "u4")),
    *((x, w) for w in ("e4m3", "nf4") for x in ("bf16", "fp16", "fp32")),
    *(("bf16", "iq4nl"), ("fp16", "iq4nl"), ("fp32", "fp4"), ("bf16", "fp4"), ("fp16", "bnbfp4")),
)
# Types that the random tests on a GPU stay within, to compile few kernels: x, w, scale, zero, out.
GPU_TYPES = (
    ("bf16", "u4", BF16, torch.uint8, BF16),
    ("bf16", "s8", FP32, torch.uint8, FP32),
    ("fp16", "s4", FP16, torch.uint8, FP16),
    ("s8", "u4", FP32, torch.int8, BF16),
    ("u4", "u4", FP32, FP32, BF16),
    ("bf16", "e4m3", FP32, torch.uint8, BF16),
    ("bf16", "nf4", FP32, torch.uint8, BF16),
)

# Shape, granularity and group size of tensors to quantise.
QUANTIZED_SHAPES: tuple[tuple[tuple[int, ...], Any, int | None], ...] = (
    ((5, 64), "token", None),
    ((2, 3, 33), "token", None),
    ((7,), "token", None),
    ((3, 1100), "token", None),
    ((2, 70000), "token", None),
    ((6, 4, 10), "channel", None),
    ((9, 7), "channel", None),
    ((5,), "channel", None),
    ((4, 63), "tensor", None),
    ((3, 96), "group", 32),
    ((3, 90), "group", 15),
    ((2, 4, 48), "group", 48),
)

SCHEMES = {
    "w4a16": ia.Int4WeightOnly(group_size=32),
    "w4a16-symmetric": ia.Int4WeightOnly(group_size=16, symmetric=True),
    "w4a16-channel": ia.Int4WeightOnly(group_size=None),
    "w8a16": ia.Int8WeightOnly(),
    "w8a16-group": ia.Int8WeightOnly(group_size=32),
    "w8a8": ia.Int8DynamicActivationInt8Weight(),
    "w4a8": ia.Int8DynamicActivationInt4Weight(group_size=32),
    "w4a4": ia.Int4DynamicActivationInt4Weight(group_size=32),
}


def a_zero_of(x: str) -> torch.dtype | None:
    """Packed unsigned activations are told from signed ones by having zero points."""
    return torch.uint8 if x == "u4" else None


def cover() -> list[Case]:
    """Every pair of kinds with every kind of group; all other properties rotate through the list
    with different periods, so that each value meets many of the others."""
    leads = ((1,), (5,), (17,), (2, 3), (33,), (), (130,), (16,), (65,), (1, 8, 1))
    cases: list[Case] = []
    for x, w in PAIRS:
        for group_size in (None, 16, 32, 48, 64, 128):
            i = len(cases)
            k = (384, 100, 127, 544)[i % 4] if group_size is None else 384
            integer = x in CODES
            case = Case(
                x=x,
                w=w,
                lead=leads[i % 10],
                n=(48, 7, 65, 1, 129)[i % 5],
                k=k,
                groups=1 if group_size is None else k // group_size,
                scale_shape=("table", "column", "scalar")[i // 6 % 3],
                scale=FLOATS[i % 3],
                zero=ZERO_DTYPES[(i + i // 6) % 6],
                out=(None, *FLOATS)[(i + i // 4) % 4],
                bias=(None, *FLOATS)[(i + i // 16) % 4],
                alpha=("none", "float", "tensor")[(i + i // 3) % 3],
                a_scale=("token", "none", "scalar", "flat")[(i + i // 4) % 4]
                if integer
                else "none",
                a_zero=(None, torch.int32, torch.int8, FP32)[i % 4] if x == "s8" else a_zero_of(x),
                a_layout=LAYOUTS[i % 7],
                w_layout=LAYOUTS[(i + 1 + i // 6) % 6],
                scale_layout=LAYOUTS[(i + 2 + i // 6) % 6],
                seed=i,
            )
            cases.append(case)
    return cases


def dtype_cases() -> list[Case]:
    """Each dtype of zero points, scales, outputs and biases."""
    return [
        *(Case(x, "u4", k=192, groups=4, zero=z) for x in ("bf16", "s8") for z in ZERO_DTYPES),
        *(
            Case("bf16", w, scale=scale, out=out, bias=out, alpha="float")
            for w in ("u4", "s8", "e4m3", "nf4")
            for scale, out in zip(FLOATS, (BF16, FP16, FP32), strict=True)
        ),
        *(Case("s8", "s8", a_scale="token", a_zero=zero) for zero in ZERO_DTYPES),
    ]


def table_cases() -> list[Case]:
    """Scales and zero points that differ in shape: one of them per group, the other not."""
    return [
        Case(x, "u4", groups=g, zero_groups=z, scale_shape=shape, a_zero=a_zero_of(x))
        for x in ("bf16", "s8", "u4")
        for g, z in ((4, 1), (1, 4), (4, 4), (1, 1))
        for shape in ("table", "column", "scalar")
    ]


def identity_cases() -> list[Case]:
    """One for each decoder: kinds, and how groups lie in what a lane reads."""
    zeros = (torch.uint8, BF16, torch.int32, FP32)
    return [
        Case(
            x,
            w,
            lead=(m,),
            n=1 + CODES[w][1] - CODES[w][0],
            k=96,
            groups=96 // group_size,
            scale=BF16 if w in ("s4", "u4") else FP32,
            zero=zeros[i % 4],
            out=FP32,
            a_zero=a_zero_of(x),
            seed=i,
        )
        for i, (x, w) in enumerate(PAIRS)
        for m, group_size in ((16, 96), (3, 16), (96, 32))
    ]


def long_cases() -> list[Case]:
    return [
        Case(
            x,
            w,
            lead=(9,),
            n=65,
            k=k,
            groups=1 if k % 16 else k // 128,
            a_zero=a_zero_of(x),
            out=out,
        )
        for x, w in (
            ("bf16", "u4"),
            ("bf16", "s8"),
            ("s8", "s4"),
            ("u4", "u4"),
            ("bf16", "e4m3"),
            ("bf16", "nf4"),
        )
        for k, out in ((4096, FP32), (4100, None))
    ]


def lut4_cases() -> list[Case]:
    """A table's groups and tails of K, and its scales' types, by numbers of tokens."""
    forms = (  # x, n, k, group size, scale, out
        ("bf16", 1024, 1024, 64, FP32, None),
        ("bf16", 48, 512, 64, BF16, None),
        ("bf16", 100, 480, 16, FP32, FP32),
        ("bf16", 64, 384, 32, FP16, BF16),
        ("bf16", 64, 1152, 128, FP32, FP32),
        ("bf16", 48, 333, None, FP32, FP32),
        ("bf16", 100, 4100, None, BF16, None),
        ("fp16", 64, 512, 64, FP16, None),
        ("fp16", 100, 448, 32, FP32, FP32),
        ("fp16", 48, 1001, None, FP16, None),
    )
    return [
        Case(x, "nf4", (m,), n, k, k // (size or k), scale=scale, out=out, seed=m)
        for x, n, k, size, scale, out in forms
        for m in (1, 2, 4, 7, 8, 9, 16, 17, 32, 64, 100, 128, 256, 300)
    ]


def special_cases() -> list[Case]:
    """Rows of zero, subnormal, huge and infinite scales."""
    pairs = (
        ("bf16", "s4"),
        ("bf16", "u4"),
        ("fp32", "s8"),
        ("fp16", "s8"),
        ("s8", "u4"),
        ("u4", "s4"),
        ("bf16", "e4m3"),
        ("fp32", "e4m3"),
        ("bf16", "nf4"),
        ("fp32", "nf4"),
    )
    return [
        Case(
            x,
            w,
            groups=(1, 4)[(i + j) % 2],
            scale=scale,
            out=FLOATS[(i + j) % 3],
            bias=BF16,
            a_zero=a_zero_of(x),
            special=True,
        )
        for i, (x, w) in enumerate(pairs)
        for j, scale in enumerate(FLOATS)
    ]


def random_gpu_cases() -> list[Case]:
    """One for each kernel that `legal_cases` can reach on a GPU."""
    return [
        Case(x, w, (3,), k=64, groups=g, scale=s, zero=z, out=o, a_zero=a_zero, a_layout=layout)
        for x, w, s, z, o in GPU_TYPES
        for g in (1, 2, 4)
        for layout in ("contiguous", "offset")
        for a_zero in ((None, torch.int32) if x == "s8" else (a_zero_of(x),))
    ]


# One of each kind of main loop: W4A16 with zero points, W4A8 with both kinds of them, W8A8, W4A4.
KINDS = {
    "w4a16": Case("bf16", "u4", k=320, groups=10, scale=BF16, bias=BF16),
    "w4a8": Case("s8", "u4", k=320, groups=10, scale=BF16, a_scale="token", a_zero=torch.int32),
    "w8a8": Case("s8", "s8", k=320, a_scale="token"),
    "w4a4": Case("u4", "s4", k=320, a_zero=torch.uint8),
}
# K long enough to be split among blocks: one kind that has groups, one that has not.
SPLIT = {
    "w4a16": Case("bf16", "u4", (20,), 48, 8192, groups=64, scale=BF16, out=FP32),
    "w8a8": Case("s8", "s8", (20,), 48, 8192, a_scale="token", a_zero=torch.int32, out=FP32),
}
# Few tokens, split K, many tiles: what runs on streams, in graphs and threads.
MIXED = {
    "few-tokens": Case("bf16", "u4", (1,), 256, 1024, groups=8, scale=BF16),
    "split": SPLIT["w4a16"],
    "split-integers": SPLIT["w8a8"],
    "many-tokens": Case("fp16", "s8", (300,), 256, 512),
}


def k_cases(kind: str, m: int) -> list[Case]:
    """Tails of words, of spans, of tiles and of stripes; rows that follow each other at once, and
    rows that are aligned, with garbage between them."""
    sizes = (1, 7, 8, 9, 16, 31, 32, 33, 63, 65, 127, 128, 129, 130, 255, 257, 500, 2049, 4100)
    return [
        replace(KINDS[kind], lead=(m,), k=k, groups=1, a_layout=layout, w_layout=layout)
        for k in sizes
        for layout in ("contiguous", "padded")
    ]


def group_cases(kind: str, m: int) -> list[Case]:
    """Groups that end inside a lane's word of a span, at its end, and after several tiles."""
    return [
        replace(KINDS[kind], lead=(m,), k=groups * size, groups=groups)
        for size in (16, 32, 48, 64, 80, 96, 112, 128, 256, 512)
        for groups in (1, 2, 3, 7)
    ]


def split_cases(kind: str) -> list[Case]:
    """Stripes of whole groups and of parts of them; fewer stripes than there are blocks."""
    return [
        replace(SPLIT[kind], k=k, groups=1 if SPLIT[kind].groups == 1 else k // 128)
        for k in (512, 1024, 2048, 4096, 6144, 8192)
    ]


def epilogue_cases() -> list[Case]:
    """Every pair with an activation, a residual or both, on a GPU in each family of kernels."""
    names = (None, *ACTIVATIONS)
    leads = ((1,), (40,), (12,), (2, 75))
    return [
        Case(
            x,
            w,
            leads[(i + j) % 4],
            n=(64, 129, 65, 328)[(i + j + j // 2) % 4],
            k=(384, 320, 1024)[i % 3],
            groups=(1, 3)[j % 2] if i % 3 == 0 else (1, 2)[j % 2],
            scale=BF16,
            zero=(torch.uint8, FP32)[j % 2],
            out=FLOATS[(i + j // 2) % 3],
            bias=(None, FP32)[(i + j) % 2],
            a_scale="token" if x in CODES else "none",
            a_zero=torch.int32 if x == "s8" and j == 3 else a_zero_of(x),
            a_layout=("contiguous", "contiguous", "columns")[(i + j) % 3],
            activation=names[(i + j) % 5],
            residual=(i + j) % 5 == 0 or j % 2 == 0,
            seed=4 * i + j,
        )
        for i, (x, w) in enumerate(PAIRS)
        for j in range(4)
    ]


def large_cases() -> list[Case]:
    return [
        Case(x, w, (1000,), 2048, 4096, groups=32 if w == "u4" else 1, out=BF16)
        for x in ("bf16", "s8")
        for w in ("u4", "s8")
    ]


def gpu_cases() -> list[Case]:
    """One for each kernel of test_cuda_ops.py."""
    return [
        *(replace(c, lead=(m,), n=65) for c in KINDS.values() for m in (1, 9, 17, 33, 300)),
        *(c for kind in KINDS for m in (1, 20) for c in k_cases(kind, m)),
        *(c for kind in ("w4a16", "w4a8") for m in (1, 20) for c in group_cases(kind, m)),
        *(c for kind in SPLIT for c in split_cases(kind)),
        *MIXED.values(),
        *large_cases(),
    ]


@st.composite
def legal_cases(draw: st.DrawFn, device: str = "cpu", exact: bool = False) -> Case:
    """Any legal call; on a GPU of GPU_TYPES and, for few block shapes, at most eight tokens."""
    gpu = device != "cpu"
    if gpu:
        x, w, scale, zero, out = draw(st.sampled_from(GPU_TYPES))
        leads = [(), (0,), (1,), (3,), (8,), (2, 3), (0, 4)]
    else:
        x, w = draw(st.sampled_from(PAIRS))
        scale, zero = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(ZERO_DTYPES))
        out = draw(st.sampled_from((None, *FLOATS)))
        leads = [(), (0,), (1,), (2,), (3,), (9,), (17,), (33,), (2, 3), (0, 4), (2, 1, 2)]
    groups, zero_groups = 1, 0
    if draw(st.booleans()):
        long = () if gpu else (4100,)
        k = draw(st.sampled_from((0, 1, 2, 7, 31, 32, 33, 100, 127, 128, 256, *long)))
    else:
        count = draw(st.sampled_from((2, 3, 4, 9)))
        k = count * draw(st.sampled_from((16, 32, 48, 64, 112)))
        groups, zero_groups = draw(st.sampled_from(((count, 0), (count, 1), (1, count))))
    activation, residual = None, False
    if not gpu:  # kernels of their own
        activation = draw(st.sampled_from((None, None, "relu") if exact else (None, *ACTIVATIONS)))
        residual = draw(st.booleans())
    integer = x in CODES
    a_zero = a_zero_of(x)
    if x == "s8":
        a_zero = draw(st.sampled_from((None, torch.int32) if gpu else (None, *ZERO_DTYPES)))
    return Case(
        x=x,
        w=w,
        lead=draw(st.sampled_from(leads)),
        n=draw(st.sampled_from((0, 1, 7, 48, 65))),
        k=k,
        groups=groups,
        zero_groups=zero_groups if w == "u4" else 0,
        scale_shape=draw(st.sampled_from(("table", "column", "scalar"))),
        scale=scale,
        zero=zero,
        out=out,
        bias=draw(st.sampled_from((None, *FLOATS))),
        alpha=draw(st.sampled_from(("none", "float", "tensor"))),
        a_scale=draw(st.sampled_from(("none", "scalar", "token", "flat"))) if integer else "none",
        a_zero=a_zero,
        a_layout=draw(st.sampled_from(LAYOUTS)),
        w_layout=draw(st.sampled_from(LAYOUTS)),
        scale_layout=draw(st.sampled_from(LAYOUTS)),
        activation=activation,
        residual=residual,
        # an infinity may come out as NaN, but relu of the one is a number
        special=activation is None and draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )
