"""The lowering on a real GPU: kernels, CUDA graphs, stale weights, memory of packing."""

from __future__ import annotations

import gc

import graph_zoo
import module_zoo
import pytest
import torch
from lowering_helpers import SWAPPED, TOLERANCE, fresh, outcomes, relative_error
from test_side_by_side import SCHEMES, X, _swap, three
from torch import Tensor, nn

from intlass_ops import explain, lowering, quantize_int8
from intlass_ops.lowering import blocks
from intlass_ops.prepare import prepare_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def close(y: Tensor, expected: Tensor) -> bool:
    return relative_error(y, expected) < TOLERANCE[expected.dtype]


@pytest.mark.parametrize(
    "name", ["SubMul", "ActOrder", "Int8Epilogue", "Int8Asymmetric", "Experts"]
)
def test_idiom_runs_on_our_kernels(name: str) -> None:
    module = graph_zoo.AFFINE[name]().cuda()
    x = torch.randn(2, 3, graph_zoo.K, device="cuda").bfloat16()
    with fresh(), torch.no_grad():
        y = torch.compile(module, backend=lowering.backend, fullgraph=True)(x)
        assert close(y, module(x))
        assert outcomes() == [SWAPPED], lowering.report()


@pytest.mark.parametrize("kind", ["SubMul", "Int8PerChannel"])
def test_replayed_cuda_graphs_see_changed_weights(kind: str) -> None:
    module = graph_zoo.AFFINE[kind]().cuda()
    x = torch.randn(4, graph_zoo.K, device="cuda").bfloat16()
    with fresh(), torch.no_grad():
        compiled = torch.compile(module, backend=lowering.backend, mode="reduce-overhead")
        for _ in range(4):
            assert close(compiled(x), module(x))
        module.s.mul_(-2)
        assert close(compiled(x), module(x))
        first = next(module.buffers())
        first.copy_(first.flip(0).clone())
        for _ in range(2):
            assert close(compiled(x), module(x))
        assert lowering.counters().get("run.captured_cold", 0) == 0


@pytest.mark.parametrize("name", ["GPTQ: 4-bit v1, act-order", "AWQ: GEMM"])
def test_prepared_module_on_the_gpu(name: str) -> None:
    linear, x, expected = module_zoo.MODULES[name][0]()
    model = nn.Sequential(linear).cuda()
    with fresh(), torch.no_grad():
        assert [d.outcome for d in prepare_(model)] == [SWAPPED]
        assert close(model(x.cuda()).cpu(), expected.to(x.dtype))


def test_packing_releases_each_original() -> None:
    """Afterwards a model holds its packed weights and nothing else."""
    layers = [module_zoo.GptFastInt8() for _ in range(4)]
    model = nn.Sequential(*layers).cuda()
    del layers
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with fresh(), torch.no_grad():
        prepare_(model)
    gc.collect()
    held = torch.cuda.memory_allocated()
    assert held <= before * 1.15 + (1 << 16)


def test_packing_takes_a_few_bytes_an_element() -> None:
    n, k = 8192, 4096
    codes = torch.randint(0, 256, (n, k // 2), device="cuda").to(torch.uint8)
    scales = (torch.rand(n, k // 32, 1, device="cuda") * 0.01 + 0.01).bfloat16()

    def linear(x: Tensor) -> Tensor:
        q = torch.stack([codes & 15, codes >> 4], -1).view(n, -1, 32).to(x.dtype)
        return nn.functional.linear(x, ((q - 8) * scales).view(n, k))

    x = torch.randn(2, k, device="cuda").bfloat16()
    with fresh(), torch.no_grad():
        expected = linear(x)
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        assert close(torch.compile(linear, backend=lowering.backend, fullgraph=True)(x), expected)
    used = torch.cuda.max_memory_allocated() - before
    assert used <= 10 * n * k + 64 * blocks.BLOCK_ELEMENTS


def test_norm_and_swiglu_are_computed_by_the_quantiser() -> None:
    x, w = (torch.randn(size, device="cuda").bfloat16() for size in ((33, 512), (512,)))

    def step(x: Tensor) -> Tensor:
        codes, scale, _ = quantize_int8(nn.functional.rms_norm(x, (512,), w, 1e-5))
        y = (codes.float() * scale).bfloat16()
        codes, scale, _ = quantize_int8(nn.functional.silu(y) * x)
        return codes.float() * scale

    with fresh(), torch.no_grad():
        y = torch.compile(step, backend=lowering.backend, fullgraph=True)(x)
        assert lowering.counters()["quantisers"] == 2
        # A norm summed in another order may move a code by one.
        assert relative_error(y, step(x)) < 2 / 127


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "w4a8"])
def test_siblings_are_one_kernel_under_cuda_graphs(scheme: str) -> None:
    model = three(SCHEMES[scheme], bias=True).cuda()
    x = X.cuda()
    with fresh(), torch.no_grad():
        call = torch.compile(model, backend=lowering.backend, mode="reduce-overhead")
        assert len(explain(call, x).dispatches) == 2
        for change in (lambda m: m.v.scales.mul_(-2), _swap):
            for _ in range(4):
                assert all(close(y, z) for y, z in zip(call(x), model(x), strict=True))
            change(model)
            assert all(close(y, z) for y, z in zip(call(x), model(x), strict=True))
