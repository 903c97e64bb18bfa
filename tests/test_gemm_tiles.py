"""gemm.cu's tiles for many tokens: which problems get them, and that they are right on a GPU.

Shapes, layouts and dtypes of gemm.cu's other tiles: test_cuda_ops.py, test_matmul.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gemm_case import X_DTYPE, Case
from gemm_checks import check_bounded, check_exact

from intlass_ops import config
from intlass_ops.config.gemm_tiles import pick_gemm
from intlass_ops.cuda import jit, launch

A100 = config.device_of("sm_80")
W4A16 = config.Shape(
    x_kind="bf16",
    w_kind="u4",
    scale_type="__nv_bfloat16",
    zero_type="unsigned char",
    out_type="__nv_bfloat16",
    has_zeros=True,
    has_a_zero=False,
    aligned=True,
    m=2048,
    n=4096,
    k=4096,
    group_size=128,
)


def is_scaled(**change: Any) -> bool:
    c = config.pick(A100, replace(W4A16, **change))
    assert isinstance(c, config.Gemm)
    taken = config.Grouping.SCALED_WEIGHTS, config.Grouping.SCALED_SPANS
    assert (c.block_m == 128) == (c.grouping in taken)
    return c.block_m == 128


def test_weights_take_scales_where_tiles_are_large() -> None:
    assert is_scaled()
    assert is_scaled(group_size=64, m=4096)
    assert is_scaled(group_size=32)
    assert is_scaled(w_kind="s8", has_zeros=False)
    assert is_scaled(scale_type="float")
    assert is_scaled(zero_type="float")
    assert is_scaled(x_kind="fp16", scale_type="__half")
    assert not is_scaled(x_kind="fp16", scale_type="float")
    assert not is_scaled(m=64)
    assert not is_scaled(n=256)
    assert not is_scaled(out_type="float")
    assert not is_scaled(group_size=48)
    assert not is_scaled(batch_invariant=True)


LARGE = [
    Case(x, w, groups=groups, scale=X_DTYPE[x], zero=zero)
    for x, w, groups, zero in (
        ("bf16", "s4", 8, torch.uint8),
        ("bf16", "u4", 16, torch.bfloat16),
        ("fp16", "u4", 8, torch.int32),
        ("fp16", "s8", 4, torch.uint8),
        ("bf16", "s4", 1, torch.uint8),
        ("bf16", "s8", 1, torch.uint8),
    )
]
LARGE += [Case("s8", "s8", a_scale="token"), Case("s8", "s4", a_scale="token")]
LARGE += [
    Case("bf16", w, groups=groups, scale=scale, zero=zero)
    for w, groups, scale, zero in (
        ("s4", 8, torch.half, torch.uint8),
        ("s4", 32, torch.half, torch.uint8),
        ("s4", 32, torch.bfloat16, torch.uint8),
        ("u4", 8, torch.half, torch.uint8),
        ("u4", 32, torch.float32, torch.float32),
        ("s8", 16, torch.float32, torch.uint8),
        ("s8", 32, torch.half, torch.uint8),
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_86"])
def test_large_tiles_of_any_gpu(case: Case, arch: str) -> None:
    """Ragged edges, several tiles of tokens, K in two stripes, scales of every magnitude.

    But not where weights with their scales are no 16-bit floats: 128 * 2^10, a quarter of 2^-132.
    """
    case = replace(case, lead=(150,), n=330, k=1024, out=None)
    zeros = launch.ZERO_TYPE[case.zero] if case.w == "u4" else "float"
    types = launch.TYPE[case.scale], zeros, launch.TYPE[case.out_dtype]
    sizes = 8192, 8192, case.k, case.k // case.groups
    shape = config.Shape(case.x, case.w, *types, case.w == "u4", False, True, *sizes)
    whole = pick_gemm(config.device_of(arch), shape)
    assert whole.block_m == 128
    all_scales = (case.x, case.w) != ("fp16", "s8") and not case.zero.is_floating_point
    all_scales &= case.groups == 1 or case.scale != torch.float32
    tiles = [whole, replace(whole, split_k=2), replace(whole, aligned=False)]
    jit.warmup(tiles, progress=False)
    for tile in tiles:
        with launch.forced(tile):
            check_exact(case, "cuda")
            if all_scales:
                check_exact(replace(case, special=True), "cuda")
            check_bounded(case, "cuda")
