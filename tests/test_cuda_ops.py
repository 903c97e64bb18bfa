"""The ops under what only a GPU has: tiles and tails of its kernels, dirty memory, tensors beyond
2^31 elements, several devices. Streams, threads and CUDA graphs: test_cuda_streams.py.

The tests that CPU and GPU share run on both from their own files (fixture `device`).
"""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
import warm_kernels
from gemm_case import X_DTYPE, Call, Case, build
from gemm_checks import check_bounded, check_exact, check_large_sum
from strategies import (
    BF16,
    FLOATS,
    FP16,
    FP32,
    KINDS,
    MIXED,
    SPLIT,
    group_cases,
    k_cases,
    large_cases,
    split_cases,
)
from tolerance import assert_identical
from torch import Tensor

import intlass_ops as ia
from intlass_ops import config
from intlass_ops.config.skinny_held import WITH_CLUSTERS, held_candidates
from intlass_ops.config.skinny_ring import pick_ring, ring_candidates
from intlass_ops.cuda import launch

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _warm_kernels() -> None:
    warm_kernels.compile_common_kernels()


each_kind = pytest.mark.parametrize("kind", KINDS)


def poison() -> None:
    """Leave NaN (all bits set) in the memory that the next allocations will get."""
    blocks = [
        torch.full((1 << size,), 0xFF, dtype=torch.uint8, device="cuda")
        for size in range(9, 26)
        for _ in range(4)
    ]
    del blocks


def check_rows(call: Call, sizes: tuple[int, ...]) -> None:
    """The first m tokens of ``call``, bit for bit, for each m."""
    expected = oracle.round_to(call.expected().y, call.case.out_dtype)
    of_tokens = "a_scale", "a_zero", "residual"
    for m in sizes:
        options = {n: v[:m] if n in of_tokens else v for n, v in call.options.items()}
        poison()
        y = replace(call, a=call.a[:m], options=options).run()
        assert_identical(y, expected[:m])


# ------------------------------------------------------------------------------- tiles and tails


