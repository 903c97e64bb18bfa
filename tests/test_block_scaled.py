"""GEMMs of MXFP4, NVFP4 and MXFP8: equal to the exact product, rounded once.

The oracle decodes by the definitions of the formats and sums in float64 (integers, in fact: every
product of two FP4 values and two scales is one, times a power of two). The kernels sum in float32,
which is as exact as long as these integers, and so it is for data like QuTLASS's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fp4_case import exact, op_of, ordered, quantized
from tolerance import assert_close
from torch import Tensor

import intlass_ops as ia
from intlass_ops import fp4, fused_quantize, packing
from intlass_ops.cuda import launch_fp4
from intlass_ops.ops import block_scaled_kernels
from intlass_ops.reference import round_once
from intlass_ops.rotation import hadamard_matrix

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
GROUP = {"mx": 32, "nv": 16}

SHAPES = [(1, 48, 160), (16, 130, 512), (33, 17, 96), (130, 64, 256), (3, 5, 32)]
# rows that skinny_ring.cu takes, with a tail of K; hopper.cu's and its edges
LARGE = [(2, 17000, 1056), (300, 200, 512)]


@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize(
    ("format_", "method"), [("mx", "quest"), ("mx", "abs_max"), ("nv", "abs_max")]
)
def test_two_fp4_operands(format_: str, method: str, blocked: bool, device: str) -> None:
    shapes = [*SHAPES, *(LARGE if device == "cuda" else []), *([(4, 20, 48)] * (format_ == "nv"))]
    for m, n, k in shapes:
        (a, a_scale), (b, b_scale) = (
            quantized(format_, rows, k, method, seed) for seed, rows in enumerate((m, n))
        )
        operands = [
            t.to(device) for t in (a, b, ordered(a_scale, blocked), ordered(b_scale, blocked))
        ]
        x, w = exact(a, a_scale), exact(b, b_scale)
        y = op_of(format_, blocked)(*operands, torch.tensor(0.25, device=device))
        assert y.dtype == BF16
        assert torch.equal(y.cpu(), round_once(x @ w.T / 4, BF16)), (m, n, k)
        y = op_of(format_, blocked)(*operands, 1 / 9, out_dtype=FP32)
        assert_close(y.cpu(), x @ w.T / 9, x.abs() @ w.abs().T / 9)


LLAMAS = [(12288, 4096), (4096, 11008), (15360, 5120), (10240, 8192), (57344, 8192), (8192, 28672)]


@pytest.mark.gpu
@pytest.mark.parametrize("format_", ["mx", "nv"])
def test_products_of_llamas_are_exact(format_: str) -> None:
    """(N, K) from Llama 7B to 70B, fused and merged, with one token and with 16."""
    torch.manual_seed(0)
    for n, k in LLAMAS:
        h = hadamard_matrix(32, device="cuda", dtype=BF16)
        call = fused_quantize.fused_quantize_mx if format_ == "mx" else ia.fused_quantize_nv
        x, w = (torch.randn(rows, k, device="cuda", dtype=BF16) * 25 for rows in (16, n))
        (a, a_scale), (b, b_scale) = (call(t, h) for t in (x, w))
        expected = exact(a, a_scale) @ exact(b, b_scale).T
        for m in (1, 16):
            y = op_of(format_, False)(a[:m], b, a_scale[:m], b_scale)
            assert torch.equal(y.cpu(), round_once(expected[:m].cpu(), BF16)), (m, n, k)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("format_", ["mx", "nv"])
def test_fp4_weights_with_16_bit_activations(format_: str, dtype: torch.dtype, device: str) -> None:
    """Small integers as activations: no sum is rounded."""
    for m, n, k in SHAPES:
        a = torch.randint(-4, 5, (m, k), generator=torch.Generator().manual_seed(0)).to(dtype)
        b, b_scale = quantized(format_, n, k, "abs_max", 1)
        b_scale = torch.full_like(b_scale.float(), 0.5).to(E4M3) if format_ == "nv" else b_scale
        blocked = m % 2 == 0
        args = (a.to(device), b.to(device), None, ordered(b_scale, blocked).to(device))
        y = op_of(format_, blocked)(*args, out_dtype=FP32)
        assert torch.equal(y.cpu().double(), a.double() @ exact(b, b_scale).T), (m, n, k)
        assert op_of(format_, blocked)(*args).dtype == dtype


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("format_", ["mx", "nv"])
def test_every_code_under_every_scale(format_: str, tokens: int, device: str) -> None:
    """One value a row under each scale there is, as weights and as activations."""
    k, g, dtype = 128, GROUP[format_], E8M0 if format_ == "mx" else E4M3
    bits = torch.arange(255 if format_ == "mx" else 127, dtype=torch.uint8)
    scales = bits.view(dtype).repeat_interleave(16)[:, None].repeat(1, k // g)  # [rows, K/g]
    codes = torch.zeros(len(scales), k, dtype=torch.uint8)
    codes[:, 35] = torch.arange(16, dtype=torch.uint8).repeat(len(bits))
    one = fp4.encode_e2m1(torch.ones(tokens, k))
    unit = torch.tensor([[1.0], [0.25]]).repeat(tokens // 2, k // g)
    a_scale = fp4.encode_e8m0_floor(unit) if format_ == "mx" else unit.to(E4M3)
    b, a = packing.pack(codes), packing.pack(one)
    expected = exact(a, a_scale) @ exact(b, scales).T
    a, a_scale, b, scales = (t.to(device) for t in (a, a_scale, b, scales))
    for out in (BF16, FP32):
        y = op_of(format_, False)(a, b, a_scale, scales, out_dtype=out)
        assert torch.equal(y.cpu(), round_once(expected, out))
        y = op_of(format_, False)(b[:tokens], a, scales[:tokens], a_scale, out_dtype=out)
        assert torch.equal(y.cpu(), round_once(expected[:, :tokens].T, out))
        y = op_of(format_, False)(b, a, scales, a_scale, out_dtype=out)
        assert torch.equal(y.cpu(), round_once(expected.T, out))
        y = op_of(format_, False)(
            torch.ones(tokens, k).to(a.device, BF16), b, None, scales, out_dtype=out
        )
        assert torch.equal(y.cpu()[0], round_once(expected[0], out))


@pytest.mark.parametrize("m", [2, 16, 40])
def test_large_scales_among_others(m: int, device: str) -> None:
    """Those above 64 take another way through the kernels for few tokens, for all they are with."""
    rng = torch.Generator().manual_seed(m)
    k, n = 512, 72
    a, b = (torch.randint(0, 256, (rows, k // 2), generator=rng).to(torch.uint8) for rows in (m, n))
    a_scale, b_scale = (torch.full((rows, k // 32), 127, dtype=torch.uint8) for rows in (m, n))
    a_scale[1, 5], b_scale[3, 2], b_scale[70, 15] = 136, 134, 133
    scales = a_scale.view(E8M0), b_scale.view(E8M0)
    expected = round_once(exact(a, scales[0]) @ exact(b, scales[1]).T, FP32)
    operands = (t.to(device) for t in (a, b, *scales))
    assert torch.equal(op_of("mx", False)(*operands, out_dtype=FP32).cpu(), expected)


@pytest.mark.parametrize(("format_", "code"), [("mx", 255), ("nv", 127), ("nv", 255)])
@pytest.mark.parametrize("m", [2, 20])
def test_a_nan_scale_shows(format_: str, code: int, m: int, device: str) -> None:
    a, a_scale = quantized(format_, m, 128, "abs_max", 0)
    b, b_scale = quantized(format_, 3, 128, "abs_max", 1)
    b_scale.view(torch.uint8)[1, 3] = code
    y = op_of(format_, False)(*(t.to(device) for t in (a, b, a_scale, b_scale)))
    assert y.isnan().cpu().tolist() == [[False, True, False]] * m


@pytest.mark.parametrize(("m", "n", "k"), [(0, 4, 64), (3, 0, 64), (2, 3, 0)])
@pytest.mark.parametrize("format_", ["mx", "nv"])
def test_nothing_to_compute(format_: str, m: int, n: int, k: int, device: str) -> None:
    dtype, g = (E8M0, 32) if format_ == "mx" else (E4M3, 16)
    (a, a_scale), (b, b_scale) = (
        (torch.zeros(r, k // 2, dtype=torch.uint8), torch.zeros(r, k // g, dtype=dtype))
        for r in (m, n)
    )
    y = op_of(format_, False)(*(t.to(device) for t in (a, b, a_scale, b_scale)))
    assert torch.equal(y.cpu(), torch.zeros(m, n, dtype=BF16))
    x = torch.ones(m, k, dtype=BF16, device=device, requires_grad=True)
    op_of(format_, False)(x, b.to(device), None, b_scale.to(device)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_mxfp8(device: str) -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (n, 96), generator=rng).float().to(E4M3) for n in (5, 24))
    exponents = [torch.randint(-3, 4, (n, 3), generator=rng) for n in (5, 24)]
    a_scale, b_scale = (fp4.encode_e8m0_floor(torch.exp2(e.double())) for e in exponents)
    wide = [
        t.double() * fp4.scale_values(s, torch.float64).repeat_interleave(32, 1)
        for t, s in ((a, a_scale), (b, b_scale))
    ]
    expected = round_once(wide[0] @ wide[1].T, BF16)
    scales = fp4.to_blocked(a_scale).to(device), fp4.to_blocked(b_scale).to(device)
    y = ia.matmul_mxf8_bf16_tn(a.to(device), b.to(device), *scales)
    assert torch.equal(y.cpu(), expected)
    nn = ia.matmul_mxf8_bf16_nn(a.to(device), b.T.contiguous().to(device), *scales)
    assert torch.equal(nn, y)


def test_dense_decoding_is_exact(device: str) -> None:
    """What large products multiply, for all codes under all scales."""
    if device == "cpu":
        pytest.skip("decodes on a GPU, or in the test of the reference")
    for dtype, g in ((E8M0, 32), (E4M3, 16)):
        bits = torch.arange(255 if dtype == E8M0 else 127, dtype=torch.uint8)
        scales = bits.view(dtype)[:, None].expand(-1, 5).contiguous()
        codes = packing.pack(torch.arange(16, dtype=torch.uint8).repeat(len(bits), 5 * g // 16))
        for blocked in (True, False):
            d, f = launch_fp4.decode(
                codes.to(device), ordered(scales, blocked).to(device), blocked, BF16
            )
            assert torch.equal(d.cpu().double() * f, exact(codes, scales))


def test_two_bf16_terms_hold_every_fp16_number() -> None:
    x = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(FP16)
    high, low = (t.double() for t in block_scaled_kernels.two_terms(x))
    assert torch.equal(torch.nan_to_num(high + low, nan=7.0), torch.nan_to_num(x.double(), nan=7.0))


def test_gradient_and_compile(device: str) -> None:
    a = torch.randn(2, 3, 64, device=device, dtype=BF16, requires_grad=True)
    b, b_scale = (t.to(device) for t in quantized("nv", 24, 64, "abs_max", 2))

    def run(a: Tensor) -> Tensor:
        return ia.matmul_nvf4_bf16_tn(a, b, None, b_scale, 0.5, blocked=False)

    y = run(a)
    y.backward(torch.ones_like(y))
    w = exact(b.cpu(), b_scale.cpu())
    expected = (0.5 * torch.ones(6, 24).double() @ w).view(2, 3, 64)
    assert a.grad is not None
    assert float((a.grad.cpu() - expected).abs().max() / expected.abs().max()) < 0.01
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a), y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.zeros(2, 48, dtype=torch.uint8)}, ValueError, "a has K=96, b has K=64"),
        ({"a_scale": None}, TypeError, "matmul_ada_mxf4_bf16_tn: a has dtype uint8"),
        ({"a_scale": torch.zeros(2, 3).to(E4M3)}, TypeError, "a_scale has dtype float8_e4m3fn"),
        ({"b_scale": torch.zeros(3, 2).to(E4M3)}, TypeError, "b_scale has dtype float8_e4m3fn"),
        ({"b_scale": torch.zeros(3, 3, dtype=torch.uint8).view(E8M0)}, ValueError, "b_scale is"),
        ({"alpha": torch.ones(2)}, ValueError, r"alpha has shape \(2,\)"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    one = torch.full((3, 2), 127, dtype=torch.uint8).view(E8M0)
    args = {
        "a": torch.zeros(2, 32, dtype=torch.uint8),
        "b": torch.zeros(3, 32, dtype=torch.uint8),
        "a_scale": one[:2],
        "b_scale": one,
    }
    with pytest.raises(error, match=message):
        ia.matmul_ada_mxf4_bf16_tn(**(args | change))
