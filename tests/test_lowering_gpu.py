"""The lowering on a real GPU: kernels, CUDA graphs, stale weights, memory of packing."""

from __future__ import annotations

import gc

import graph_zoo
import module_zoo
import pytest
import torch
from lowering_helpers import SWAPPED, TOLERANCE, fresh, outcomes, relative_error
from torch import Tensor, nn

from intlass_ops import lowering
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
