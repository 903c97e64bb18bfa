"""A large weight is measured in blocks of rows: the same codes, or the whole of it at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import graph_zoo
import pytest
import store_rows_in_torch
import torch
from lowering_helpers import SWAPPED, Counting, fresh, outcomes
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from intlass_ops.cuda import launch_store_rows
from intlass_ops.lowering import blocks, editor, probing, runtime
from intlass_ops.lowering.storage import INT4, INT4_PAIR, INT8, Packed, pack_all, recipes_of
from intlass_ops.lowering.weights import Recipe


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once of what was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor) and not each.is_meta:
                storage = each.untyped_storage()
                self.live[StorageWeakRef(storage)] = storage.nbytes()
        self.live = {ref: size for ref, size in self.live.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(self.live.values()))
        return result


def weight_of(module: nn.Module) -> tuple[Recipe, list[Tensor]]:
    """How the weight of a linear is read from the leaves that its graph carries."""
    backend = Counting()
    with fresh(), torch.no_grad():
        x = torch.randn(2, graph_zoo.K).bfloat16()
        torch.compile(module, backend=backend, fullgraph=True)(x)
        assert outcomes() == [SWAPPED]
    (graph,) = backend.graphs
    (call,) = (n for n in graph.graph.nodes if "linear_from_leaves" in str(n.target))
    return recipes_of(call.args[2])[0], ordered(module, call)


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


class HalvesOfRows(graph_zoo.SubMul):
    """HQQ: two rows in a byte, one from each half of the weight."""

    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        super().setup(q, s, z)
        half = graph_zoo.N // 2
        self.register_buffer("p", (q[:half] | (q[half:] << 4)).to(torch.uint8))

    def unpack(self) -> Tensor:
        return torch.cat([self.p & 15, self.p >> 4])


class ScaledParts(graph_zoo.SubMul):
    """GGUF: no tensor holds all codes; all of the bytes are cut out of the bytes."""

    def forward(self, x: Tensor) -> Tensor:
        s, z = (t.repeat_interleave(graph_zoo.GROUP // 2, 1) for t in (self.s, self.z))
        parts = [(q.to(self.dtype) - z.to(self.dtype)) * s for q in (self.p & 15, self.p >> 4)]
        flat = torch.stack(parts, -1).flatten()[: graph_zoo.N * graph_zoo.K]
        return nn.functional.linear(x, flat.view(graph_zoo.N, graph_zoo.K))


class SomeRowsTwice(graph_zoo.SubMul):
    """What becomes of a row depends on where it is."""

    def forward(self, x: Tensor) -> Tensor:
        w = (self.unpack().to(self.dtype) - 8) * self.s[:, :1]
        return nn.functional.linear(x, torch.slice_scatter(w, w[:16] * 2, 0, 0, 16))


NAMES = ("SubMul", "Int32Words", "Conv1dLayout", "AwqOrder", "ActOrder", "Experts")
MAKERS = [
    Square,
    HalvesOfRows,
    ScaledParts,
    SomeRowsTwice,
    *(graph_zoo.AFFINE[name] for name in NAMES),
]


@pytest.mark.parametrize("make", MAKERS)
def test_blocks_give_what_the_whole_gives(
    make: type[graph_zoo.Idiom], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, leaves = weight_of(make())
    blocks_seen = []
    for elements in (1 << 30, 16 * graph_zoo.K):
        monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)
        blocks_seen.append(len(list(blocks.measured(recipe, leaves))))
        (packed,) = pack_all((recipe,), leaves)
        if elements == 1 << 30:
            expected = packed
    same(packed, expected, make)
    with as_on_a_gpu(monkeypatch) as taken:
        (packed,) = pack_all((recipe,), leaves)
    assert bool(taken) is (make is not SomeRowsTwice)
    same(packed, expected, make)
    rows = recipe.n // 16 * recipe.batch
    assert blocks_seen == ([1, 1] if make is SomeRowsTwice else [recipe.batch, rows])


def same(packed: Packed, expected: Packed, make: type[graph_zoo.Idiom]) -> None:
    assert packed.form() == expected.form()
    if make is graph_zoo.ActOrder:
        # Columns may be sorted in more than one way.
        packed, expected = in_order(packed), in_order(expected)
    for part, one in zip(packed.tensors(), expected.tensors(), strict=True):
        assert torch.equal(part, one)


@contextlib.contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, rows: int = 16) -> Iterator[list[int]]:
    """A kernel's stand-in takes all rows but the first ones; yields what its flags came to."""
    taken: list[int] = []

    def store_rows(*args: Any) -> None:
        store_rows_in_torch.store_rows(*args)
        taken.append(int(args[-1]))

    with monkeypatch.context() as patch:
        patch.setattr(launch_store_rows, "can_store", lambda device: True)
        patch.setattr(launch_store_rows, "store_rows", store_rows)
        for name in ("FIRST_ELEMENTS", "TAKEN_ELEMENTS"):
            patch.setattr(blocks, name, rows * graph_zoo.K)
        yield taken


