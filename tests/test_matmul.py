"""The ops with INT4, INT8, FP8 and NF4 weights, and dequantize, against the oracle: exactly where
float32 has nothing to round, by the tolerance rule at random.

Refusals: test_matmul_refusals.py. Compilation, gradients, vmap: test_compile_ops.py,
test_transforms.py. What only a GPU has: test_cuda_ops.py, test_cuda_streams.py.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import oracle
import pytest
import torch
from gemm_case import CODES, X_DTYPE, Case, build, float32_is_exact, relayout, stored
from gemm_checks import check_bounded, check_exact, check_large_sum
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import (
    BF16,
    FLOATS,
    FP16,
    FP32,
    PAIRS,
    cover,
    dtype_cases,
    identity_cases,
    legal_cases,
    long_cases,
    special_cases,
    table_cases,
)
from tolerance import assert_identical
from torch import Tensor

from intlass_ops import (
    dequantize,
    matmul_int4_bf16_tn,
    matmul_int8_bf16_tn,
    matmul_lut4_bf16_tn,
    packing,
)
from intlass_ops.ops import matmul_fp8_bf16_tn

# ------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("case", cover(), ids=str)
def test_integers_and_powers_of_two_give_bit_equal_results(case: Case, device: str) -> None:
    check_exact(case, device)


@pytest.mark.parametrize("case", dtype_cases(), ids=repr)
def test_every_dtype_of_the_parameters_is_exact(case: Case, device: str) -> None:
    check_exact(case, device)


@pytest.mark.parametrize("case", table_cases(), ids=repr)
def test_scales_and_zeros_may_differ_in_shape(case: Case, device: str) -> None:
    check_exact(case, device)


@given(st.data())
def test_any_legal_call_is_exact(device: str, data: st.DataObject) -> None:
    case = data.draw(legal_cases(device, exact=True))
    assume(float32_is_exact(build(case, "cpu")))
    check_exact(case, device)


def every_code(kind: str, n: int, k: int) -> Tensor:
    """Codes [n, k] in which each column, so each group and each lane, sees every code of n rows."""
    low, high = CODES[kind]
    rows, columns = torch.arange(n)[:, None], torch.arange(k)
    return (rows + 7 * columns) % (high - low + 1) + low


@pytest.mark.parametrize("case", identity_cases(), ids=str)
def test_identity_activations_reproduce_the_weights(case: Case, device: str) -> None:
    """Bit for bit: every code in every group, with scales that are no powers of two."""
    call = build(case, device)
    codes = every_code(case.w, case.n, case.k)
    call.w = stored(case.w, codes).to(device)
    call.scales = call.scales * 1.171875  # 1.0010110 in binary
    if case.a_zero is not None:
        call.options["a_zero"] = torch.zeros((), device=device)
    expected = call.weight().T
    eye = torch.eye(case.k, dtype=torch.int64)
    eye = oracle.pack(eye) if case.x in ("s4", "u4") else eye.to(X_DTYPE[case.x])
    m = case.lead[0]
    for first in range(0, case.k, m):
        call.a = eye[first : first + m].to(device)
        assert_identical(call.run(), oracle.round_to(expected[first : first + m], FP32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("w", ["s4", "u4", "s8", "e4m3", *oracle.TABLES])
def test_dequantize_rounds_the_exact_weights(w: str, dtype: torch.dtype, device: str) -> None:
    for k, groups in ((96, 6), (96, 2), (96, 1), (33, 1), (0, 1)):
        call = build(Case("bf16", w, k=k, groups=groups, zero=BF16, scale=BF16), device)
        if w == "e4m3":
            call.w = stored(w, every_code(w, 48, k)).to(device)
        zeros, table = call.options.get("zeros"), call.case.table
        expected = oracle.round_to(oracle.weight(call.w, call.scales, zeros, k, table), dtype)
        for layout in ("contiguous", "transposed", "columns"):
            w_of_layout = relayout(call.w, layout)
            dense = dequantize(w_of_layout, call.scales, zeros, k=k, dtype=dtype, table=table)
            assert_identical(dense, expected)
            assert dense.is_contiguous()


# --------------------------------------------------------------------------------- single rounding


@pytest.mark.parametrize("out", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("x", "w"), [pair for pair in PAIRS if pair[0] not in ("s4", "u4")])
def test_bias_joins_before_the_rounding(x: str, w: str, out: torch.dtype, device: str) -> None:
    """The product is halfway between two numbers of the output type; the bias decides."""
    odd, values = {BF16: (257, [16.0] * 16 + [1.0]), FP16: (2049, [127.0] * 16 + [17.0])}[out]
    a = torch.zeros(1, 32)
    a[0, :17] = torch.tensor(values)
    a = a.to(X_DTYPE[x]).to(device)
    codes = torch.ones(2, 32, dtype=torch.int8, device=device)
    bias, ones = torch.tensor([1.0, -1.0], device=device), torch.ones(2, device=device)
    if w == "s8":
        y = matmul_int8_bf16_tn(a, codes, None, ones, bias=bias, out_dtype=out)
    elif w == "e4m3":
        codes = codes.to(torch.float8_e4m3fn)
        y = matmul_fp8_bf16_tn(a, codes, ones, bias=bias, out_dtype=out)
    elif w in oracle.TABLES:
        packed = oracle.pack(oracle.TABLES[w].index(1.0) * codes)
        y = matmul_lut4_bf16_tn(a, packed, ones, table=w, bias=bias, out_dtype=out)
    else:
        zeros = None if w == "s4" else torch.zeros_like(ones)
        y = matmul_int4_bf16_tn(a, oracle.pack(codes), ones, zeros, bias=bias, out_dtype=out)
    assert y.tolist() == [[odd + 1, odd - 1]]


@pytest.mark.parametrize("x", ["bf16", "s8"])
def test_alpha_and_a_scale_join_before_the_rounding(x: str, device: str) -> None:
    """3 * 257 + 1 is 768 if 257 is rounded by itself, 3 * 257 - 1 is 772 if 3 * 257 is."""
    a = torch.zeros(1, 32)
    a[0, :3] = torch.tensor([127.0, 127.0, 3.0])
    a = a.to(X_DTYPE[x]).to(device)
    codes = torch.ones(2, 32, dtype=torch.int8, device=device)
    a_scale = torch.tensor([[2.0]], device=device) if x == "s8" else None
    alpha = 1.5 if x == "s8" else 3.0
    bias = torch.tensor([1.0, -1.0], device=device)
    scale = torch.ones(2, device=device)
    y = matmul_int8_bf16_tn(a, codes, a_scale, scale, alpha=alpha, bias=bias, out_dtype=BF16)
    assert y.tolist() == [[772, 768]]


@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 48)], ids=str)
@pytest.mark.parametrize("w", ["s4", "s8"])
def test_integer_sums_beyond_24_bits_are_rounded_once(w: str, m: int, n: int, device: str) -> None:
    check_large_sum(w, m, n, device)


@pytest.mark.parametrize(
    ("m", "n", "k", "groups"), [(5, 24, 96, 3), (40, 264, 512, 1), (40, 8, 256, 2)]
)
def test_lanes_are_codes_in_another_order(m: int, n: int, k: int, groups: int, device: str) -> None:
    codes = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    w = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8).to(device)
    scales, a_scale = torch.rand(n, groups, device=device), torch.rand(m, 1, device=device)
    zeros = torch.randint(0, 16, (n, groups), dtype=torch.uint8).to(device)
    lanes = packing.to_lanes(codes)
    assert lanes.view(torch.int8)[:, :16].equal(codes[:, :32:2])
    assert packing.from_lanes(lanes).equal(codes)
    wide = torch.cat((lanes, lanes), 1)[:, : k // 4]
    for z, same in itertools.product((None, zeros), (lanes, wide)):
        expected = matmul_int4_bf16_tn(codes.to(device), w, scales, z, a_scale=a_scale)
        y = matmul_int4_bf16_tn(same.to(device), w, scales, z, a_scale=a_scale)
        assert torch.equal(y, expected)


# ----------------------------------------------------------------------------------------- bounded


@pytest.mark.parametrize("case", cover(), ids=str)
def test_random_numbers_stay_within_the_tolerance(case: Case, device: str) -> None:
    check_bounded(case, device)


@given(st.data())
def test_any_legal_call_stays_within_the_tolerance(device: str, data: st.DataObject) -> None:
    check_bounded(replace(data.draw(legal_cases(device)), special=False), device)


@pytest.mark.parametrize("case", long_cases(), ids=str)
def test_long_rows_stay_within_the_tolerance(case: Case, device: str) -> None:
    check_bounded(case, device)
    check_exact(case, device)


# ------------------------------------------------------------------------ zero, subnormal, infinite


@pytest.mark.parametrize("case", special_cases(), ids=repr)
def test_zero_subnormal_huge_and_infinite_scales(case: Case, device: str) -> None:
    """Exact in the rows with finite scales; in the others nothing that could pass for a number."""
    exact = build(case, device).expected().y
    assert not exact.isfinite().all()
    check_exact(case, device)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("w", ["s4", "u4", "s8", "e4m3", "nf4"])
@pytest.mark.parametrize("x", ["bf16", "fp16", "fp32"])
def test_a_token_that_is_not_finite_spoils_itself_only(
    x: str, w: str, value: float, device: str
) -> None:
    call = build(Case(x, w, lead=(9,), k=96, groups=6), device)
    clean = call.run()
    a = call.a.clone()
    a[4, 50] = value
    y = replace(call, a=a).run()
    assert not y[4].isfinite().any()
    others = torch.arange(9, device=device) != 4
    assert_identical(y[others], clean[others])


@pytest.mark.parametrize("name", ["a_scale", "a_zero", "zeros", "bias", "alpha"])
def test_nan_in_a_parameter_reaches_the_output(name: str, device: str) -> None:
    case = Case("s8", "u4", zero=FP32, bias=FP32, alpha="tensor", a_scale="token", a_zero=FP32)
    call = build(case, device)
    clean = call.run()
    call.options[name] = call.options[name].clone()
    call.options[name].view(-1)[0] = torch.nan
    y = call.run()
    spoiled = torch.zeros_like(y, dtype=torch.bool)
    rows, columns = {
        "zeros": (slice(None), 0),
        "bias": (slice(None), 0),
        "alpha": (slice(None),) * 2,
    }.get(name, (0, slice(None)))
    spoiled[rows, columns] = True
    assert y[spoiled].isnan().all()
    assert_identical(y[~spoiled], clean[~spoiled])


# ------------------------------------------------------------------------------------------ shapes


_ONE_OF_EACH = [
    ("bf16", "u4"), ("fp32", "s8"), ("bf16", "e4m3"), ("bf16", "nf4"), ("s8", "s8"), ("s4", "s4"),
]  # fmt: skip


@pytest.mark.parametrize("lead", [(), (0,), (1,), (4, 0), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize(("x", "w"), _ONE_OF_EACH)
def test_leading_dimensions_are_kept(x: str, w: str, lead: tuple[int, ...], device: str) -> None:
    for a_scale in ("token", "flat") if x in CODES else ("none",):
        case = Case(x, w, lead=lead, a_scale=a_scale, out=FP32)
        y = build(case, device).run()
        assert y.shape == (*lead, 48)
        assert y.is_contiguous()
        check_exact(case, device)


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize(("x", "w"), _ONE_OF_EACH)
def test_empty_and_single_sizes(x: str, w: str, n: int, k: int, device: str) -> None:
    """K = 0 is a sum of nothing: the bias alone, as torch.nn.functional.linear has it."""
    for lead in ((), (1,), (3,), (0,)):
        check_exact(Case(x, w, lead=lead, n=n, k=k, bias=FP32), device)


@pytest.mark.parametrize(("low", "high"), [(-128, -128), (-128, 127)])
def test_int8_sums_reach_the_edge_of_int32(low: int, high: int, device: str) -> None:
    k = (1 << 17) - 1
    a, b = (torch.full((1, k), v, dtype=torch.int8, device=device) for v in (low, high))
    one = torch.ones((), device=device)
    exact = torch.full((1, 1), float(low * high * k), dtype=torch.float64, device=device)
    for out in FLOATS:
        y = matmul_int8_bf16_tn(a, b, one, one, out_dtype=out)
        assert_identical(y, oracle.round_to(exact, out))
