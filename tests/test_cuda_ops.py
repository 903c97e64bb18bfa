"""The ops under what only a GPU has: tiles and tails of its kernels, streams, CUDA graphs, threads,
dirty memory, tensors beyond 2^31 elements, several devices.

The tests that CPU and GPU share run on both from their own files (fixture `device`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import oracle
import pytest
import torch
import warm_kernels
from gemm_case import Call, Case, build
from gemm_checks import check_bounded, check_exact, check_large_sum
from strategies import (
    BF16,
    FLOATS,
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
from torch import Tensor, nn

import intlass_ops as ia

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _warm_kernels() -> None:
    warm_kernels.compile_common_kernels()


each_kind = pytest.mark.parametrize("kind", KINDS)


def poison() -> None:
    """Leave NaN (all bits set) in the memory that the next allocations will get."""
    blocks = [
        torch.full((1 << size,), 0xFF, dtype=torch.uint8, device="cuda")
        for size in range(9, 28)
        for _ in range(4)
    ]
    del blocks


def check_rows(call: Call, sizes: tuple[int, ...]) -> None:
    """The first m tokens of ``call``, bit for bit, for each m."""
    expected = oracle.round_to(call.expected().y, call.case.out_dtype)
    for m in sizes:
        options = {n: v[:m] if n in ("a_scale", "a_zero") else v for n, v in call.options.items()}
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


# --------------------------------------------------------------------------- streams and threads


@pytest.mark.parametrize("name", MIXED)
def test_runs_on_the_current_stream(name: str) -> None:
    """The activations arrive late on a side stream: whoever ran elsewhere would miss them."""
    call = build(MIXED[name], "cuda")
    expected = call.run()
    late = torch.zeros_like(call.a)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(call.a)
        y = replace(call, a=late).run()
    stream.synchronize()
    assert_identical(y, expected)


def test_quantisers_run_on_the_current_stream() -> None:
    x = torch.randn(64, 512, device="cuda")
    expected, _, _ = ia.quantize_int8(x)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        q, _, _ = ia.quantize_int8(late)
    stream.synchronize()
    assert_identical(q, expected)


def test_streams_do_not_disturb_each_other() -> None:
    """Kernels that split K, at once on four streams: they share no counters and no workspace."""
    calls = [build(replace(case, seed=s), "cuda") for s in range(2) for case in SPLIT.values()]
    expected = [call.run() for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[] for _ in calls]
    for _ in range(50):
        for call, stream, ys in zip(calls, streams, results, strict=True):
            with torch.cuda.stream(stream):
                ys.append(call.run())
    torch.cuda.synchronize()
    for ys, y in zip(results, expected, strict=True):
        for got in ys:
            assert_identical(got, y)


@pytest.mark.parametrize("own_stream", [True, False], ids=["own-streams", "one-stream"])
def test_eight_threads(own_stream: bool) -> None:
    calls = [build(case, "cuda") for case in MIXED.values()]
    expected = [call.run() for call in calls]
    torch.cuda.synchronize()

    def hammer(turn: int) -> None:
        stream = torch.cuda.Stream() if own_stream else torch.cuda.default_stream()
        with torch.cuda.stream(stream):
            for i in range(100):
                which = (i + turn) % len(calls)
                y = calls[which].run()
                if i % 10 == 0:
                    assert_identical(y, expected[which])

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(hammer, turn) for turn in range(8)]:
            done.result()


# ------------------------------------------------------------------------------------ CUDA graphs


def capture(fn: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn()
    return graph, out


@pytest.mark.parametrize("name", MIXED)
def test_graphs_replay_with_new_activations(name: str) -> None:
    call = build(MIXED[name], "cuda")
    graph, out = capture(call.run)
    for seed in range(1, 4):
        call.a.copy_(build(replace(MIXED[name], seed=seed), "cuda").a)
        out.fill_(torch.nan)
        graph.replay()
        assert_identical(out, oracle.round_to(call.expected().y, call.case.out_dtype))


def test_a_graph_of_a_layer_that_quantises_its_activations() -> None:
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).to(BF16).cuda()
    ia.quantize_(model, ia.Int8DynamicActivationInt8Weight())
    x = torch.randn(20, 128, dtype=BF16, device="cuda")
    with torch.no_grad():
        graph, out = capture(lambda: model(x))
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert_identical(out, model(x))


def test_two_graphs_replay_at_once() -> None:
    """Each graph has arrival counters of its own: replays on two streams overlap freely."""
    calls = [build(replace(SPLIT["w4a16"], seed=seed), "cuda") for seed in range(2)]
    expected = [call.run() for call in calls]

    def several(call: Call) -> Callable[[], Tensor]:
        return lambda: torch.stack([call.run() for _ in range(8)])

    graphs = [capture(several(call)) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(25):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for (_, out), y in zip(graphs, expected, strict=True):
            assert_identical(out, y.expand_as(out))


def test_a_graph_replays_beside_eager_calls() -> None:
    captured, eager = (build(replace(SPLIT["w8a8"], seed=seed), "cuda") for seed in range(2))
    expected_captured, expected_eager = captured.run(), eager.run()
    graph, out = capture(captured.run)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(50):
        with torch.cuda.stream(side):
            graph.replay()
        y = eager.run()
        torch.cuda.synchronize()
        assert_identical(out, expected_captured)
        assert_identical(y, expected_eager)


def test_torch_compile_with_cuda_graphs() -> None:
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).to(BF16).cuda()
    ia.quantize_(model, ia.Int4WeightOnly(group_size=128))
    torch._dynamo.reset()
    fn = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, 128, dtype=BF16, device="cuda")
            assert_identical(fn(x).clone(), model(x))


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
    free, _ = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
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
