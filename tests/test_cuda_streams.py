"""The ops on streams, in threads and in CUDA graphs, alone and at once.

Loading and launching by themselves: test_cuda_launch.py.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import oracle
import pytest
import torch
import warm_kernels
from gemm_case import Call, build
from strategies import BF16, MIXED, SPLIT
from tolerance import assert_identical
from torch import Tensor, nn

import intlass_ops as ia

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _warm_kernels() -> None:
    warm_kernels.compile_common_kernels()


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


@pytest.mark.parametrize("rows", [slice(None), slice(64, None)], ids=["all", "some rows"])
def test_weights_quantised_just_before_are_complete(rows: slice) -> None:
    """A GEMM reads weights before the kernels ahead of it have ended, but not these."""
    x = torch.randint(-8, 9, (8, 4096), dtype=torch.int8, device="cuda")
    one = torch.ones(8, 1, device="cuda")
    a = x.to(torch.bfloat16)
    for seed in range(30):
        torch.manual_seed(seed)
        w = torch.randn(4096, 4096, device="cuda")
        codes, scale, _ = ia.quantize_int8(w)
        y = ia.matmul_int8_bf16_tn(
            x, codes[rows], one, torch.ones_like(scale)[rows], out_dtype=torch.float32
        )
        assert_identical(y, (x.double() @ codes[rows].double().T).float())
        packed, scale, _ = ia.quantize_int4(w)
        table = torch.ones_like(scale, dtype=torch.bfloat16)[rows]
        y = ia.mixed_mm(a[:, rows], packed[rows].T, table.T, None, 4096, transposed=True)
        exact = a[:, rows].double() @ ia.unpack_int4(packed[rows]).double()
        assert_identical(y, exact.to(torch.bfloat16))


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
