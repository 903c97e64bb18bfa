"""Quantisers of activations that compute what `quantize_int8(full_range=True)` does: torchao's.

Lives here: `source_of`, which finds x behind codes and their scales and proves that they are that
op's, bit for bit: it runs the graph's own operations, on the graph's device, on rows that tell
quantisers apart. Not here: codes in any other arithmetic, which stay the graph's (activations.py).
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .. import reference
from .activations import small
from .editor import NUMBER, Editor, aten
from .gemms import FLOATS, VIEWS, shape_of
from .program import Evaluation, NotASlice, Program, extract, walk
from .quantisers import QUANTIZE

WHY = "activations quantised by our kernel in the library's arithmetic (full_range)"
MAX_STEPS = 24  # from scales back to the largest magnitude
_OPTIONS = (8, "token", None, True, None, True)
# What a quantiser may consist of: then it has few constants and roundings, which rows tell apart.
_OPERATIONS = (
    "aten._to_copy.",
    "aten._unsafe_view.",
    "aten.abs.",
    "aten.add.",
    "aten.alias.",
    "aten.amax.",
    "aten.amin.",
    "aten.bitwise_xor.Scalar",
    "aten.clamp",
    "aten.clone.",
    "aten.detach.",
    "aten.div.Tensor",
    "aten.expand.",
    "aten.full.",
    "aten.full_like.",
    "aten.lift_fresh_copy.",
    "aten.max.dim",
    "aten.maximum.",
    "aten.minimum.",
    "aten.mul.",
    "aten.neg.",
    "aten.reciprocal.",
    "aten.reshape.",
    "aten.round.default",
    "aten.squeeze.",
    "aten.sub.",
    "aten.unsqueeze.",
    "aten.view.",
    "aten.zeros_like.",
    "getitem",
    "prims.convert_element_type.",
)
_LARGEST = (aten.amax.default, aten.amin.default, aten.max.dim)
_UNARY = (*VIEWS, aten.abs.default, aten.neg.default)


def source_of(edit: Editor, codes: Node, scale: Node) -> Node | None:
    """x, if `codes` [.., M, K] and `scale` [.., M, 1] hold, one row after the other, what
    `quantize_int8(x, full_range=True)` returns."""
    for x in _candidates(scale):
        value = x.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype not in FLOATS or not value.dim():
            continue
        if shape_of(x)[-1] == shape_of(codes)[-1] and _is_full_range(edit, x, codes, scale):
            return _behind_views(x)
    return None


def emit(edit: Editor, x: Node, codes: Node, scale: Node) -> tuple[Node, Node]:
    """The op's results in the shapes of `codes` and `scale`."""
    made = edit.call(QUANTIZE, x, *_OPTIONS)
    parts = [edit.call(operator.getitem, made, i) for i in (0, 1)]
    shapes = [
        [size if isinstance(size, int) else -1 for size in shape_of(node)]
        for node in (codes, scale)
    ]
    new = [edit.call(aten.reshape.default, *each) for each in zip(parts, shapes, strict=True)]
    return new[0], new[1]


def quantised(codes: Node, scale: Node) -> Node | None:
    """x of the op that `emit` put there, if these are its results."""
    parts: list[Any] = [_behind_views(each) for each in (codes, scale)]
    if any(
        part.target is not operator.getitem or part.args[1] != i for i, part in enumerate(parts)
    ):
        return None
    made: Any = parts[0].args[0]
    if parts[1].args[0] is not made or made.target is not QUANTIZE or made.args[1:] != _OPTIONS:
        return None
    return _behind_views(made.args[0])


def _behind_views(node: Node) -> Node:
    """Before what leaves rows as they are."""
    while node.target in VIEWS:
        source = node.args[0]
        if not isinstance(source, Node) or shape_of(source)[-1:] != shape_of(node)[-1:]:
            break
        node = source
    return node


def _candidates(scale: Node) -> Iterator[Node]:
    """What may be quantised with `scale`: what a largest value is taken of, and what that is of."""
    frontier, seen = [scale], {scale}
    for _ in range(MAX_STEPS):
        found = next((node for node in frontier if node.target in _LARGEST), None)
        if found is not None:
            x: Any = found.args[0]
            yield x
            while x.target in _UNARY:
                x = x.args[0]
                yield x
            return
        following = (each for node in frontier for each in node.all_input_nodes)
        frontier = [each for each in dict.fromkeys(following) if each not in seen]
        seen.update(frontier)


_PROVED: dict[tuple[Any, ...], bool] = {}
_LOCK = threading.Lock()


