"""The same rewrites on graphs traced for CUDA with fake tensors: no GPU needed."""

from __future__ import annotations

import graph_zoo
import pytest
import torch
from lowering_helpers import DECLINED, SWAPPED, cuda_trace, fresh, outcomes
from test_lowering_idioms import DynamicActivation

from intlass_ops import lowering


@pytest.mark.parametrize("name", [*graph_zoo.AFFINE, *graph_zoo.UNTOUCHED])
def test_cuda_graph_is_rewritten_like_the_cpu_one(name: str) -> None:
    affine = name in graph_zoo.AFFINE
    module = (graph_zoo.AFFINE if affine else graph_zoo.UNTOUCHED)[name]()
    with fresh():
        graph = cuda_trace(module, torch.randn(4, graph_zoo.K).bfloat16())
    found = outcomes()
    if affine:
        assert found == [SWAPPED], lowering.report()
        ours = [node for node in graph.nodes if str(node.target).startswith("intlass.")]
        assert len(ours) == 1
        assert ours[0].meta["val"].device.type == "cuda"
    else:
        assert SWAPPED not in found


@pytest.mark.parametrize("spelling", ["int_mm", "dequantised", "float"])
def test_cuda_dynamic_activations(spelling: str) -> None:
    with fresh():
        cuda_trace(DynamicActivation(spelling), torch.randn(32, 128).bfloat16())
    assert outcomes() == [SWAPPED], lowering.report()
    assert lowering.report()[0].scheme == "w8a8"


def test_single_row_product_that_inductor_spells_as_a_sum() -> None:
    """mode="max-autotune" decomposes a one-row mm into mul and sum on CUDA."""
    with fresh(), torch._inductor.config.patch(coordinate_descent_tuning=True):
        graph = cuda_trace(graph_zoo.SubMul(), torch.randn(1, graph_zoo.K).bfloat16())
    assert not [node for node in graph.nodes if "mm." in str(node.target) and "aten" in str(node)]
    assert outcomes() == [SWAPPED], lowering.report()


def test_unknown_tile_packed_layout_without_a_device_is_declined() -> None:
    class TilePacked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("p", torch.zeros(8, 1, 32, 4, dtype=torch.int32))
            self.register_buffer("sz", torch.ones(1, 64, 2, dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten._weight_int4pack_mm(x, self.p, 128, self.sz)

    if torch.cuda.is_available():
        pytest.skip("with a device the layout is read through the operation itself")
    with fresh():
        cuda_trace(TilePacked(), torch.randn(4, 128).bfloat16())
    assert outcomes() == [DECLINED]