@each_kind
def test_any_number_of_tokens(kind: str) -> None:
    call = build(replace(KINDS[kind], lead=(300,), n=65), "cuda")
    edges = (*range(18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300)
    check_rows(call, edges)


@pytest.mark.parametrize("n", [1, 7, 48, 64, 65, 127, 129, 4096])
@each_kind
def test_any_number_of_rows(kind: str, n: int) -> None:
    check_rows(build(replace(KINDS[kind], lead=(300,), n=n), "cuda"), (1, 20, 300))


@pytest.mark.parametrize("m", [1, 20])
@each_kind
def test_any_k(kind: str, m: int) -> None:
    for case in k_cases(kind, m):
        poison()
        check_exact(case, "cuda")


@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("kind", ["w4a16", "w4a8"])
def test_any_group_size(kind: str, m: int) -> None:
    for case in group_cases(kind, m):
        poison()
        check_exact(case, "cuda")


@pytest.mark.parametrize("kind", SPLIT)
def test_split_k(kind: str) -> None:
    for case in split_cases(kind):
        poison()
        check_exact(case, "cuda")


@pytest.mark.parametrize("case", large_cases(), ids=str)
def test_large_products(case: Case) -> None:
    check_exact(case, "cuda")
    check_bounded(case, "cuda")


RING = {
    "u4": Case("bf16", "u4", lead=(16,), k=1920, groups=15, scale=BF16, bias=BF16),
    "u4 bytes": Case("bf16", "u4", lead=(16,), k=1920, groups=15, scale=BF16, zero=torch.uint8),
    "s4 half a chunk": Case("bf16", "s4", lead=(16,), k=1984, groups=31, scale=BF16, bias=BF16),
    "s4": Case("fp16", "s4", lead=(16,), k=4096, groups=32, alpha="float"),
    "channel": Case("bf16", "u4", lead=(16,), k=992, out=FP32),
}


@pytest.mark.parametrize("smem", [227, 72])
@pytest.mark.parametrize("kind", RING)
def test_many_rows_of_few_tokens(kind: str, smem: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is said to be so small that a block takes many rows and K in segments."""
    real = launch.device_of(0)
    small = replace(real, sm_count=3, smem_per_block=smem * 1024, smem_per_sm=(smem + 1) * 1024)
    monkeypatch.setattr(launch, "device_of", lambda index: small)
    monkeypatch.setattr(launch, "_plans", {})
    monkeypatch.setattr(config, "pick", pick_ring)
    for n in (700, 384):
        call = build(replace(RING[kind], n=n), "cuda")
        kernels = [d.kernel for d in ia.explain(call.run).dispatches]
        assert all(kernel.startswith("skinny_ring") for kernel in kernels), kernels
        check_rows(call, tuple(m for m in (1, 2, 3, 5, 8, 9, 13, 16) if m <= len(call.a)))


HELD = {
    "s4": Case("bf16", "s4", lead=(16,), k=2048, groups=16, scale=BF16, bias=BF16),
    "channel": Case("fp16", "s4", lead=(16,), k=2048, out=FP32, residual=True),
    "u4": Case("bf16", "u4", lead=(16,), k=1536, groups=6, scale=BF16, zero=BF16),
    "u4 bytes": Case("bf16", "u4", lead=(16,), k=2304, groups=18, scale=BF16, alpha="float"),
    "int8": Case("s8", "u4", lead=(16,), k=2048, groups=16, a_scale="token"),
    "int4": Case("s4", "s4", lead=(16,), k=2048, groups=16, a_scale="token", activation="relu"),
}


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("kind", HELD)
def test_activations_in_registers(kind: str, long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows for many turns of a few blocks; K that leaves the last warps nothing, or is so long that
    clusters of two and four share it."""

    def pick(device: config.Device, shape: config.Shape) -> config.Matmul:
        return next(held_candidates(device, shape.on(device)))

    few = replace(launch.device_of(0), sm_count=10)
    if few.arch not in WITH_CLUSTERS and long:
        pytest.skip(f"{few.arch} has no clusters")
    monkeypatch.setattr(launch, "device_of", lambda index: few)
    monkeypatch.setattr(launch, "_plans", {})
    monkeypatch.setattr(config, "pick", pick)
    case = replace(HELD[kind], n=1100)
    if long:
        case = replace(case, k=9216, groups=72 if case.groups > 1 else 1)
    call = build(case, "cuda")
    kernels = [d.kernel for d in ia.explain(call.run).dispatches]
    assert all(kernel.startswith("skinny_held") for kernel in kernels), kernels
    check_rows(call, (1, 3, 8, 13))


@pytest.mark.parametrize(
    ("x", "w", "zero", "group"),
    [
        ("bf16", "s4", FP32, 32),
        ("bf16", "u4", BF16, 32),
        ("bf16", "u4", torch.uint8, 64),
        ("bf16", "u4", BF16, 128),
        ("fp16", "u4", FP16, 64),
        ("fp16", "u4", BF16, 128),
    ],
)
@pytest.mark.parametrize("kernel", ["picked", "skinny_held", "skinny_ring"])
def test_codes_that_take_their_scales(
    x: str, w: str, zero: torch.dtype, group: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups within a chunk of 64 bytes of a row, and zero points that are no bytes."""
    picks = {"skinny_held": held_candidates, "skinny_ring": ring_candidates}
    if kernel in picks:
        pick = picks[kernel]
        monkeypatch.setattr(launch, "_plans", {})
        monkeypatch.setattr(config, "pick", lambda device, shape: next(pick(device, shape)))
    # skinny_held.cu's warps have two chunks of 128 k or more each
    sizes = (1, 65, 512), (3, 4096, 1024), (8, 300, 2048), (16, 33, 4096)
    tails = (5, 48, 640), (13, 33, 21 * group)
    for m, n, k in (*sizes, *(() if kernel == "skinny_held" else tails)):
        case = Case(x, w, (m,), n, k, k // group, scale=X_DTYPE[x], zero=zero)
        poison()
        check_exact(case, "cuda")
        check_bounded(case, "cuda")
        dispatch = ia.explain(build(case, "cuda").run).dispatches[0].kernel
        assert dispatch.startswith("skinny" if kernel == "picked" else kernel), dispatch


@pytest.mark.parametrize("w", ["s4", "s8"])
def test_integer_sums_beyond_24_bits_of_many_tiles(w: str) -> None:
    check_large_sum(w, 300, 4096, "cuda")


@pytest.mark.parametrize("name", MIXED)
def test_runs_repeat_bit_for_bit(name: str) -> None:
    call = build(MIXED[name], "cuda", numbers="random")
    first = call.run()
    for _ in range(20):
        poison()
        assert torch.equal(call.run(), first)


def test_nothing_waits_for_the_gpu() -> None:
    calls = [build(case, "cuda").run for case in (*MIXED.values(), *KINDS.values())]
    x = torch.randn(4, 64, device="cuda")
    calls += [lambda: ia.quantize_int8(x), lambda: ia.quantize_int4(x, symmetric=False)]
    for call in calls:
        call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -------------------------------------------------------------------------------------- quantisers


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantisers_equal_the_cpu_bit_for_bit(bits: int, symmetric: bool) -> None:
    quantise = ia.quantize_int8 if bits == 8 else ia.quantize_int4
    generator = torch.Generator().manual_seed(bits)
    for i, length in enumerate((7, 64, 1000, 8193, 100_000)):
        x = torch.randn(6, length, generator=generator) * torch.logspace(-42, 30, 6)[:, None]
        x[0, 3], x[1, 3], x[2] = torch.nan, torch.inf, 0
        x = x.to(FLOATS[i % 3])
        for options in ({}, {"rounding": "stochastic", "seed": -(3**30) - i}):
            if options and length not in (64, 1000):
                continue
            results = [quantise(x.to(d), symmetric=symmetric, **options) for d in ("cpu", "cuda")]
            for on_cpu, on_gpu in zip(*results, strict=True):
                if on_cpu is not None:
                    assert_identical(on_gpu.cpu(), on_cpu)


# ------------------------------------------------------------------------------------ large, many

# Rows and columns whose product, in bytes of the smallest operand, is beyond 2^31.
HUGE_ROWS, HUGE_K = 70_000, 1 << 15


@pytest.fixture
def _large_memory() -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 60 << 30:
        pytest.skip(f"needs 60 GiB of free GPU memory, {free >> 30} GiB are")


def _integers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-2, 3, shape, dtype=torch.int8, device="cuda").to(dtype)


@pytest.mark.usefixtures("_large_memory")
@pytest.mark.parametrize("m", [1, 20])
def test_weights_beyond_2_31_elements(m: int) -> None:
    one = torch.ones((), device="cuda")
    a = _integers(m, HUGE_K, dtype=torch.int8)
    b = _integers(HUGE_ROWS, HUGE_K, dtype=torch.int8)
    y = ia.matmul_int8_bf16_tn(a, b, one, one, out_dtype=FP32)
    last = slice(HUGE_ROWS - 300, None)
    assert_identical(y[:, last].double(), oracle.matmul(a, b[last], one).y)
    del b, y
    packed = torch.randint(0, 256, (2 * HUGE_ROWS, HUGE_K // 2), dtype=torch.uint8, device="cuda")
    y = ia.matmul_int4_bf16_tn(a, packed, one, a_scale=one, out_dtype=FP32)
    last = slice(2 * HUGE_ROWS - 300, None)
    assert_identical(y[:, last].double(), oracle.matmul(a, packed[last], one).y)


@pytest.mark.usefixtures("_large_memory")
def test_activations_and_outputs_beyond_2_31_elements() -> None:
    one = torch.ones((), device="cuda")
    a = _integers(HUGE_ROWS, HUGE_K, dtype=BF16)
    b = _integers(16, HUGE_K, dtype=torch.int8)
    y = ia.matmul_int8_bf16_tn(a, b, None, one, out_dtype=FP32)
    assert_identical(y[-300:].double(), oracle.matmul(a[-300:], b, one).y)
    del a, b, y
    a, b = _integers(HUGE_ROWS, 32, dtype=BF16), _integers(HUGE_K, 32, dtype=torch.int8)
    y = ia.matmul_int8_bf16_tn(a, b, None, one)
    for rows in (slice(0, 300), slice(HUGE_ROWS - 300, None)):
        assert_identical(y[rows].double(), oracle.matmul(a[rows], b, one).y)


@pytest.mark.usefixtures("_large_memory")
def test_quantisers_beyond_2_31_elements() -> None:
    x = torch.randn(HUGE_ROWS, HUGE_K, dtype=BF16, device="cuda")
    q, scale, _ = ia.quantize_int8(x)
    expected = oracle.quantize(x[-3:], 8)
    assert_identical(q[-3:].long().cpu(), expected.codes)
    assert_identical(scale[-3:].cpu(), expected.scale)
    del q
    q, scale, _ = ia.quantize_int4(x, granularity="group", group_size=128)
    expected = oracle.quantize(x[-3:], 4, "group", 128)
    assert_identical(q[-3:].cpu(), oracle.pack(expected.codes))
    assert_identical(scale[-3:].cpu(), expected.scale)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_a_device_that_is_not_current(name: str) -> None:
    first, second = build(MIXED[name], "cuda:0"), build(MIXED[name], "cuda:1")
    expected = first.run()
    with torch.cuda.device(0):
        y = second.run()
        q, scale, _ = ia.quantize_int8(torch.ones(2, 64, device="cuda:1"))
    assert {t.device for t in (y, q, scale)} == {torch.device("cuda:1")}
    assert_identical(y.cpu(), expected.cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_two_gpus_are_refused() -> None:
    call = build(MIXED["few-tokens"], "cuda:0")
    call.scales = call.scales.to("cuda:1")
    with pytest.raises(ValueError, match="scales is on cuda:1, the input on cuda:0"):
        call.run()
