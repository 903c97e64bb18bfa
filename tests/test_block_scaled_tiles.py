"""Which kernel multiplies FP4 operands, and every tile that may: as exact as the ops' tests ask.

Not here: what the ops compute, on any device (test_block_scaled.py).
"""

from __future__ import annotations

import pytest
import torch
from fp4_case import exact, op_of, ordered, quantized
from tolerance import assert_close
from torch import Tensor

import intlass_ops as ia
from intlass_ops import config, packing
from intlass_ops.config.choice import tile_of_integers
from intlass_ops.config.gemm_tiles import gemm_candidates
from intlass_ops.config.skinny_mx import mx_candidates
from intlass_ops.cuda import launch_fp4, launch_mx
from intlass_ops.reference import round_once

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn


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
    ("arch", "m", "k", "kernel"),
    [
        ("sm_80", 17, 4096, "gemm"),
        ("sm_120", 128, 4096, "gemm"),
        ("sm_80", 129, 4096, None),
        ("sm_80", 2, 48, "gemm"),
        ("sm_90a", 300, 2880, "hopper"),
        ("sm_90a", 100, 4128, "gemm"),
    ],
)
def test_kernel_of_plain_scales(arch: str, m: int, k: int, kernel: str | None) -> None:
    shape = launch_fp4._shape("bf16", m, torch.Size((4096, k // 2)), k % 32 == 0, E4M3, BF16, False)
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
def test_tiles_of_mx_products(
    apart: bool, blocked: bool, hopper: config.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every split of K, tails of rows and tokens, and activations whose scales do not fit e5m2."""
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
        tiles = list(mx_candidates(hopper, shape))
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
@pytest.mark.parametrize("format_", ["mx", "nv"])
def test_tiles_of_gemm(
    format_: str, hopper: config.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tile, split and not: tails of all sizes, one span, rows that are not aligned."""
    scale_type, device = (E8M0 if format_ == "mx" else E4M3), config.without_wgmma(hopper)
    group = 32 if format_ == "mx" else 16
    for m, n, k in ((5, 130, group), (70, 200, 48 * group), (129, 72, 1088), (33, 257, 4096)):
        a = torch.randint(-4, 5, (m, k), generator=torch.Generator().manual_seed(m)).to(BF16)
        b, b_scale = quantized(format_, n, k, "abs_max", 1)
        expected = a.double() @ exact(b, b_scale).T
        magnitude = a.double().abs() @ exact(b, b_scale).abs().T
        aligned = k % 32 == 0
        shape = launch_fp4._shape("bf16", m, b.shape, aligned, scale_type, BF16, False)
        for c in gemm_candidates(device, shape, measured=False):
            monkeypatch.setattr(config, "pick_fp4", lambda *_, c=c: c)
            launch_fp4._plans.clear()
            y = op_of(format_, False)(a.cuda(), b.cuda(), None, b_scale.cuda())
            assert_close(y.cpu(), expected, magnitude)
    launch_fp4._plans.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("format_", ["mx", "nv"])
def test_tiles_of_hopper(
    format_: str, blocked: bool, hopper: config.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that may be picked for FP4 activations, with tails and a scale that is no number."""
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
        tiles = [c for c, _ in config.hopper_candidates(hopper, shape)]
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


@pytest.fixture
def integers(hopper: config.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products of MXFP4 too are computed as INT8."""
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
