"""A large weight is measured in blocks of rows: the same codes, or the whole of it at once."""

from __future__ import annotations

from typing import Any

import graph_zoo
import pytest
import torch
from lowering_helpers import SWAPPED, Counting, fresh, outcomes
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from intlass_ops.lowering import blocks, probing
from intlass_ops.lowering.storage import Packed, pack_all, recipes_of


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once of what was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                self.live[StorageWeakRef(storage)] = storage.nbytes()
        self.live = {ref: size for ref, size in self.live.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(self.live.values()))
        return result


def packed(module: nn.Module) -> Packed:
    """The weight of a linear, packed from the recipe that its graph carries."""
    backend = Counting()
    with fresh(), torch.no_grad():
        x = torch.randn(2, graph_zoo.K).bfloat16()
        torch.compile(module, backend=backend, fullgraph=True)(x)
        assert outcomes() == [SWAPPED]
    (graph,) = backend.graphs
    (call,) = (n for n in graph.graph.nodes if "linear_from_leaves" in str(n.target))
    return pack_all(recipes_of(call.args[2]), ordered(module, call))[0]


def ordered(module: nn.Module, call: torch.fx.Node) -> list[Tensor]:
    found = []
    for leaf in call.args[1]:  # type: ignore[union-attr]
        value = leaf.meta["val"]  # type: ignore[union-attr]
        same = (t for t in module.buffers() if (t.dtype, t.shape) == (value.dtype, value.shape))
        found.append(next(same))
    return found


class Square(graph_zoo.SubMul):
    """N = K: which of the two a size is shows only in its place."""

    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        again = [t.repeat(3, 1)[: graph_zoo.K] for t in (q, s, z)]
        super().setup(*again)

    def forward(self, x: Tensor) -> Tensor:
        n = graph_zoo.K
        q = torch.stack([self.p & 15, self.p >> 4], dim=-1).view(n, n).to(self.dtype)
        q = q.view(n, -1, graph_zoo.GROUP) - self.z.to(self.dtype).unsqueeze(-1)
        return nn.functional.linear(x, (q * self.s.unsqueeze(-1)).view(n, n))


NAMES = ("SubMul", "Int32Words", "Conv1dLayout", "AwqOrder", "ActOrder")


@pytest.mark.parametrize("make", [Square, *(graph_zoo.AFFINE[name] for name in NAMES)])
def test_blocks_give_what_the_whole_gives(
    make: type[graph_zoo.Idiom], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = packed(make())
    monkeypatch.setattr(blocks, "ROW_STEP", 16)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 16 * graph_zoo.K)
    monkeypatch.setattr(probing, "PROBED_ROWS", 16)
    probing._PROBED.clear()
    cuts: list[bool] = []
    in_blocks = blocks._in_blocks

    def watched(*args: object) -> object:
        found = in_blocks(*args)  # type: ignore[arg-type]
        cuts.append(found is not None)
        return found

    monkeypatch.setattr(blocks, "_in_blocks", watched)
    parts = packed(make())
    assert parts.form() == whole.form()
    for part, one in zip(parts.tensors(), whole.tensors(), strict=True):
        assert torch.equal(part, one)
    # The order of columns must be one for all rows: with act-order, only the whole weight tells.
    assert cuts
    assert all(cuts) is (make is not graph_zoo.ActOrder)


def test_packing_takes_a_few_bytes_an_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proved as a whole it would be 40: `prepare_` then needs several times the packed model."""
    n, k = 1024, graph_zoo.K
    codes = torch.randint(0, 256, (n, k // 2)).to(torch.uint8)
    scales = (torch.rand(n, k // 32, 1) * 0.01 + 0.01).bfloat16()

    def linear(x: Tensor) -> Tensor:
        q = torch.stack([codes & 15, codes >> 4], -1).view(n, -1, 32).to(x.dtype)
        return nn.functional.linear(x, ((q - 8) * scales).view(n, k))

    backend = Counting()
    with fresh(), torch.no_grad():
        torch.compile(linear, backend=backend, fullgraph=True)(torch.randn(2, k).bfloat16())
    (graph,) = backend.graphs
    (call,) = (n for n in graph.graph.nodes if "linear_from_leaves" in str(n.target))
    leaves = [codes if leaf.meta["val"].dtype == torch.uint8 else scales for leaf in call.args[1]]
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 64 * k)
    with Peak() as peak:
        pack_all(recipes_of(call.args[2]), leaves)
    assert peak.bytes <= 10 * n * k + 56 * blocks.BLOCK_ELEMENTS
