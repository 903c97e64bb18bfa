"""Grouped GEMMs of experts, on a GPU by each kernel, and which one is picked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from tolerance import assert_close, assert_identical
from torch import Tensor

from intlass_ops import config, dequantize, explain, matmul_experts, pack_int4
from intlass_ops.cuda import compiler, cubin, launch, launch_experts, launch_hopper
from intlass_ops.ops.block_scaled_kernels import decode

FAMILIES = "skinny", "hopper", "gemm"


class Case(NamedTuple):
    """Of `problem`: kinds of operands, and how weights are stored."""

    a: torch.dtype
    bits: int
    group_size: int
    zeros: torch.dtype | None = None
    scales: torch.dtype = torch.float32
    k: int = 512
    n: int = 96
    codes: torch.dtype = torch.int8  # of 8 bits

    @property
    def of_fp4(self) -> bool:
        return self.scales == torch.uint8


CASES = {
    "w4a16": Case(torch.bfloat16, 4, 128, None, torch.bfloat16),
    "w4a16, groups of 32": Case(torch.bfloat16, 4, 32, None, torch.bfloat16),
    "w4a16, zero points": Case(torch.float16, 4, 128, torch.uint8, torch.float16),
    "w4a16, float zero points": Case(torch.bfloat16, 4, 64, torch.bfloat16, torch.bfloat16),
    "w4a16, scales of another type": Case(torch.bfloat16, 4, 32, None, torch.float16),
    "w8a16": Case(torch.bfloat16, 8, 512),
    "w8a16, groups": Case(torch.bfloat16, 8, 32, None, torch.float16),
    "fp8": Case(torch.bfloat16, 8, 512, codes=torch.float8_e4m3fn),
    "fp8, groups": Case(torch.float16, 8, 128, codes=torch.float8_e4m3fn),
    "fp8, tails": Case(torch.bfloat16, 8, 16, k=208, n=37, codes=torch.float8_e4m3fn),
    "w8a8": Case(torch.int8, 8, 512),
    "w4a8": Case(torch.int8, 4, 128),
    "w4a8, one scale a row": Case(torch.int8, 4, 512),
    "w4a4": Case(torch.uint8, 4, 128),
    "mxfp4": Case(torch.bfloat16, 4, 32, None, torch.uint8),
    "mxfp4, half a tile of K": Case(torch.bfloat16, 4, 32, None, torch.uint8, k=448, n=160),
    "mxfp4, tails": Case(torch.bfloat16, 4, 32, None, torch.uint8, k=96, n=37),
    "nvfp4": Case(torch.bfloat16, 4, 16, None, torch.uint8),
    "nvfp4, half a tile of K": Case(torch.bfloat16, 4, 16, None, torch.uint8, k=320),
    "nvfp4, bytes": Case(torch.bfloat16, 4, 16, None, torch.uint8, k=48, n=5),
    "tails": Case(torch.bfloat16, 4, 16, torch.uint8, k=208, n=37),
    "bytes": Case(torch.bfloat16, 4, 16, k=48, n=5),
}


def problem(
    case: Case, tokens: int, experts: int, device: str = "cuda", *, exact: bool = True
) -> dict[str, Any]:
    """Arguments of `matmul_experts`; integers and powers of two if ``exact``."""
    rng = torch.Generator(device).manual_seed(tokens * 31 + experts)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=rng, device=device)

    groups = case.k // case.group_size
    scales = 2.0 ** integers(-3, 2, experts, case.n, groups).float()
    if not exact:
        scales = scales * (1 + torch.rand(scales.shape, generator=rng, device=device))
    codes = integers(-7, 8, experts, case.n, case.k)
    found: dict[str, Any] = {"k": case.k}
    if case.of_fp4:
        codes = codes & 15
        format_ = torch.float8_e4m3fn if case.group_size == 16 else torch.float8_e8m0fnu
        found["scales"] = scales.to(format_).view(torch.uint8)
        found["alpha"] = 2.0 ** integers(-2, 3, experts).float()
    else:
        found["scales"] = scales.to(case.scales)
    if case.zeros is not None:
        found["zeros"] = integers(0, 16, experts, case.n, groups).to(case.zeros)
    unsigned = case.zeros is not None
    found["w"] = pack_int4(codes + 8 * unsigned) if case.bits == 4 else codes.to(case.codes)
    x = integers(-5, 6, tokens, case.k)
    found["a"] = pack_int4(x) if case.a == torch.uint8 else x.to(case.a)
    if case.a.is_floating_point and not exact:
        found["a"] = torch.randn(tokens, case.k, generator=rng, device=device).to(case.a)
    if not case.a.is_floating_point:
        found["a_scale"] = 2.0 ** integers(-2, 2, tokens, 1).float()
    found["bias"] = integers(-8, 9, experts, case.n).float()
    return found


def expected(case: Case, args: dict[str, Any], ends: list[int]) -> tuple[Tensor, Tensor]:
    """In float64, and the magnitude of what was added up."""
    a, w, k = args["a"], args["w"], args["k"]
    x = a.double()
    if case.a == torch.uint8:
        nibbles = torch.stack((a & 15, a >> 4), -1).flatten(1)[:, :k].double()
        x = torch.where(nibbles > 7, nibbles - 16, nibbles)
    by = args.get("a_scale", torch.ones(len(a), 1, device=a.device)).double()
    y = torch.zeros(len(a), case.n, dtype=torch.float64, device=a.device)
    magnitude = y.clone()
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        scales = args["scales"][e]
        if case.of_fp4:
            format_ = torch.float8_e4m3fn if case.group_size == 16 else torch.float8_e8m0fnu
            dense = decode(w[e], scales.view(format_), False, torch.float64)
            dense = dense * args["alpha"][e].double()
        else:
            zeros = args["zeros"][e].float() if "zeros" in args else None
            dense = dequantize(w[e], scales.float(), zeros, k=k).double()
        bias, rows = args["bias"][e].double(), slice(start, end)
        y[rows] = by[rows] * (x[rows] @ dense.T) + bias
        magnitude[rows] = by[rows] * (x[rows].abs() @ dense.abs().T) + bias.abs()
    return y, magnitude


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every grouped GEMM is one of this kernel, where it fits."""
    pick = config.pick_experts

    def forced(device: config.Device, shape: config.Shape, experts: int) -> tuple[Any, str]:
        tokens = {"skinny": experts, "hopper": 64 * experts, "gemm": 64 * experts}[family]
        if family == "gemm":
            device = config.without_wgmma(device)
        return pick(device, replace(shape, m=tokens), experts)[0], "forced"

    family: str = request.param
    monkeypatch.setattr(launch_experts.config, "pick_experts", forced)
    monkeypatch.setattr(launch_experts, "_plans", {})
    yield family
    monkeypatch.undo()


