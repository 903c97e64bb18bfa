"""Weights as checkpoints store them, under bf16: scales of other types, small groups.

Every kernel that such a weight may get, by its tokens, is compared with float64. Where weights take
their scales, and what they lose: config/problem.py. Speed: benchmarks/stored_weights.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gemm_case import Case
from gemm_checks import check_bounded, check_exact

from intlass_ops import config

BF16, FP16, FP32, BYTE = torch.bfloat16, torch.float16, torch.float32, torch.uint8
FORMS = {
    "Q4_0": ("s4", 32, FP16, None),
    "Q4_K": ("u4", 32, FP32, FP32),
    "Q8_0": ("s8", 32, FP16, None),
    "Q6_K": ("s8", 16, FP32, None),
    "GPTQ-g128": ("u4", 128, FP16, BYTE),
    "GPTQ-g32": ("u4", 32, FP16, BYTE),
    "HQQ-fp16": ("u4", 64, FP16, FP16),
    "symmetric-g128": ("s4", 128, FP16, None),
    "symmetric-g64": ("s4", 64, FP32, None),
    "NF4": ("nf4", 64, FP32, None),
    "NF4, bf16 scales": ("nf4", 64, BF16, None),
}
SIZES = [(300, 1024), (4100, 576)]  # N, K
CASES = [(form, n, k) for form in FORMS for n, k in SIZES if k % FORMS[form][1] == 0]


def case_of(form: str, m: int, n: int, k: int) -> Case:
    w, group_size, scale, zero = FORMS[form]
    return Case("bf16", w, (m,), n=n, k=k, groups=k // group_size, scale=scale, zero=zero or BYTE)


@pytest.mark.gpu
@pytest.mark.parametrize(("form", "n", "k"), CASES)
def test_every_number_of_tokens(form: str, n: int, k: int) -> None:
    for m in (1, 2, 3, 5, 8, 9, 16, 17, 33, 64, 130, 300):
        case = case_of(form, m, n, k)
        check_bounded(case, "cuda")
        check_exact(replace(case, seed=m), "cuda")


@pytest.mark.parametrize("form", FORMS)
def test_no_form_is_left_to_the_portable_kernel(form: str) -> None:
    """On an H200: there gemm.cu took Q6_K 1.5 to 5 times as long (docs/notes/hopper.md)."""
    w, group_size, scale, zero = FORMS[form]
    kinds = {BF16: "__nv_bfloat16", FP16: "__half", FP32: "float", BYTE: "unsigned char"}
    shape = config.Shape(
        x_kind="bf16",
        w_kind=w,
        scale_type=kinds[scale],
        zero_type=kinds[zero] if zero else "float",
        out_type="__nv_bfloat16",
        has_zeros=zero is not None,
        has_a_zero=False,
        aligned=True,
        m=17,
        n=4096,
        k=4096,
        group_size=group_size,
    )
    h200 = config.device_of("sm_90a")
    for m in (17, 64, 256, 2048):
        assert isinstance(config.pick(h200, replace(shape, m=m)), config.Hopper)
    for m in (1, 8, 16):
        assert not isinstance(config.pick(h200, replace(shape, m=m)), config.Gemm)
