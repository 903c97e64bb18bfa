"""Rotation + quantisation: the formulas written out, and the kernel against them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intlass_ops import config, fp4, fused_quantize, packing
from intlass_ops.config.rotate_quantize import Scope
from intlass_ops.cuda import launch_rotate_quantize
from intlass_ops.rotation import hadamard_matrix, rotate

OPS = {
    "int8": fused_quantize.fused_quantize_int8,
    "int4": fused_quantize.fused_quantize_int4,
    "mx": fused_quantize.fused_quantize_mx,
    "nv": fused_quantize.fused_quantize_nv,
}


def signs(r: int) -> Tensor:
    return torch.where(
        torch.rand(r, r, generator=torch.Generator().manual_seed(r)) < 0.5, -1.0, 1.0
    )


def integers(rows: int, k: int) -> Tensor:
    rng = torch.Generator().manual_seed(k)
    return torch.randint(-9, 10, (rows, k), generator=rng).float()


def values(format_: str, codes: Tensor, k: int) -> Tensor:
    if format_ == "int8":
        return codes.double()
    if format_ == "int4":
        return packing.unpack(codes, k, signed=True).double()
    return fp4.decode_e2m1(packing.unpack(codes, k, signed=False), torch.float64)


def bits(mask: Tensor) -> Tensor:
    return (mask[..., None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1).flatten(
        -2
    )


@pytest.mark.parametrize("method", ["abs_max", "quest"])
@pytest.mark.parametrize(
    ("format_", "group"), [("int8", 256), ("int4", 32), ("mx", 32), ("nv", 16)]
)
def test_formulas(format_: str, group: int, method: str) -> None:
    x = torch.randn(7, 256, dtype=torch.float64).float() * 3
    h = hadamard_matrix(32)
    more = {"group_size": group} if format_.startswith("int") else {}
    if format_ == "nv":
        more = {"global_scale": 20.0}  # type: ignore[dict-item]
    codes, scales, mask = OPS[format_](x, h, method=method, return_mask=True, **more)
    xh = rotate(x, h).double().view(7, -1, group)
    amax, rms, std = xh.abs().amax(-1), xh.square().mean(-1).sqrt(), xh.std(-1, correction=0)
    quest = method == "quest"
    if format_ == "int8":
        s = 0.0309 * rms if quest else amax / 127
    elif format_ == "int4":
        s = 0.3534 * rms if quest else amax / 7
    elif format_ == "mx":
        s = ((2.92247856 / 6 * std if quest else amax) + 1e-8).log2().floor().exp2()
    else:
        s = (20 * (2.92247856 / 6 * std if quest else amax / 6)).to(torch.float8_e4m3fn).double()
    stored = fp4.scale_values(scales, torch.float64)
    torch.testing.assert_close(stored, s, rtol=1e-6, atol=0)
    in_units = xh / stored[..., None] * {"nv": 20, "mx": 1 if quest else 3}.get(format_, 1)
    if format_.startswith("int"):
        qmax = {"int8": 127, "int4": 7}[format_]
        expected, kept = in_units.round().clamp(-qmax, qmax), in_units.round().abs() <= qmax
    else:
        expected = fp4.round_e2m1(in_units)
        kept = in_units.abs() / (3 if format_ == "mx" and not quest else 1) < 6
    assert torch.equal(values(format_, codes, 256).view_as(xh), expected)
    assert torch.equal(bits(mask).view(xh.shape).bool(), kept)


@pytest.mark.parametrize(
    ("bits_", "low", "high", "c", "mse"),
    [(4, -7, 7, fused_quantize.QUEST_INT[4], 0.01289), (8, -127, 127, 0.0309, None)],
)
def test_quest_constants_are_best_for_a_gaussian(
    bits_: int, low: int, high: int, c: float, mse: float | None
) -> None:
    """Expected squared error of a unit Gaussian by numerical integration, over a grid of scales."""
    z = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5 * (z[1] - z[0])

    def error(s: float) -> float:
        return float((density * (z - s * (z / s).round().clamp(low, high)) ** 2).sum())

    assert fused_quantize.QUEST_INT[bits_] == c
    best = min((error(c * f), f) for f in torch.linspace(0.9, 1.1, 201).tolist())
    assert error(c) <= best[0] * 1.0005
    if mse is not None:
        assert error(c) == pytest.approx(mse, rel=1e-3)


# (format, K, group, R) in every scope of the kernel: groups in a piece of 32, in a unit, as units
# and over several; sizes that are no power of two, last units that are not full.
CASES = [
    *(("int8", 256, g, r) for g in (8, 32, 64) for r in (16, 64)),
    *(("int4", 256, g, r) for g, r in ((16, 32), (32, 64), (64, 128))),
    *(
        (format_, 512, g, r)
        for format_, g in (("mx", 32), ("nv", 16))
        for r in (16, 32, 64, 128, 256)
    ),
    ("int4", 480, 96, 32),
    ("int8", 48, 48, 16),
    ("nv", 48, 16, 16),
    ("mx", 1184, 32, 32),
    ("int8", 768, 128, 256),
    ("int8", 2080, 2080, 32),
    ("int4", 5120, 5120, 128),
    ("int8", 8192, 8192, 64),
    ("int4", 4096, 4096, 64),
    ("int4", 5120, 5120, 64),
    ("int8", 11008, 11008, 64),
    ("int8", 25600, 25600, 64),
    ("int4", 69632, 69632, 16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("quest", [False, True])
@pytest.mark.parametrize(("format_", "k", "group", "r"), CASES)
def test_kernel_is_the_reference(format_: str, k: int, group: int, r: int, quest: bool) -> None:
    """Integer data and ±1 rotations: xh is exact, and with it codes, scales and masks."""
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    dtype = dtypes[(CASES.index((format_, k, group, r)) + quest) % 3]
    x = integers(77 if k < 2000 else 5, k).to(dtype)
    x[3], x[2, :64] = 0, 0
    plan = fused_quantize.Plan(format_, quest, r, group, 0.5 if format_ == "nv" else 1.0)
    codes, scales, mask = fused_quantize.reference(x, signs(r), plan)
    got = launch_rotate_quantize.run(x.cuda(), signs(r).cuda(), plan, True)
    got_codes, got_scales, got_mask = (t.cpu() for t in got)
    if quest:
        # the spread is summed in another order: at most its last bits may differ
        if scales.dtype == torch.float32:
            torch.testing.assert_close(got_scales, scales, rtol=1e-6, atol=0)
        else:
            assert (got_scales != scales).float().mean() < 0.01
        assert (got_codes != codes).float().mean() < 0.01
        assert (got_mask != mask).float().mean() < 0.01
    else:
        assert torch.equal(got_scales, scales)
        assert torch.equal(got_codes, codes)
        assert torch.equal(got_mask, mask)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("k", "group", "r"), [(96, 16, 16), (4096, 4096, 64)])
def test_int4_codes_may_have_a_byte_each(device: str, k: int, group: int, r: int) -> None:
    x, h = integers(5, k).to(device, torch.bfloat16), signs(r).to(device)
    options = {"group_size": group, "return_mask": True}
    packed, *rest = OPS["int4"](x, h, **options)
    codes, *same = OPS["int4"](x, h, packed=False, **options)
    assert codes.dtype == torch.int8
    assert torch.equal(packing.pack(codes), packed)
    assert all(map(torch.equal, same, rest))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("k", "group", "r"),
    [(4096, 4096, 64), (5120, 5120, 128), (25600, 25600, 32), (96, 96, 16), (256, 32, 32)],
)
def test_int4_codes_may_lie_as_lanes(device: str, k: int, group: int, r: int) -> None:
    x, h = integers(5, k).to(device, torch.bfloat16), signs(r).to(device)
    quantize = torch.ops.intlass.fused_quantize
    for method, mask in (("abs_max", True), ("abs_max", False), ("quest", False)):
        options = "int4", method, group, 1.0, mask
        codes, scales, kept = quantize(x, h, *options, "bytes")
        lanes, same_scales, same_kept = quantize(x, h, *options, "lanes")
        assert lanes.dtype == torch.int32
        assert lanes.shape == (5, k // 4)
        torch.testing.assert_close(same_scales, scales, rtol=1e-6, atol=0)  # sums of another order
        differ = packing.from_lanes(lanes) != codes
        assert differ.float().mean() < (0.01 if method == "quest" else 1e-9)
        assert torch.equal(same_kept, kept)


@pytest.mark.gpu
@pytest.mark.parametrize("format_", list(OPS))
def test_kernel_leaves_ragged_rows_and_strides_alone(format_: str) -> None:
    group = {"int8": 96, "int4": 96, "mx": 32, "nv": 16}[format_]
    plan = fused_quantize.Plan(format_, False, 32, group, 1.0)
    x, h = integers(2 * 3, 96).view(2, 3, 96).half(), signs(32)
    expected = fused_quantize.reference(x, h, plan)
    x, h = x.cuda(), h.cuda()
    wide = torch.cat([x, x], -1)[..., :96]
    displaced = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)  # not 16-byte aligned
    for same in (wide, displaced):
        for a, b in zip(launch_rotate_quantize.run(same, h, plan, True), expected, strict=True):
            assert torch.equal(a.cpu(), b)
    empty = launch_rotate_quantize.run(x[:0], h, plan, True)
    assert [t.shape[0] for t in empty] == [0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("k", [4096, 5120])
def test_a_token_has_the_same_codes_wherever_it_stands(k: int) -> None:
    """Sums of squares are rounded, so their order must not depend on the place in a unit."""
    x = torch.randn(5, k).half().cuda().repeat(5, 1)
    for t in OPS["int8"](x, hadamard_matrix(64).cuda(), method="quest"):
        assert torch.equal(t.view(5, 5, -1), t[:5].expand(5, 5, -1))


@pytest.mark.gpu
@pytest.mark.parametrize("format_", ["int8", "int4"])
@pytest.mark.parametrize("magnitude", [2.0**-140, 2.0**-110, 2.0**120])
def test_kernel_takes_extreme_values(format_: str, magnitude: float) -> None:
    """Scales whose reciprocals are not ordinary numbers."""
    x, h = integers(8, 256) * magnitude, torch.eye(16)
    plan = fused_quantize.Plan(format_, False, 16, 32, 1.0)
    expected = fused_quantize.reference(x, h, plan)
    got = launch_rotate_quantize.run(x.cuda(), h.cuda(), plan, True)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.cpu(), b)


def with_non_finite(format_: str) -> tuple[Tensor, Tensor, fused_quantize.Plan]:
    x = integers(4, 64)
    x[1, 3], x[2, 40], x[3] = torch.nan, torch.inf, 0
    group = {"int8": 32, "int4": 32, "mx": 32, "nv": 16}[format_]
    return x, signs(16), fused_quantize.Plan(format_, False, 16, group, 1.0)


@pytest.mark.parametrize("format_", list(OPS))
def test_non_finite_groups_show(format_: str) -> None:
    x, h, plan = with_non_finite(format_)
    codes, scales, _ = fused_quantize.reference(x, h, plan)
    if format_ == "mx":
        scales = scales.view(torch.float8_e8m0fnu)
    if format_ == "nv":
        scales = scales.view(torch.float8_e4m3fn)
    finite = fp4.scale_values(scales).isfinite()
    assert not finite[1, 0]
    assert not finite[2, 1 if plan.group_size == 32 else 2]
    assert finite[0].all()
    assert finite[3].all()
    assert not values(format_, codes, 64)[3].any()


@pytest.mark.gpu
@pytest.mark.parametrize("format_", list(OPS))
def test_non_finite_groups_are_those_of_the_reference(format_: str) -> None:
    x, h, plan = with_non_finite(format_)
    expected = fused_quantize.reference(x, h, plan)
    got = launch_rotate_quantize.run(x.cuda(), h.cuda(), plan, True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


def test_rotation_helps_data_with_outliers() -> None:
    x = torch.randn(64, 256)
    x[:, 17] *= 30
    error = {}
    for name, h in (("none", torch.eye(64)), ("hadamard", hadamard_matrix(64))):
        codes, scales = fused_quantize.fused_quantize_int4(x, h)
        deq = rotate(values("int4", codes, 256) * scales.double(), h.T.contiguous())
        error[name] = float((deq - x).norm() / x.norm())
    assert error["hadamard"] < 0.7 * error["none"]


@settings(max_examples=100)
@given(
    arch=st.sampled_from(config.ARCHS),
    x_type=st.sampled_from(["__nv_bfloat16", "float"]),
    format_=st.sampled_from(list(OPS)),
    r=st.sampled_from([16, 32, 64, 128, 256]),
    multiple=st.sampled_from([0.5, 1, 2, 3, 5, 7, 64, 100, 1000, 4321]),
)
def test_every_call_has_a_configuration_that_fits(
    arch: str, x_type: str, format_: str, r: int, multiple: float
) -> None:
    group = {"mx": 32, "nv": 16}.get(format_, int(r * multiple))
    device = config.device_of(arch)
    c = config.pick_rotate_quantize(device, x_type, r, format_, False, True, group)
    pieces_of_group = group // c.piece
    if c.scope == Scope.QUADS:
        assert group <= 32
    elif c.scope == Scope.TABLE:
        assert 2 * pieces_of_group <= c.capacity
    elif c.scope == Scope.BLOCK:
        assert pieces_of_group <= c.capacity
    assert c.threads <= 1024
    assert c.smem_bytes <= device.smem_per_block
    assert c.blocks_per_sm * c.smem_bytes <= device.smem_per_sm
    rows = 77
    assert c.units(rows * group // c.piece, pieces_of_group) >= (rows if c.scope >= 2 else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("format_", list(OPS))
@pytest.mark.parametrize("r", [32, 128])
def test_ops_on_the_gpu_agree_with_the_cpu(format_: str, r: int) -> None:
    x = torch.randn(300, 1024).to(torch.bfloat16)
    h = hadamard_matrix(r)
    for method in ("abs_max", "quest"):
        here = OPS[format_](x, h, method=method, return_mask=True)
        there = OPS[format_](x.cuda(), h.cuda(), method=method, return_mask=True)
        for a, b in zip(here, there, strict=True):
            raw_a, raw_b = (
                t.cpu().view(torch.uint8) if t.element_size() == 1 else t.cpu() for t in (a, b)
            )
            if raw_a.dtype == torch.float32:
                torch.testing.assert_close(raw_a, raw_b, rtol=1e-5, atol=0)
            else:
                assert (raw_a != raw_b).float().mean() < 5e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: OPS["int8"](torch.zeros(2, 48), torch.eye(32)),
            "fused_quantize_int8: K=48 is not a multiple of R=32",
        ),
        (
            lambda: OPS["mx"](torch.zeros(2, 48), torch.eye(16)),
            "fused_quantize_mx: K=48 is not a multiple of group_size=32",
        ),
        (
            lambda: OPS["int4"](torch.zeros(2, 64), torch.zeros(8, 8)),
            r"fused_quantize_int4: h is \(8, 8\); expected \[R, R\] with R in",
        ),
        (
            lambda: OPS["int4"](torch.zeros(2, 192), torch.eye(64), group_size=96),
            "of group_size=96 and R=64 one must divide the other",
        ),
        (
            lambda: OPS["nv"](torch.zeros(2, 64), torch.eye(64), -1.0),
            "fused_quantize_nv: global_scale=-1.0 is not a positive number",
        ),
        (
            lambda: OPS["mx"](torch.zeros(2, 64), torch.eye(64, device="meta")),
            "fused_quantize_mx: h is on meta, the input on cpu",
        ),
        (
            lambda: OPS["nv"](torch.zeros(2, 64), torch.eye(64), method="best"),
            "fused_quantize_nv: method='best'; expected 'abs_max' or 'quest'",
        ),
    ],
)
def test_errors_name_the_values(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@settings(max_examples=60)
@given(
    format_=st.sampled_from(list(OPS)),
    lead=st.lists(st.integers(0, 3), max_size=2),
    k=st.sampled_from([0, 8, 16, 32, 48, 64, 96, 160, 256]),
    r=st.sampled_from([8, 16, 32, 48, 64, 256]),
    group=st.sampled_from([None, 0, 4, 8, 16, 24, 32, 96, 160]),
    mask=st.booleans(),
)
def test_a_call_is_refused_by_name_or_has_the_shapes_of_the_fake(
    format_: str, lead: list[int], k: int, r: int, group: int | None, mask: bool
) -> None:
    options: dict[str, object] = {"return_mask": mask}
    if format_.startswith("int"):
        options["group_size"] = group
    g = {"mx": 32, "nv": 16}.get(format_, k if group is None else group)
    legal = k and r in (16, 32, 64, 256) and k % r == 0 and g >= 8 and k % g == 0
    legal = legal and max(g, r) % min(g, r) == 0

    def call(device: str) -> list[tuple[object, ...]] | str:
        x, h = torch.ones(*lead, k, device=device), torch.ones(r, r, device=device)
        try:
            return [(t.shape, t.dtype) for t in OPS[format_](x, h, **options)]
        except ValueError as problem:
            return str(problem)

    found = call("cpu")
    assert call("meta") == found
    assert isinstance(found, list) == bool(legal)
    if isinstance(found, str):
        assert found.startswith(f"fused_quantize_{format_}: ")


@pytest.mark.parametrize("format_", list(OPS))
def test_autocast_rounds_nothing(format_: str) -> None:
    x, h = torch.randn(3, 64), hadamard_matrix(32)
    expected = OPS[format_](x, h)
    with torch.autocast("cpu", torch.bfloat16):
        codes, scales = OPS[format_](x, h)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales.view(torch.uint8), expected[1].view(torch.uint8))