def _is_full_range(edit: Editor, x: Node, codes: Node, scale: Node) -> bool:
    def is_leaf(node: Node) -> bool:
        return node is x or NUMBER in node.meta or _is_size(node)

    try:
        slices = [walk(each, is_leaf) for each in (codes, scale)]
        leaves = list(dict.fromkeys([x, *slices[0][0], *slices[1][0]]))
        program, index = extract(leaves, list(dict.fromkeys([*slices[0][1], *slices[1][1]])))
    except NotASlice:
        return False
    if not all(operation.target.startswith(_OPERATIONS) for operation in program.operations):
        return False
    sizes: dict[Any, int] = {}
    like = x.meta["val"]
    shape = [small(size, sizes) for size in like.shape]
    others = [_value(leaf, sizes) for leaf in leaves[1:]]
    known = [(leaf.meta.get(NUMBER), str(leaf.meta["val"])) for leaf in leaves[1:]]
    key = (program.text, str(known), like.dtype, *shape, like.device)
    with _LOCK:
        if key in _PROVED:
            return _PROVED[key]
    with edit.undisturbed(), torch.no_grad():
        same = all(
            _same(program, [rows, *others], [index[codes], index[scale]])
            for rows in _batches(like.dtype, shape, _device(like))
        )
    with _LOCK:
        _PROVED[key] = same
    return same


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _value(leaf: Node, sizes: dict[Any, int]) -> Any:
    if _is_size(leaf):
        return small(leaf.meta["val"], sizes)
    return getattr(leaf.graph.owning_module, str(leaf.target))


def _device(like: Tensor) -> torch.device:
    usable = like.device.type != "cuda" or torch.cuda.is_available()
    return like.device if usable else torch.device("cpu")


def _same(program: Program, values: list[Any], results: list[int]) -> bool:
    """Whether codes and scales are the op's, bit for bit, those of NaN and infinity too."""
    try:
        found = Evaluation(program, values, set(results))
    except Exception:  # whatever the graph's operations raise: none does that our op accepts
        return False
    codes, scale = (found.values[each] for each in results)
    rows = values[0].reshape(-1, values[0].shape[-1])
    expected = reference.quantize_full_range(rows)
    alike = codes.dtype == torch.int8 and torch.equal(codes.reshape(rows.shape), expected[0])
    close = torch.allclose(scale.reshape(-1, 1).float(), expected[1], 0, 0, equal_nan=True)
    return alike and close


def _batches(dtype: torch.dtype, shape: list[int], device: torch.device) -> Iterator[Tensor]:
    """All of `_rows`, in tensors of this shape."""
    rows, at_once = _rows(dtype, shape[-1]), math.prod(shape[:-1])
    for first in range(0, len(rows), at_once):
        yield rows[torch.arange(first, first + at_once) % len(rows)].reshape(shape).to(device)


def _rows(dtype: torch.dtype, k: int) -> Tensor:
    """Rows [R, K] that a quantiser with another constant, rounding or bound has other codes of."""
    generator = torch.Generator().manual_seed(0)
    finfo = torch.finfo(dtype)
    normal = torch.randn(64, k, generator=generator, dtype=torch.float64)
    exponents = torch.linspace(math.log2(finfo.tiny), math.log2(finfo.max) - 4, 64)
    sizes = normal * torch.exp2(exponents.double()).unsqueeze(1)
    # Codes and a half of scales that are no power of two, which x / scale finds, and 1 / scale not
    scales = torch.arange(3, 87, 2, dtype=torch.float64).unsqueeze(1) * 2.0**-6
    halves = (torch.arange(k) % 5 - 2.5) * scales
    halves[:, 0] = scales[:, 0] * torch.where(torch.arange(len(scales)) % 2 == 0, 127.5, -127.5)
    powers = torch.arange(k) % 256 - 127.5
    edges = torch.tensor([0.0, -0.0, finfo.smallest_normal, 0.9, 1.0, 1.1, 1e3, finfo.max])
    edges[3:7] *= 127.5 * 2.0**-23
    edges = edges.double().unsqueeze(1) * torch.linspace(-1, 1, k, dtype=torch.float64)
    wild = normal[:5].clone()
    wild[0, k // 2], wild[1, 0], wild[2, -1] = torch.nan, torch.inf, -torch.inf
    wild[3], wild[4, 0], wild[4, -1] = torch.nan, torch.inf, torch.nan
    rows = [sizes, halves, torch.stack([powers, powers / 64, -powers * 32]), edges, wild]
    return torch.cat(rows).to(dtype)
