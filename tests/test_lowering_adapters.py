"""Opaque quantised products: read through themselves where that is exact, else declined by name."""

from __future__ import annotations

import pytest
import torch
from lowering_helpers import SWAPPED, TOLERANCE, Counting, fresh, outcomes, relative_error
from torch import Tensor, nn

from intlass_ops import lowering
from intlass_ops.lowering import adapters


class TilePackedCpu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        q = torch.randint(0, 16, (64, 128), dtype=torch.int32, generator=g)
        self.register_buffer("p", torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1))
        self.register_buffer("sz", (torch.randn(4, 64, 2, generator=g) * 0.1).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.p, 32, self.sz)


class Int8Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.register_buffer("w", torch.randint(-127, 128, (64, 128), generator=g).to(torch.int8))
        self.register_buffer("s", (torch.rand(64, generator=g) * 0.1).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, self.w, self.s)


@pytest.mark.parametrize(("make", "scheme"), [(TilePackedCpu, "w4a16"), (Int8Packed, "w8a16")])
def test_opaque_product_is_unpacked(make: type[nn.Module], scheme: str) -> None:
    module, x = make(), torch.randn(5, 128).bfloat16()
    with fresh(), torch.no_grad():
        y = torch.compile(module, backend=Counting(), fullgraph=True)(x)
        assert relative_error(y, module(x)) < TOLERANCE[torch.bfloat16]
    assert outcomes() == [SWAPPED], lowering.report()
    assert lowering.report()[0].scheme == scheme


def test_every_opaque_name_has_a_reason() -> None:
    assert all(adapters.OPAQUE.values())
    assert not set(adapters.ADAPTERS) & set(adapters.OPAQUE)
