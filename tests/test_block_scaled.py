"""GEMMs of MXFP4, NVFP4 and MXFP8: equal to the exact product, rounded once.

The oracle decodes by the definitions of the formats and sums in float64 (integers, in fact: every
product of two FP4 values and two scales is one, times a power of two). The kernels sum in float32,
which is as exact as long as these integers, and so it is for data like QuTLASS's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

import intlass_ops as ia
from intlass_ops import config, fp4, fused_quantize, packing
from intlass_ops.config.skinny_mx import mx_candidates
from intlass_ops.cuda import launch_fp4, launch_mx
from intlass_ops.ops import block_scaled_kernels
from intlass_ops.reference import round_once
from intlass_ops.rotation import hadamard_matrix

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
GROUP = {"mx": 32, "nv": 16}


def quantized(format_: str, rows: int, k: int, method: str, seed: int) -> tuple[Tensor, Tensor]:
    """Codes and plain scales of randn·25, as QuTLASS tests with."""
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)) * 25
    if format_ == "mx":
        return fused_quantize.fused_quantize_mx(x, hadamard_matrix(16), method=method)  # type: ignore[return-value]
    return fused_quantize.fused_quantize_nv(x, hadamard_matrix(16), 3.0, method=method)  # type: ignore[return-value]


def exact(codes: Tensor, scales: Tensor) -> Tensor:
    k = codes.shape[-1] * 2
    values = fp4.decode_e2m1(packing.unpack(codes, k, signed=False), torch.float64)
    s = fp4.scale_values(scales, torch.float64)
    return values * s.repeat_interleave(k // s.shape[-1], -1)


def op_of(format_: str, blocked: bool) -> Callable[..., Tensor]:
    if format_ == "mx":
        return ia.matmul_mxf4_bf16_tn if blocked else ia.matmul_ada_mxf4_bf16_tn

    def nv(*args: Any, **options: Any) -> Tensor:
        return ia.matmul_nvf4_bf16_tn(*args, blocked=blocked, **options)

    return nv


def ordered(scales: Tensor, blocked: bool) -> Tensor:
    return fp4.to_blocked(scales) if blocked else scales


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
    high, low = block_scaled_kernels._two_terms(x[None]).double()
    assert torch.equal(torch.nan_to_num(high + low, nan=7.0), torch.nan_to_num(x.double(), nan=7.0))


@pytest.mark.parametrize(
    ("arch", "x_kind", "m", "n", "k", "kernel"),
    [
        ("sm_90a", "e2m1", 1, 4096, 4096, "skinny_held"),
        ("sm_90a", "e2m1", 8, 28672, 4096, "skinny_held"),
        ("sm_90a", "e2m1", 16, 28672, 4096, "skinny_held"),
        ("sm_90a", "e2m1", 1, 8192, 28672, "skinny_ring"),
        ("sm_90a", "e2m1", 1, 5120, 13824, "skinny_held"),
        ("sm_90a", "e2m1", 8, 8192, 28672, "skinny_held"),
        ("sm_90a", "e2m1", 16, 8192, 28672, "hopper"),
        ("sm_90a", "e2m1", 16, 8192, 28800, "skinny"),
        ("sm_90a", "bf16", 16, 8192, 28672, "skinny_held"),
        ("sm_90a", "e2m1", 17, 4096, 4096, "hopper"),
        ("sm_90a", "bf16", 16, 28672, 4128, "skinny_ring"),
        ("sm_90a", "bf16", 1, 8192, 28672, "skinny_ring"),
        ("sm_90a", "bf16", 17, 4096, 4096, "hopper"),
        ("sm_90a", "bf16", 17, 4096, 4128, None),
        ("sm_80", "bf16", 16, 4096, 48, None),
        ("sm_80", "bf16", 17, 4096, 4096, None),
    ],
)
def test_kernel_of_a_product(
    arch: str, x_kind: str, m: int, n: int, k: int, kernel: str | None
) -> None:
    w_shape = torch.Size((n, k // 2))
    shape = launch_fp4._shape(x_kind, m, w_shape, True, E4M3, BF16, True)
    picked = config.pick_fp4(config.device_of(arch), shape)
    assert (picked and picked.entry) == kernel


@pytest.mark.parametrize(
    ("m", "n", "k", "blocked", "kernel"),
    [
        (16, 28672, 4096, True, "skinny_mx"),
        (16, 8192, 28672, False, "skinny_mx"),
        (8, 8192, 28672, True, "skinny_mx"),
        (8, 28672, 4096, True, "skinny_held"),
        (1, 8192, 28672, True, "skinny_mx"),
        (1, 8192, 28672, False, "skinny_ring"),
        (16, 4096, 4096, True, "skinny_mx"),
        (9, 2048, 4096, True, "skinny_mx"),
        (9, 1024, 8192, True, "skinny"),
        (8, 4096, 4096, True, "skinny_held"),
        (16, 28672, 3840, True, "skinny_mx"),
        (16, 28672, 3840, False, "skinny_held"),
    ],
)
def test_kernel_of_an_mx_product(m: int, n: int, k: int, blocked: bool, kernel: str) -> None:
    shape = launch_fp4._shape("e2m1", m, torch.Size((n, k // 2)), True, E8M0, BF16, blocked)
    picked = config.pick_fp4(config.device_of("sm_90a"), shape)
    assert picked is not None
    assert picked.entry == kernel
    without = config.pick_fp4(config.device_of("sm_90"), shape)
    assert without is not None
    assert without.entry != "skinny_mx"


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2, 4, 8])
@pytest.mark.parametrize("blocked", [True, False])
def test_scales_beyond_fp16(blocked: bool, m: int) -> None:
    """Numbers are fp16 in skinny_held.cu until a warp meets a scale for which that has no room."""
    codes_of = torch.arange(255, dtype=torch.uint8).repeat_interleave(16)
    n, k = len(codes_of), 4096
    shape = launch_fp4._shape("e2m1", m, torch.Size((n, k // 2)), True, E8M0, BF16, blocked)
    picked = config.pick_fp4(config.device_of("sm_90a"), shape)
    assert isinstance(picked, config.SkinnyHeld)
    assert picked.fp16_codes

    def rows(values: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """One value a row, all blocks of it under one scale."""
        row = torch.zeros(len(values), k, dtype=torch.uint8)
        row[:, 3235] = values
        return packing.pack(row), codes[:, None].repeat(1, k // 32)

    def block(codes: Tensor, scales: Tensor) -> Tensor:
        return exact(codes[:, 1616:1632], scales[:, 101:102].view(E8M0))

    every, six = (t.to(torch.uint8) for t in (torch.arange(n) % 16, torch.full((n,), 7)))
    one = torch.full((n,), 127, dtype=torch.uint8)
    tokens = torch.tensor([137, 113, 138, 112, 0, 254, 50, 200], dtype=torch.uint8)[:m]
    for w_codes, x_codes in ((codes_of, one[:m]), (one, tokens), (one - 3, one[:m] + 3)):
        (b, b_scale), (a, a_scale) = rows(every, w_codes), rows(six[:m], x_codes)
        expected = round_once(block(a, a_scale) @ block(b, b_scale).T, FP32)
        for change in ("none", "zeros", "not a number"):
            if change == "zeros":  # of x, under the smallest scale
                a_scale[:, 5] = 0
            if change == "not a number":
                b_scale[77, 9] = 255
                expected[:, 77] = torch.nan
            scales = (ordered(s.view(E8M0), blocked).cuda() for s in (a_scale, b_scale))
            y = op_of("mx", blocked)(a.cuda(), b.cuda(), *scales, out_dtype=FP32).cpu()
            assert torch.equal(y.nan_to_num(-1), expected.nan_to_num(-1)), change


MX_SHAPES = [(1, 72, 2048), (9, 1000, 4096), (16, 256, 6144), (7, 4160, 4608), (13, 17000, 1024)]


@pytest.mark.gpu
@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("apart", [False, True])
def test_tiles_of_mx_products(apart: bool, blocked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every split of K, tails of rows and tokens, and activations whose scales do not fit e5m2."""
    gpu = config.device_of("sm_90a")
    if launch_fp4.device_of(0).arch != gpu.arch:
        pytest.skip("skinny_mx.cu is for sm_90a")
    for m, n, k in MX_SHAPES:
        (a, a_scale), (b, b_scale) = (
            quantized("mx", rows, k, "abs_max", seed) for seed, rows in enumerate((m, n))
        )
        if apart:  # zeros under the largest scales, so that sums stay exact
            a.view(m, -1, 16)[:, 1::5] = 0
            a_scale.view(torch.uint8)[:, 1::5] = 200
            a_scale.view(torch.uint8)[0, :] += 20
            a.view(m, -1, 16)[0, 3] = a.view(m, -1, 16)[0, 2]
            a_scale.view(torch.uint8)[0, 3:5] = 100
        operands = [t.cuda() for t in (a, b, ordered(a_scale, blocked), ordered(b_scale, blocked))]
        x, w = exact(a, a_scale), exact(b, b_scale)
        shape = launch_fp4._shape("e2m1", m, b.shape, True, E8M0, BF16, blocked)
        tiles = list(mx_candidates(launch_fp4.device_of(0), shape))
        assert tiles
        for c in tiles:
            monkeypatch.setattr(config, "pick_fp4", lambda *_, c=c: c)
            launch_fp4._plans.clear()
            y = op_of("mx", blocked)(*operands).cpu()
            if apart:
                assert_close(y, x @ w.T, x.abs() @ w.abs().T)
            else:
                assert torch.equal(y, round_once(x @ w.T, BF16)), (m, n, k, str(c))
    launch_fp4._plans.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("format_", ["mx", "nv"])
