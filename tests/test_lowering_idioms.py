"""Hand-written quantised linears in every spelling: swapped and right, or left alone and right."""

from __future__ import annotations

import graph_zoo
import pytest
import torch
from lowering_helpers import (
    DECLINED,
    DENSE,
    SWAPPED,
    TOLERANCE,
    Counting,
    fresh,
    outcomes,
    relative_error,
)
from torch import Tensor, nn

from intlass_ops import lowering


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Counting]:
    backend = Counting()
    with fresh(), torch.no_grad():
        expected = module(x)
        y = torch.compile(module, backend=backend, fullgraph=True)(x)
    return y, expected, backend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", graph_zoo.AFFINE)
def test_affine_idiom_is_swapped(name: str, dtype: torch.dtype) -> None:
    module = graph_zoo.AFFINE[name](dtype)
    y, expected, backend = run(module, torch.randn(2, 3, graph_zoo.K).to(dtype))
    assert outcomes() == [SWAPPED], lowering.report()
    assert lowering.counters().get("run.dense", 0) == 0
    assert relative_error(y, expected) < TOLERANCE[dtype]
    (graph,) = backend.graphs
    left = [str(n.target) for n in graph.graph.nodes if "mm." in str(n.target)]
    assert not [each for each in left if not each.startswith("intlass.")]


@pytest.mark.parametrize("name", graph_zoo.UNTOUCHED)
def test_other_products_are_left_alone(name: str) -> None:
    module = graph_zoo.UNTOUCHED[name]()
    y, expected, _ = run(module, torch.randn(2, 3, graph_zoo.K).bfloat16())
    found = outcomes()
    assert SWAPPED not in found
    if name not in ("Dense", "MulSum"):
        assert found == [DECLINED]
        assert lowering.report()[0].reason
    if name == "Dense":
        assert found == [DENSE]
    assert relative_error(y, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("rows", [1, 7, 32])
def test_every_row_count(rows: int) -> None:
    module = graph_zoo.SubMul()
    y, expected, _ = run(module, torch.randn(rows, graph_zoo.K).bfloat16())
    assert outcomes() == [SWAPPED]
    assert relative_error(y, expected) < TOLERANCE[torch.bfloat16]


def test_affine_at_probing_but_clamped_by_real_values_stays_right() -> None:
    """An overflow guard that does bite on the real values: kept dense at run time, and said so."""

    class Guarded(graph_zoo.SubMul):
        def forward(self, x: Tensor) -> Tensor:
            q = self.unpack().to(self.dtype).view(graph_zoo.N, -1, graph_zoo.GROUP)
            w = (q - self.z.to(self.dtype).unsqueeze(-1)) * self.s.unsqueeze(-1)
            return nn.functional.linear(x, w.view(graph_zoo.N, graph_zoo.K).clamp(-1e4, 1e4))

    module = Guarded()
    module.s[0, 0] = 1e4
    x = torch.randn(4, graph_zoo.K).bfloat16()
    if outcomes_after(module, x) == [SWAPPED]:
        assert lowering.counters()["run.dense"] == 1


def outcomes_after(module: nn.Module, x: Tensor) -> list[str]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        y, expected, _ = run(module, x)
    assert relative_error(y, expected) < TOLERANCE[torch.bfloat16]
    return outcomes()


def test_clamps_that_no_synthetic_value_reaches_still_count() -> None:
    """An int8 leaf behind a clamp, or a scale behind one, must not be read around it."""

    class ClampedWeight(graph_zoo.Int8PerChannel):
        def forward(self, x: Tensor) -> Tensor:
            w = self.w.to(self.dtype) * self.s.unsqueeze(1)
            return nn.functional.linear(x, w.clamp(-1e4, 1e4))

    class ClampedScale(graph_zoo.Int8PerChannel):
        def forward(self, x: Tensor) -> Tensor:
            s = self.s.clamp(min=0.25)
            return nn.functional.linear(x, self.w.to(self.dtype) * s.unsqueeze(1))

    x = torch.randn(4, graph_zoo.K).bfloat16()
    clamped = ClampedWeight()
    clamped.s[3] = 1e5
    for module in (clamped, ClampedScale()):
        assert len(outcomes_after(module, x)) == 1


class DynamicActivation(nn.Module):
    """Per-token symmetric int8 activations, int8 weight, in several spellings of the product."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.spelling = spelling
        self.register_buffer("w", torch.randint(-127, 128, (48, 128), generator=g).to(torch.int8))
        self.register_buffer("s", (torch.rand(48, generator=g) * 0.01 + 0.01).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scale = flat.abs().amax(-1, keepdim=True).float().clamp(min=1e-5) / 127
        q = torch.clamp(torch.round(flat.float() / scale), -127, 127).to(torch.int8)
        if self.spelling == "int_mm":
            y = torch._int_mm(q, self.w.t()).float() * scale * self.s.float()
        elif self.spelling == "dequantised":
            w = self.w.to(x.dtype) * self.s.unsqueeze(1)
            y = nn.functional.linear((q.to(x.dtype) * scale.to(x.dtype)), w)
        else:
            w = self.w.float() * self.s.float().unsqueeze(1)
            y = (q.float() * scale) @ w.t()
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("spelling", ["int_mm", "dequantised", "float"])
def test_dynamic_int8_activations_use_the_graphs_codes(spelling: str) -> None:
    module = DynamicActivation(spelling)
    y, expected, _ = run(module, torch.randn(2, 20, 128).bfloat16())
    assert outcomes() == [SWAPPED], lowering.report()
    assert lowering.report()[0].scheme == "w8a8"
    assert relative_error(y, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_last_rounding_is_the_fused_ops(with_bias: bool) -> None:
    """Scales in float32 after the product; what is rounded twice stays so."""

    class Twice(DynamicActivation):
        def forward(self, x: Tensor) -> Tensor:
            q = x.round().clamp(-127, 127).to(torch.int8)
            y = torch._int_mm(q, self.w.t()).float() * self.s.float()
            y = y + self.s.float() if with_bias else y
            return y.unflatten(0, (2, -1)).half().float().flatten(0, 1).bfloat16()

    module = Twice("")
    y, expected, backend = run(module, 8 * torch.randn(40, 128).bfloat16())
    assert outcomes() == [SWAPPED], lowering.report()
    assert torch.equal(y, expected)
    (graph,) = backend.graphs
    (product,) = (n for n in graph.graph.nodes if "intlass.matmul" in str(n.target))
    assert product.meta["val"].dtype == torch.float16


def test_asymmetric_per_tensor_uint8_activations() -> None:
    """PT2E-like: uint8 codes with a zero point, W4 grouped weight."""

    class Asymmetric(graph_zoo.SubMul):
        def forward(self, x: Tensor) -> Tensor:
            low, high = x.amin().clamp(max=0).float(), x.amax().clamp(min=0).float()
            scale = ((high - low) / 255).clamp(min=1e-6)
            zero = torch.round(-low / scale)
            q = (torch.round(x.float() / scale) + zero).clamp(0, 255).to(torch.uint8)
            return super().forward(((q.float() - zero) * scale).to(x.dtype))

    y, expected, _ = run(Asymmetric(), torch.randn(2, 3, graph_zoo.K).bfloat16())
    assert outcomes() == [SWAPPED], lowering.report()
    assert lowering.report()[0].scheme == "w4a8"
    assert relative_error(y, expected) < TOLERANCE[torch.bfloat16]