ENDS = {
    "all have some": lambda t, e: [t * (i + 1) // e for i in range(e)],
    "one has all": lambda t, e: [0] * (e // 2) + [t] * (e - e // 2),
    "none": lambda t, e: [0] * e,
    "some beyond": lambda t, e: [t * i // (e + 1) for i in range(1, e + 1)],
    "uneven": lambda t, e: [min(t, i * i) for i in range(1, e + 1)],
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_integers_are_exact(name: str, family: str) -> None:
    case = CASES[name]
    for tokens, experts in ((300, 5), (7, 3), (1, 40)):
        args = problem(case, tokens, experts)
        for spread in ENDS.values():
            ends = spread(tokens, experts)
            for dtype in (torch.int32, torch.int64):
                given = torch.tensor(ends, device="cuda", dtype=dtype)
                y = matmul_experts(**args, ends=given, out_dtype=torch.float32)
                assert_identical(y, expected(case, args, ends)[0].float())


@hypothesis.given(
    name=st.sampled_from(list(CASES)),
    n=st.sampled_from([1, 5, 48, 130, 384]),
    cuts=st.lists(st.integers(0, 600), min_size=2, max_size=80).map(sorted),
)
def test_any_spread_of_tokens(device: str, name: str, n: int, cuts: list[int]) -> None:
    *ends, tokens = cuts
    case = CASES[name]._replace(n=n)
    args = problem(case, tokens, len(ends), device)
    given = torch.tensor(ends, device=device)
    y = matmul_experts(**args, ends=given, out_dtype=torch.float32)
    assert_identical(y, expected(case, args, ends)[0].float())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["w4a16", "w4a16, zero points", "w8a16", "mxfp4", "nvfp4"])
def test_within_the_bound(name: str, family: str) -> None:
    case, tokens, experts = CASES[name], 700, 6
    args = problem(case, tokens, experts, exact=False)
    ends = ENDS["uneven"](tokens, experts)
    y = matmul_experts(**args, ends=torch.tensor(ends, device="cuda"))
    assert_close(y, *expected(case, args, ends))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mxfp4", "mxfp4, half a tile of K"])
def test_every_scale_of_mxfp4(name: str, family: str) -> None:
    case, ends = CASES[name]._replace(n=256), [80, 80, 200]
    args = problem(case, 210, 3)
    args["scales"] = torch.arange(256, device="cuda", dtype=torch.uint8)
    args["scales"] = args["scales"][None, :, None].repeat(3, 1, case.k // 32)
    args["a"] = torch.eye(case.k, device="cuda", dtype=case.a)[torch.arange(210) % case.k]
    args["bias"].zero_()
    y = matmul_experts(**args, ends=torch.tensor(ends, device="cuda"))
    torch.testing.assert_close(
        y, expected(case, args, ends)[0].to(y.dtype), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.gpu
def test_scales_that_no_fma_takes(family: str) -> None:
    case, ends = CASES["w4a16"], [70, 70, 200]
    args = problem(case, 210, 3)
    args["scales"][0, 5] = args["scales"][2, 90] = 2.0**20
    args["scales"][2, 3] = 2.0**-40
    args["bias"].zero_()  # as large a sum and a small bias would not be exact in float32
    y = matmul_experts(**args, ends=torch.tensor(ends, device="cuda"))
    assert_identical(y, expected(case, args, ends)[0].to(y.dtype))


@pytest.mark.gpu
def test_a_graph_follows_the_routing(family: str) -> None:
    case, tokens, experts = CASES["w4a16"]._replace(k=128), 400, 300
    args = problem(case, tokens, experts)
    ends = torch.zeros(experts, dtype=torch.int64, device="cuda")
    matmul_experts(**args, ends=ends)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matmul_experts(**args, ends=ends)
    for spread in ENDS.values():
        now = spread(tokens, experts)
        ends.copy_(torch.tensor(now))
        graph.replay()
        assert_identical(y, expected(case, args, now)[0].to(y.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("ends", [[5, 3, 9], [4, 8, 21], [-1, 8, 20], [30, 40, 50]])
def test_ends_that_cannot_be_give_nan(ends: list[int], family: str) -> None:
    args = problem(CASES["w4a16"], 20, 3)
    y = matmul_experts(**args, ends=torch.tensor(ends, device="cuda"))
    assert y.isnan().all()


@pytest.mark.gpu
def test_strided_operands_and_experts_that_lie_apart() -> None:
    case, ends = CASES["w4a16"], [10, 20, 30]
    args = problem(case, 30, 3)
    wide = torch.randn(30, 2 * case.k, device="cuda").to(case.a)
    wide[:, : case.k] = args["a"]
    apart = {"a": wide[:, : case.k]}
    for name in ("w", "scales"):
        room = args[name].new_zeros(3, 2, *args[name].shape[1:])
        room[:, 0] = args[name]
        apart[name] = room[:, 0]
    apart["bias"] = args["bias"].t().contiguous().t()
    y = matmul_experts(**{**args, **apart}, ends=torch.tensor(ends, device="cuda"))
    assert_identical(y, expected(case, args, ends)[0].to(y.dtype))


@pytest.mark.gpu
def test_explain_names_the_kernel() -> None:
    args = problem(CASES["w4a16"], 40, 5)
    ends = torch.tensor([8, 16, 24, 32, 40], device="cuda")
    ran = explain(lambda a: matmul_experts(**{**args, "a": a}, ends=ends), args["a"])
    assert "experts" in ran.dispatches[0].kernel


@pytest.mark.gpu
def test_float32_activations_in_a_graph() -> None:
    case = CASES["w4a16"]
    args = problem(case, 20, 3)
    args["a"] = args["a"].float()
    ends = torch.tensor([4, 4, 15], device="cuda")
    matmul_experts(**args, ends=ends)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matmul_experts(**args, ends=ends)
    graph.replay()
    assert_identical(y, expected(case, args, [4, 4, 15])[0].float())


# ---------------------------------------------------------------------------- without a GPU


@pytest.mark.parametrize("tile", [8, 16, 64, 256])
def test_there_is_room_for_every_spread(tile: int) -> None:
    rng = torch.Generator().manual_seed(tile)
    for _ in range(500):
        experts, tokens = (int(torch.randint(1, 300, (), generator=rng)) for _ in range(2))
        cuts = torch.randint(0, tokens + 1, (experts,), generator=rng).sort()[0].tolist()
        counts = [b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)]
        needed = sum(-(-count // tile) for count in counts)
        assert needed <= config.slots_of(tokens, experts, tile)
    assert config.slots_of(1, 8, tile) == 1


W4A16 = config.Shape(
    x_kind="bf16", w_kind="s4", scale_type="__nv_bfloat16", zero_type="float",
    out_type="__nv_bfloat16", has_zeros=False, has_a_zero=False, aligned=True,
    m=1, n=1536, k=2048, group_size=128,
)  # fmt: skip


@pytest.mark.parametrize(("m", "device"), [(8, "sm_90a"), (65536, "sm_90a"), (65536, "sm_80")])
def test_the_arguments_are_as_many_bytes_as_the_kernel_takes(m: int, device: str) -> None:
    c, _ = config.pick_experts(config.device_of(device), replace(W4A16, m=m), 128)
    sizes = cubin.parameter_sizes(compiler.compile_cubin(c, device), c.entry)
    words = launch_experts._EXPERT_WORDS + launch.WORDS
    given = 8 * words + launch.NUMBERS.size
    if isinstance(c, config.Hopper):
        given += len(launch_hopper.parameters((0,) * 8))
    assert sum((size + 7) // 8 * 8 for size in sizes) == given


def test_and_as_the_table_s_kernel_takes() -> None:
    c = config.ExpertTiles()
    (size,) = cubin.parameter_sizes(compiler.compile_cubin(c, "sm_90a"), c.entry)
    assert size == launch_experts._TABLE.size


@pytest.mark.parametrize("arch", config.ARCHS)
def test_every_problem_has_a_kernel(arch: str) -> None:
    device = config.device_of(arch)
    entries = []
    for m in (1, 8, 512, 4096, 32768):
        c, why = config.pick_experts(device, replace(W4A16, m=m), 128)
        assert c.experts
        assert why
        entries.append(c.entry)
    many = "hopper" if arch == "sm_90a" else "gemm"
    assert entries == ["skinny"] * 3 + [many] * 2
    odd = replace(W4A16, aligned=False, n=37, k=48, group_size=16, m=10)
    assert config.pick_experts(device, odd, 4)[0].entry == "gemm"