def test_tiles_of_hopper(format_: str, blocked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that may be picked for FP4 activations, with tails and a scale that is no number."""
    gpu = launch_fp4.device_of(0)
    if gpu.arch != "sm_90a":
        pytest.skip(f"{gpu.arch} has no wgmma")
    few = (13, 1000, 1280), (20, 26000, 512), (40, 1001, 1280)
    for m, n, k in (*few, (300, 1000, 896), (300, 1001, 896)):
        (a, a_scale), (b, b_scale) = (
            quantized(format_, rows, k, "abs_max", seed) for seed, rows in enumerate((m, n))
        )
        b_scale.view(torch.uint8)[77, -1] = 255
        operands = [t.cuda() for t in (a, b, ordered(a_scale, blocked), ordered(b_scale, blocked))]
        expected = round_once(exact(a, a_scale) @ exact(b, b_scale).T, BF16)
        scales = {"mx": E8M0, "nv": E4M3}[format_]
        kind = config.decoded_fp4({"mx": "e8m0", "nv": "e4m3"}[format_])
        shape = launch_fp4._shape(kind, m, b.shape, True, scales, BF16, blocked)
        tiles = [c for c, _ in config.hopper_candidates(gpu, shape)]
        assert {c.block_k for c in tiles} == ({128, 256} if m < 64 else {128})
        assert any(c.rest_by_k for c in tiles) == (n == 26000)
        for c in tiles:
            monkeypatch.setattr(config, "pick_fp4", lambda *_, c=c: c)
            launch_fp4._plans.clear()
            y = op_of(format_, blocked)(*operands).cpu()
            assert torch.equal(y.nan_to_num(-1), expected.nan_to_num(-1)), (m, n, k, str(c))
    launch_fp4._plans.clear()


@pytest.mark.parametrize(
    ("arch", "scales", "m", "k", "integers"),
    [
        ("sm_90a", E8M0, 2048, 4096, True),
        ("sm_90a", E8M0, 1024, 28672, True),
        ("sm_90a", E8M0, 256, 4096, False),  # the codes would cost more than they gain
        ("sm_90a", E8M0, 2048, 1 << 18, False),  # INT32 does not hold the sums
        ("sm_90a", E4M3, 2048, 4096, False),
        ("sm_100", E8M0, 2048, 4096, False),
    ],
)
def test_which_mx_products_may_be_integers(
    arch: str, scales: torch.dtype, m: int, k: int, integers: bool
) -> None:
    shape = launch_fp4._shape("e2m1", m, torch.Size((4096, k // 2)), True, scales, BF16, True)
    picked = config.pick_mx_integers(config.device_of(arch), shape)
    assert (picked is not None) == integers
    if picked is not None:
        assert (picked.entry, picked.x_kind, picked.only_if) == ("hopper", "s8", 0)


def mx_operand(case: str, rows: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random codes, and scales within a factor of 8 in each row but for what the case says."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, k // 2), generator=rng, dtype=torch.uint8)
    of_row = torch.randint(107, 147, (rows, 1), generator=rng)
    scales = (of_row + torch.randint(0, 4, (rows, k // 32), generator=rng)).to(torch.uint8)
    blocks = codes.view(rows, k // 32, 16)
    if case == "zeros":
        blocks[:, ::3], scales[:, ::3] = 8, torch.randint(0, 107, (rows, 1), generator=rng).byte()
        blocks[:, 0] = 0x80
        codes[5], scales[6], codes[6] = 0, 0, 0
    elif case == "wide":
        scales[rows // 2, :2] = torch.tensor([120, 124])
        blocks[rows // 2, :2] = 0x22
    elif case == "far":
        scales[1] = 192 + scales[1] % 4
    elif case == "no number":
        codes[3], scales[3, 1] = 0, 255
    return codes, scales.view(E8M0)


def tile_of_integers(gpu: config.Device, shape: config.Shape) -> config.Matmul:
    """However small the product is."""
    kinds: dict[str, Any] = {"x_kind": "s8", "w_kind": "s8", "scale_type": "float"}
    return replace(config.pick(gpu, replace(shape, **kinds, group_size=shape.k)), only_if=0)  # type: ignore[call-arg]


@pytest.fixture
def integers(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = launch_fp4.device_of(0)
    if gpu.arch != "sm_90a":
        pytest.skip(f"{gpu.arch} has no wgmma")
    monkeypatch.setattr(config, "pick_mx_integers", tile_of_integers)


@pytest.mark.gpu
@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("case", ["narrow", "zeros", "wide", "far", "no number"])
def test_mx_products_as_integers(case: str, blocked: bool, integers: None) -> None:
    """Exact where scales allow it; else, whichever operand it is, as before."""
    m, n, k = 700, 1000, 896
    exactly = case in ("narrow", "zeros")
    for turn in range(2):
        (a, a_scale), (b, b_scale) = (
            mx_operand(case if exactly or at == turn else "narrow", rows, k, at)
            for at, rows in enumerate((m, n))
        )
        x, w = exact(a, a_scale).cuda(), exact(b, b_scale).cuda()
        expected = x @ w.T * 0.5
        operands = [t.cuda() for t in (a, b, ordered(a_scale, blocked), ordered(b_scale, blocked))]
        alpha = torch.tensor(0.5, device="cuda")
        for out_dtype in (BF16, FP16, FP32):
            found = ia.explain(op_of("mx", blocked), *operands, alpha, out_dtype=out_dtype)
            assert "s8xs8" in found.dispatches[0].kernel
            y = found.result
            if exactly:
                assert torch.equal(y, round_once(expected, out_dtype))
            elif case == "no number":
                at_nan = expected.isnan()
                assert torch.equal(y.isnan(), at_nan)
                assert_close(y[~at_nan], expected[~at_nan], (x.abs() @ w.abs().T)[~at_nan])
            else:
                assert_close(y, expected, x.abs() @ w.abs().T)
        shape = launch_fp4._shape("e2m1", m, b.shape, True, E8M0, BF16, blocked)
        a_, b_, *scales = operands
        begun = launch_mx.begin(a_, b_, *scales, blocked, alpha, shape, BF16)
        assert begun is not None
        assert bool(begun.flag) != exactly


@pytest.mark.gpu
def test_mx_products_in_cuda_graphs(integers: None) -> None:
    """A replay decides anew whether its operands allow integers."""
    m, n, k = 512, 512, 1024
    cases = [[mx_operand(case, rows, k, rows) for rows in (m, n)] for case in ("narrow", "wide")]
    (a, a_scale), (b, b_scale) = ([t.cuda() for t in pair] for pair in cases[0])
    ia.matmul_ada_mxf4_bf16_tn(a, b, a_scale, b_scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ia.matmul_ada_mxf4_bf16_tn(a, b, a_scale, b_scale)
    for case in (*cases, *cases):
        for to, (codes, scales) in zip(((a, a_scale), (b, b_scale)), case, strict=True):
            to[0].copy_(codes)
            to[1].view(torch.uint8).copy_(scales.view(torch.uint8))
        graph.replay()
        x, w = (exact(*pair).cuda() for pair in case)
        assert_close(y, x @ w.T, x.abs() @ w.abs().T)


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