def in_order(packed: Packed) -> Packed:
    assert packed.scales is not None
    assert packed.zeros is not None
    assert packed.order is not None
    codes = torch.stack([packed.weight & 15, packed.weight >> 4], -1).flatten(1)
    wide = [t.repeat_interleave(graph_zoo.GROUP, 1) for t in (packed.scales, packed.zeros)]
    back = packed.order.argsort()
    return Packed(packed.kind, *(t[:, back] for t in (codes, *wide)))


class LastRow(graph_zoo.SubMul):
    """All rows but the last have codes of 4 bits, one scale each and no zero points."""

    def __init__(self, scale: float, zero: float, code: int) -> None:
        super().__init__(torch.float32)
        q = torch.randint(-8, 8, (graph_zoo.N, graph_zoo.K)).to(torch.int8)
        self.register_buffer("q", q)
        self.s.fill_(0.5)
        self.z = torch.zeros_like(self.s, dtype=torch.half)
        self.s[-1, 1:], self.z[-1], self.q[-1, ::5] = scale, zero, code

    def unpack(self) -> Tensor:
        return self.q


@pytest.mark.parametrize(
    ("scale", "zero", "code", "kind", "width"),
    [
        (0.5, 0.0, 7, INT4, 1),
        (0.25, 0.0, 7, INT4, 4),
        (0.5, 3.25, 7, INT4, 1),
        (0.25, 0.0, 100, INT8, 4),
        (0.5, 3.25, 100, INT4_PAIR, 1),
    ],
)
def test_rows_are_stored_as_the_widest_of_them(
    scale: float, zero: float, code: int, kind: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = LastRow(scale, zero, code)
    recipe, leaves = weight_of(module)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 16 * graph_zoo.K)
    with as_on_a_gpu(monkeypatch) as taken:
        (packed,) = pack_all((recipe,), leaves)
    # A scale that the first rows have too is all that their form has room for.
    assert launch_store_rows.was_affine(taken[-1]) is (code == 7 and width == 1 and zero == 0)
    (again,) = pack_all((recipe,), leaves)
    assert all(map(torch.equal, packed.tensors(), again.tensors()))
    assert packed.kind == kind
    assert packed.scales is not None
    assert packed.scales.shape == (graph_zoo.N, width)
    assert (packed.zeros is None) is (zero == 0)
    eye = torch.eye(graph_zoo.K)
    w = runtime.multiply(eye, packed, recipe.k, None, None, None, torch.float32)
    assert torch.equal(w, module(eye))


@pytest.mark.parametrize("make", [graph_zoo.SubMul, HalvesOfRows])
def test_a_large_weight_is_held_once_while_it_is_packed(
    make: type[graph_zoo.Idiom], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proved as a whole it would take 41 bytes an element, 82 times its packed size."""
    monkeypatch.setattr(graph_zoo, "N", 1 << 13)
    recipe, leaves = weight_of(make())
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 128 * graph_zoo.K)
    with Peak() as peak:
        (packed,) = pack_all((recipe,), leaves)
    there = sum(t.nbytes for t in (*leaves, *packed.tensors()))
    # The codes of halves of rows are put together for all of them, one byte each.
    unpacked = 6 if make is HalvesOfRows else 0
    elements = graph_zoo.N * graph_zoo.K
    assert peak.bytes <= 1.05 * there + 140 * blocks.BLOCK_ELEMENTS + unpacked * elements


def test_probing_a_large_weight_takes_no_more_than_a_small_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        with Peak() as peak:
            found = probe(*args, **kwargs)
        sizes.append(peak.bytes)
        return found

    probe = editor.probe
    monkeypatch.setattr(editor, "probe", counted)
    for n in (1 << 10, 1 << 13):
        probing._PROBED.clear()
        monkeypatch.setattr(graph_zoo, "N", n)
        weight_of(graph_zoo.Int32Words())
    assert sizes[1] <= 1.1 * sizes[0]
