"""The CUDA kernels without a GPU: their PTX, run by tests/ptx, against float64 and the CPU.

For GPUs that nobody here has, too: INT4 by INT4 of sm_80 among them. What the emulation is and is
not: ptx/__init__.py; that it finds faults: test_ptx.py; many more calls: `tests/fuzz.py --device
sm_80`, and `--thorough` here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gemm_case import CODES, X_DTYPE, Case, build, float32_is_exact
from gemm_checks import check_bounded, check_exact
from ptx import emulated
from strategies import BF16, FP16, FP32, PAIRS, a_zero_of, cover
from torch import Tensor

import intlass_ops as ia
from intlass_ops import config
from intlass_ops.cuda import launch

ARCHS = ("sm_80", "sm_90a", "sm_86", "sm_120", "sm_89", "sm_100")


def run(case: Case, arch: str, **of_device: Any) -> list[Any]:
    """A call whose float32 sums round nothing if there is such a one, bit for bit; what ran."""
    exact = case.activation is None and float32_is_exact(build(case, "cpu"))
    with emulated(arch, **of_device) as ran:
        (check_exact if exact else check_bounded)(case, "cpu")
    return ran


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is not test_any_call:
        return
    thorough = metafunc.config.getoption("--thorough")
    cases = [case for case in cover() if case.x != "fp32" and max(case.lead, default=1) <= 65]
    turns = [(case, ARCHS[i % len(ARCHS)]) for i, case in enumerate(cases)]
    if thorough:
        turns = [(case, arch) for case in cases for arch in ARCHS]
    chosen = turns if thorough else turns[::13]
    metafunc.parametrize(("case", "arch"), chosen, ids=[f"{a}-{c}" for c, a in chosen])


def test_any_call(case: Case, arch: str) -> None:
    """Sizes, types, layouts, epilogues: strategies.cover."""
    run(case, arch)


def of_pair(x: str, w: str, m: int, k: int = 256, groups: int = 2) -> Case:
    scale = X_DTYPE[x] if x in ("bf16", "fp16") else FP32
    a_scale = "token" if x in CODES else "none"
    zero = torch.uint8
    return Case(
        x, w, (m,), 64, k, groups, scale=scale, zero=zero, a_scale=a_scale, a_zero=a_zero_of(x)
    )


ON_GPU = [pair for pair in PAIRS if pair[0] != "fp32"]


@pytest.mark.parametrize(("x", "w", "m"), [(*p, (3, 20)[i % 2]) for i, p in enumerate(ON_GPU)])
def test_every_pair_without_wgmma(x: str, w: str, m: int) -> None:
    (c,) = run(of_pair(x, w, m), "sm_80")
    few = m <= config.SKINNY_MAX_M and x not in ("s4", "u4")
    assert c.source == ("skinny.cu" if few else "gemm.cu")


@pytest.mark.parametrize(("x", "w"), [p for p in ON_GPU if p not in [("s8", "s8"), ("u4", "u4")]])
def test_every_pair_by_wgmma(x: str, w: str) -> None:
    ran = run(of_pair(x, w, 24), "sm_90a")
    sources = [c.source for c in ran]
    if x == "u4":  # activations with zero points
        assert {*sources} == {"widen.cu", "gemm.cu"}
    else:
        assert sources[-1] == "hopper.cu"


ONE_SM, TWO_SMS = {"sm_count": 1}, {"sm_count": 2}


@pytest.mark.parametrize(
    ("case", "arch", "sources", "of_device"),
    [
        (of_pair("bf16", "s4", 1, 512, 4), "sm_80", ["skinny_ring.cu"], ONE_SM),
        (of_pair("fp16", "u4", 7, 512, 8), "sm_86", ["skinny_ring.cu"], ONE_SM),
        (of_pair("bf16", "nf4", 2, 512, 8), "sm_120", ["skinny_ring.cu"], ONE_SM),
        (of_pair("bf16", "s4", 3, 4096, 32), "sm_90a", ["skinny_held.cu"], {}),
        (of_pair("bf16", "nf4", 2, 4096, 64), "sm_90a", ["skinny_held.cu"], {}),
        (Case("s8", "s8", (24,), a_scale="token"), "sm_90a", ["hopper.cu"], {}),
        (
            replace(of_pair("bf16", "u4", 24), zero=FP32, out=FP32),
            "sm_90a",
            ["token_sums.cu", "hopper.cu"],
            {},
        ),
        # tiles that several blocks share, many tokens
        (of_pair("bf16", "s4", 80, 256, 2), "sm_90a", ["hopper.cu"], TWO_SMS),
        (replace(of_pair("bf16", "u4", 70, 512, 4), n=192), "sm_90a", ["hopper.cu"], TWO_SMS),
        (replace(of_pair("s8", "s8", 130, 256, 1), n=256), "sm_90a", ["hopper.cu"], TWO_SMS),
        (replace(of_pair("bf16", "nf4", 130, 256, 4), n=128), "sm_90a", ["hopper.cu"], TWO_SMS),
        (replace(of_pair("fp16", "nf4", 150, 192, 3), n=48), "sm_80", ["gemm.cu"], {}),
    ],
    ids=str,
)
def test_other_ways(case: Case, arch: str, sources: list[str], of_device: dict[str, int]) -> None:
    assert [c.source for c in run(case, arch, **of_device)] == sources


@pytest.mark.parametrize(
    ("x", "w", "name", "value"),
    [
        ("bf16", "s4", "split_k", 2),
        ("bf16", "s4", "stream_k", True),
        ("bf16", "s4", "rest_by_k", True),
        ("s8", "s8", "split_k", 2),
        ("s8", "s8", "share_x", 2),
    ],
)
def test_clusters_and_shares(x: str, w: str, name: str, value: int) -> None:
    """Blocks that exchange sums, or one copy of x; tiles that several have parts of."""
    case = replace(of_pair(x, w, 40, 512, 1), n=320)
    shape = config.Shape(
        x, w, "__nv_bfloat16" if x == "bf16" else "float", "float", "__nv_bfloat16", False, False,
        True, 40, 320, 512, 512,
    )  # fmt: skip
    device = replace(config.device_of("sm_90a"), sm_count=4)
    tiles = (c for c, _ in config.hopper_candidates(device, shape) if getattr(c, name) == value)
    tile = min(tiles, key=lambda c: c.smem_bytes)
    with launch.forced(tile):
        assert run(case, "sm_90a", sm_count=4) == [tile]


@pytest.mark.parametrize("w", ["s4", "u4", "nf4", "s8", "e4m3"])
def test_k_split_among_blocks_is_added_up(w: str) -> None:
    ran = run(replace(of_pair("bf16", w, 20, 1024, 8), n=33), "sm_80")
    assert ran[0].split_k > 1


# ------------------------------------------------------------------------ what is no GEMM alone


def same_as_the_cpu(call: Callable[[], Any], arch: str, *sources: str, **of_device: Any) -> None:
    """Bit for bit."""
    expected = call()
    with emulated(arch, **of_device) as ran:
        found = call()
    assert [c.source for c in ran] == list(sources)
    pairs = zip(_tensors(found), _tensors(expected), strict=True)
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def _tensors(result: Any) -> list[Tensor]:
    parts = [result] if isinstance(result, Tensor) else [t for t in result if t is not None]
    return [t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in parts]


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# Drawn in each call, as memory that a machine sees is that of tensors made since the tests began.
def rows() -> Tensor:
    return normal(5, 512)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    "call",
    [
        lambda: ia.quantize_int8(rows()),
        lambda: ia.quantize_int4(rows().half(), symmetric=False),
        lambda: ia.quantize_int8(rows()[:, :333], rounding="stochastic", seed=3),
        lambda: ia.rms_norm_quantize(rows(), normal(512)),
        lambda: ia.silu_mul_quantize(rows(), normal(5, 512).flip(0)),
    ],
)
def test_quantisers(call: Callable[[], Any], arch: str) -> None:
    same_as_the_cpu(call, arch, "quantize.cu")


@pytest.mark.parametrize(
    ("rotation", "call"),
    [
        (32, ia.fused_quantize_int8),
        (64, ia.fused_quantize_int4),
        (32, ia.fused_quantize_mx),
        (16, lambda x, h: ia.fused_quantize_nv(x, h, torch.tensor(2.0))),
    ],
)
def test_rotations(rotation: int, call: Callable[..., Any]) -> None:
    h = ia.hadamard_matrix(rotation).to(BF16)
    x = rows()
    same_as_the_cpu(lambda: call(x, h), "sm_80", "rotate_quantize.cu")


def test_rotations_by_wgmma() -> None:
    h = ia.hadamard_matrix(64).to(BF16)
    x = normal(40, 512)
    same_as_the_cpu(lambda: ia.fused_quantize_int8(x, h), "sm_90a", "rotate_hopper.cu", sm_count=2)


def fp4(m: int, n: int, k: int, group: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(m)
    dtype = torch.float8_e8m0fnu if group == 32 else torch.float8_e4m3fn
    low, high = (120, 128) if group == 32 else (0x28, 0x40)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw).to(torch.uint8)

    a, b = integers(0, 256, m, k // 2), integers(0, 256, n, k // 2)
    scales = (integers(low, high, rows, k // group).view(dtype) for rows in (m, n))
    return a, b, *scales


@pytest.mark.parametrize(
    ("arch", "m", "n", "group", "sources", "of_device"),
    [
        ("sm_80", 3, 48, 32, ["skinny.cu"], {}),
        ("sm_80", 12, 48, 16, ["skinny.cu"], {}),
        ("sm_90a", 12, 128, 32, ["skinny_mx.cu"], {"sm_count": 1}),
        ("sm_90a", 40, 96, 32, ["decode_fp4.cu", "hopper.cu"], {}),
        ("sm_90a", 24, 64, 16, ["decode_fp4.cu", "hopper.cu"], {}),
    ],
)
def test_fp4(
    arch: str, m: int, n: int, group: int, sources: list[str], of_device: dict[str, int]
) -> None:
    a, b, x_scales, w_scales = fp4(m, n, 512, group)
    product = ia.matmul_mxf4_bf16_tn if group == 32 else ia.matmul_nvf4_bf16_tn
    alpha = torch.tensor(0.5)
    same_as_the_cpu(
        lambda: product(a, b, ia.to_blocked(x_scales), ia.to_blocked(w_scales), alpha),
        arch,
        *sources,
        **of_device,
    )


@pytest.mark.parametrize(
    ("arch", "n", "dtype", "sources"),
    [
        ("sm_80", 256, BF16, ["transposed.cu"]),
        ("sm_80", 256, FP16, ["transposed.cu"]),
        ("sm_90a", 256, BF16, ["transposed_wgmma.cu"]),
    ],
)
def test_transposed(arch: str, n: int, dtype: torch.dtype, sources: list[str]) -> None:
    """Products of small integers, which are exact in any order."""
    k, draw = 256, torch.Generator().manual_seed(1)
    w = torch.randint(0, 256, (n, k // 2), generator=draw).to(torch.uint8)
    scales = 2.0 ** torch.randint(-1, 2, (n, 2), generator=draw).to(dtype)
    zeros = torch.randint(0, 16, (n, 2), generator=draw).to(dtype)
    x = torch.randint(-3, 4, (20, n), generator=draw).to(dtype)
    op = torch.ops.intlass.matmul_int4_nn
    same_as_the_cpu(lambda: op(x, w, scales, zeros, k, None), arch, *sources)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_experts(arch: str) -> None:
    draw = torch.Generator().manual_seed(2)
    w = torch.randint(0, 256, (3, 64, 64), generator=draw).to(torch.uint8)
    scales = 2.0 ** torch.randint(-2, 2, (3, 64, 1), generator=draw).to(BF16)
    a = torch.randint(-3, 4, (19, 128), generator=draw).to(BF16)
    ends = torch.tensor([7, 7, 16], dtype=torch.int32)
    product = torch.ops.intlass.matmul_experts
    expected = product(a, w, scales, None, ends, 128)
    with emulated(arch) as ran:
        found = product(a, w, scales, None, ends, 128)
    assert torch.equal(found, expected)
    assert ran[0].source == "expert_tiles.cu"
    assert len(ran) == 2
