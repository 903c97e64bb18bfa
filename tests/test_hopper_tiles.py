"""Every tile of hopper.cu that a problem may get, not only the one that is picked for it."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from gemm_case import Case, build
from gemm_checks import check_exact
from tolerance import assert_close

from intlass_ops import config, matmul_int4_bf16_tn, pack_int4
from intlass_ops.cuda import jit, launch
from intlass_ops.cuda.plans import TYPE, ZERO_TYPE, device_of

BF16 = torch.bfloat16
# Some tiles a block, and ends of rows, tokens and K that no tile divides
SIZES = Case(x="s8", w="s8", lead=(1300,), n=1000, k=1376)
SMALL = replace(SIZES, lead=(100,), x="bf16", w="s4", scale=BF16, out=BF16, k=1280, groups=10)
CASES = [
    SMALL,
    replace(SIZES, a_scale="token", bias=torch.float32),
    replace(SIZES, lead=(2100,), n=1100),
    replace(SIZES, lead=(100,), bias=BF16),
    replace(SIZES, w="s4", a_scale="token"),
    replace(SIZES, w="u4", zero=torch.float32, k=1280, groups=10),
    replace(SIZES, w="s4", a_scale="token", bias=BF16, k=1280, groups=10),
    replace(SIZES, w="s4", lead=(2100,), scale=BF16, k=1408, groups=11),
    replace(SIZES, x="bf16", w="s4", scale=BF16, out=BF16, k=1280, groups=10),
    replace(SIZES, x="bf16", w="u4", scale=BF16, out=BF16, k=1344, groups=21),
    replace(SIZES, x="fp16", w="s4", out=torch.float32, k=1344, groups=42),
    replace(SIZES, x="bf16", w="s8", bias=BF16),
    replace(SIZES, lead=(60,), w="s4", a_scale="token"),
    replace(SIZES, lead=(300,), x="s4", w="s4", a_scale="token"),
    replace(SIZES, lead=(300,), x="s4", w="u4", zero=BF16, k=1344, groups=42),
    replace(SIZES, lead=(13,), x="bf16", w="s4", k=1280, groups=10, scale=BF16, out=BF16),
    # runs of four groups, in vectors or one by one: hopper_staged.cuh
    replace(SIZES, lead=(30,), x="bf16", w="s4", scale=BF16, out=BF16, k=1536, groups=12),
    replace(SIZES, lead=(300,), x="bf16", w="u4", scale=BF16, out=BF16, k=1536, groups=12),
    replace(SIZES, lead=(60,), x="bf16", w="u4", zero=BF16, scale=BF16, out=BF16, k=1536, groups=6),
    replace(SIZES, lead=(30,), x="bf16", w="u4", zero=torch.int32, scale=BF16, k=1536, groups=12),
    replace(
        SIZES, lead=(60,), x="fp16", w="s4", scale=torch.half, scale_layout="transposed",
        k=1536, groups=24,
    ),
    replace(SIZES, lead=(60,), x="bf16", w="s8", scale=BF16, k=1536, groups=12),
    # tokens and k that fill no tile: fewer are loaded, and the last stage of 256 k has half
    replace(SMALL, lead=(20,), k=1408, groups=11),
    replace(SIZES, lead=(20,), w="s4", scale=BF16, a_scale="token", k=1408, groups=11),
    replace(SIZES, lead=(20,), a_scale="token"),
    replace(SIZES, lead=(13,), w="s4", scale=BF16, a_scale="token", k=1280, groups=10),
    replace(SIZES, lead=(300,), w="s4", a_scale="token", k=1344, groups=21),
    # scales and zero points that bf16 has not the bits for
    replace(SMALL, scale=torch.half),
    replace(SIZES, lead=(300,), x="bf16", w="s4", scale=torch.half, k=1344, groups=42),
    replace(SMALL, lead=(30,), w="u4", scale=torch.half, k=1536, groups=12),
    replace(SIZES, lead=(300,), x="bf16", w="u4", zero=torch.float32, k=1376, groups=43),
    replace(SMALL, lead=(60,), w="u4", zero=torch.half, groups=20),
    replace(SIZES, lead=(60,), x="bf16", w="s8", scale=torch.half, k=1344, groups=42),
    replace(SIZES, lead=(300,), x="bf16", w="s8", k=1376, groups=86),
    # stages of 64 k, runs of two of them: in vectors, and whose last stage has half
    replace(SIZES, lead=(300,), x="bf16", w="u4", zero=torch.float32, k=1280, groups=40),
    replace(SIZES, lead=(300,), x="bf16", w="s8", k=1280, groups=80),
    replace(SIZES, lead=(500,), x="bf16", w="u4", zero=torch.half, k=1376, groups=43),
]  # fmt: skip
# Rows left over, which all SMs share by K: about 40, 80 and 40 tiles of 64 rows, by 10 to 12 of K
WITH_REST = [
    replace(SIZES, lead=(30,), n=11000, x="bf16", w="s4", scale=BF16, out=BF16, k=1408, groups=11),
    replace(SIZES, lead=(60,), n=22000, x="bf16", w="u4", scale=BF16, out=BF16, k=1344, groups=21),
    replace(SIZES, lead=(60,), n=28000, x="bf16", w="s4", scale=BF16, out=BF16, k=1280, groups=5),
    replace(SIZES, lead=(30,), n=28000, x="bf16", w="u4", scale=BF16, out=BF16, k=1536, groups=12),
    replace(SIZES, lead=(60,), n=22000, w="s4", scale=BF16, a_scale="token", k=1280, groups=10),
    replace(SIZES, lead=(13,), n=22000, w="s4", scale=BF16, a_scale="token", k=1280, groups=10),
    replace(SIZES, lead=(100,), n=22000, w="s4", a_scale="token", residual=True),
    replace(SIZES, lead=(100,), n=22000, x="bf16", w="s8", bias=BF16),
    replace(SIZES, lead=(60,), n=28000, x="bf16", w="s4", scale=torch.half, k=1280, groups=40),
    replace(SIZES, lead=(60,), n=22000, x="bf16", w="u4", zero=torch.float32, k=1280, groups=10),
]


def tiles_of(case: Case, device: config.Device) -> list[config.Hopper]:
    assert case.k % 32 == 0  # rows of INT4 start where TMA can begin
    shape = config.Shape(
        x_kind=case.x,
        w_kind=case.w,
        scale_type=TYPE[case.scale],
        zero_type=ZERO_TYPE[case.zero] if case.w == "u4" else "float",
        out_type=TYPE[case.out_dtype],
        has_zeros=case.w == "u4",
        has_a_zero=False,
        aligned=True,
        m=case.lead[0],
        n=case.n,
        k=case.k,
        group_size=case.k // case.groups,
    ).on(device)
    assert config.why_not_hopper(device, shape) is None
    return [c for c, _ in config.hopper_candidates(device, shape)]


def test_the_cases_meet_every_form_of_tile() -> None:
    tiles = [c for case in CASES + WITH_REST for c in tiles_of(case, config.device_of("sm_90a"))]
    g = config.Grouping
    others = {g.STRADDLING, g.COLUMNS, g.SCALED_SPANS}
    assert {c.grouping for c in tiles} == set(g) - others
    assert any(c.in_turns and c.stream_k for c in tiles)
    assert {c.consumers for c in tiles if c.by_stages} == {2, 4}
    assert {c.consumers for c in tiles if not c.by_stages} == {1, 2, 3, 4}
    assert {c.consumers for c in tiles if c.rest_by_k} == {2, 3, 4}
    assert any(c.split_k > 1 and not c.stream_k for c in tiles)
    assert any(c.split_k > 1 and c.stream_k for c in tiles)
    assert {c.share_x for c in tiles} == {1, 2, 4}
    assert {c.share_w for c in tiles} == {1, 2}
    assert {c.parts for c in tiles} == {1, 4}
    assert {c.blocks_per_sm for c in tiles if c.consumers == 1} == {1, 2}
    assert any(c.needs_token_sums for c in tiles)
    assert {c.block_m for c in tiles} >= {16, 32, 64, 128, 256}
    assert {(c.x_kind, c.block_k) for c in tiles if c.by_stages} >= {("bf16", 256), ("s8", 256)}
    assert any(c.block_k == 256 and c.consumers == 1 for c in tiles)
    short = [c for c in tiles if c.block_k == 64]
    assert {c.groups_per_tile for c in short} == {1, 2, 4}
    assert {c.has_zeros for c in short} == {c.by_stages for c in short} == {False, True}
    assert {c.stream_k for c in short if c.groups_per_tile > 1} == {False, True}
    assert {c.split_k for c in short} == {1, 2}
    assert any(c.grouping == g.CHANNEL for c in short)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES + WITH_REST, ids=str)
def test_every_tile_is_exact(case: Case, hopper: config.Device) -> None:
    tiles = [c for c in tiles_of(case, hopper) if c.rest_by_k or case not in WITH_REST]
    assert tiles
    widened = case.x == "s4"
    run = [config.in_lane_order(tile, case.k, aligned=True) if widened else tile for tile in tiles]
    jit.warmup(run, progress=False)
    for tile in tiles:
        with launch.forced(tile):
            check_exact(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "k", "groups"),
    [(1000, 1280, 10), (1000, 1280, 40), (1000, 1536, 12), (22000, 1280, 10)],
)
def test_every_tile_takes_scales_of_any_size(
    rows: int, k: int, groups: int, hopper: config.Device
) -> None:
    """Those that one FMA a pair of weights cannot take (hopper_weights.cuh): of all rows, and of
    one group of a few."""
    case = replace(SMALL, n=rows, k=k, groups=groups)
    few = build(case, "cuda", numbers="random")
    few.scales[[5, 300, rows - 1], [0, groups // 2, groups - 1]] *= 2.0**14
    expected = few.expected()
    tiles = [c for c in tiles_of(case, hopper) if c.rest_by_k or rows == 1000]
    jit.warmup(tiles, progress=False)
    for tile in tiles:
        with launch.forced(tile):
            check_exact(replace(case, special=True), "cuda")
            assert_close(few.run(), *expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("w", "zero"),
    [(w, torch.uint8) for w in ("s4", "u4", "s8")] + [("u4", torch.half), ("u4", torch.float32)],
)
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("scale", [torch.half, torch.float32])
def test_weights_are_as_near_as_is_said(
    w: str, zero: torch.dtype, group_size: int, scale: torch.dtype
) -> None:
    """Where bf16 has not the bits of scales and zero points (split_scales.cuh): tokens that are
    rows of one show each weight. Kernels whose sums take the scales round it once."""
    n, k = 256, 512
    case = Case("bf16", w, (k,), n, k, groups=k // group_size, scale=scale, zero=zero)
    call = build(case, "cuda", numbers="random")
    call.a = torch.eye(k, dtype=BF16, device="cuda")
    if w == "u4" and zero != torch.uint8:
        call.options["zeros"] = (15 * torch.rand(n, k // group_size)).to(zero).cuda()
    weights = call.expected().y.T
    sizes = oracle.per_weight(call.scales, n, k)
    allowed = (2**-8 + 2**-14) * weights.abs() + (2**-12 * sizes if zero != torch.uint8 else 0)
    device = device_of(0)
    types = TYPE[scale], ZERO_TYPE[zero] if w == "u4" else "float", TYPE[BF16]
    shape = config.Shape("bf16", w, *types, w == "u4", False, True, 8192, 8192, k, group_size)
    tiles: list[config.Matmul] = [config.pick(config.without_wgmma(device), shape)]
    if device.arch == "sm_90a":
        tiles += [c for c in tiles_of(case, device) if not c.rest_by_k]
    jit.warmup(tiles, progress=False)
    for tile in tiles:
        with launch.forced(tile):
            error = (call.run().T.double() - weights).abs()
        assert (error <= allowed).all(), f"{tile}: {float((error - allowed).max())}"


@pytest.mark.gpu
@pytest.mark.parametrize("exponent", [-100, -30, 30, 100])
def test_the_size_of_scales_changes_nothing(exponent: int) -> None:
    """Factors of scales that float32 sums, and bf16 outputs, can hold."""
    generator = torch.Generator().manual_seed(exponent)
    codes = torch.randint(-8, 8, (192, 512), generator=generator, dtype=torch.int8)
    x = torch.randint(-4, 5, (48, 512), generator=generator).to(BF16)
    scales = (1 + torch.randint(0, 128, (192, 4), generator=generator) / 128).to(BF16)
    small = scales * 2.0**exponent
    assert torch.equal(small.double(), scales.double() * 2.0**exponent)
    packed = pack_int4(codes).cuda()
    y = matmul_int4_bf16_tn(x.cuda(), packed, scales.cuda())
    scaled = matmul_int4_bf16_tn(x.cuda(), packed, small.cuda())
    assert torch.equal(scaled.double(), y.double() * 2.0**exponent)
