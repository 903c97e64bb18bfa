"""What rewritten graphs call: a GEMM that finds, proves and packs its weight from the leaves.

Lives here: the op `intlass::linear_from_leaves`, packing of a measured weight into our storage,
and the memo that makes packing happen once per weight. Not here: how codes are found
(weights.py), the GEMMs (torch.ops.intlass.matmul_*).

The memo is keyed on the identity of the leaves, held weakly, and on what changes when they are
written: PyTorch's version counter and the data pointer. Packed tensors never leave this file, so
nothing can reuse their memory in place.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from . import records
from .weights import Measured, NotAffine, Recipe, evaluate_real, measure

INT4 = "int4"
INT8 = "int8"
INT4_PAIR = "int4 pair"
DENSE = "dense"


@dataclass
class Packed:
    """One weight in our storage. `order`: the K permutation of an act-order weight.

    INT4_PAIR is an 8-bit weight with zeros: w = 16 * scales * high + scales * (low - zeros).
    """

    kind: str
    weight: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    high: Tensor | None = None
    high_scales: Tensor | None = None
    order: Tensor | None = None
    reason: str = ""

    def tensors(self) -> list[Tensor]:
        values = (getattr(self, each.name) for each in fields(self))
        return [value for value in values if isinstance(value, Tensor)]


def _compact(values: Tensor) -> Tensor:
    """float64 parameters in the smallest floating dtype that holds them exactly, else float32."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = values.to(dtype)
        if torch.equal(narrow.double(), values):
            return narrow
    return values.float()


def pack(recipe: Recipe, leaves: Sequence[Tensor]) -> Packed:
    """Evaluate, prove and pack; a weight that turns out not to be affine is kept dense."""
    with torch.no_grad():
        evaluation = evaluate_real(recipe, leaves)
        try:
            return _store(measure(evaluation, recipe))
        except NotAffine as problem:
            weight = evaluation.weight()
            stacked = weight.reshape(recipe.batch, *weight.shape[-2:])
            if recipe.layout == "kn":
                stacked = stacked.transpose(1, 2)
            dense = stacked.reshape(recipe.rows, recipe.k).contiguous()
            # A leaf itself must not be kept alive by its own memo entry.
            return Packed(DENSE, dense.clone(), reason=str(problem))


def _store(found: Measured) -> Packed:
    codes, zeros = found.codes, found.zeros
    group = found.group_size
    order = found.order

    # Integer zeros vanish into the codes where the difference still fits.
    if bool((zeros == zeros.round()).all()) and bool((zeros.abs() < 512).all()):
        shifted = codes - zeros.to(torch.int16).repeat_interleave(group, dim=1)
        low, high = (int(each) for each in torch.aminmax(shifted))
        span = found.span[1] - found.span[0]
        if low >= -8 and high <= 7:
            return Packed(INT4, _pack4(shifted), _compact(found.scales), order=order)
        if span > 15 and low >= -128 and high <= 127:
            codes8 = shifted.to(torch.int8).contiguous()
            return Packed(INT8, codes8, _compact(found.scales), order=order)
    low, high = found.span
    zeros = zeros - low
    unsigned = codes - low
    if high - low <= 15:
        return Packed(INT4, _pack4(unsigned), _compact(found.scales), _compact(zeros), order=order)
    if high - low > 255:
        raise NotAffine(f"codes span [{low}, {high}]: more than 8 bits")
    return Packed(
        INT4_PAIR,
        _pack4(unsigned & 15),
        _compact(found.scales),
        _compact(zeros),
        _pack4(unsigned >> 4),
        _compact(16 * found.scales),
        order,
    )


def _pack4(codes: Tensor) -> Tensor:
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    nibbles = (codes & 15).to(torch.uint8)
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def _pack_off_pool(recipe: Recipe, leaves: Sequence[Tensor]) -> Packed:
    """Pack in a thread of its own: CUDA-graph warm-up redirects the allocations of the calling
    thread into a pool that a later capture may overwrite."""
    if not leaves[0].is_cuda:
        return pack(recipe, leaves)
    result: list[Packed | BaseException] = []
    device = leaves[0].device
    caller = torch.cuda.current_stream(device)

    def work() -> None:
        try:
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
                torch.cuda.current_stream().wait_stream(caller)
                packed = pack(recipe, leaves)
                torch.cuda.current_stream().synchronize()
            result.append(packed)
        except BaseException as problem:
            result.append(problem)

    thread = threading.Thread(target=work, name="intlass-pack")
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def _version(leaf: Tensor) -> tuple[int, int]:
    # Inference tensors have no version counter; PyTorch forbids most writes to them.
    return (-1 if leaf.is_inference() else leaf._version, leaf.data_ptr())


class _Entry:
    """A packed weight and what its leaves looked like when it was packed."""

    def __init__(self, recipe: Recipe, leaves: Sequence[Tensor], packed: Packed) -> None:
        self.recipe = recipe
        self.leaves = tuple(weakref.ref(leaf) for leaf in leaves)
        self.versions = tuple(_version(leaf) for leaf in leaves)
        self.packed = packed
        self.captured = False

    def live(self) -> tuple[Tensor, ...] | None:
        leaves = tuple(ref() for ref in self.leaves)
        return None if any(leaf is None for leaf in leaves) else leaves  # type: ignore[return-value]

    def fresh(self, leaves: Sequence[Tensor]) -> bool:
        return all(
            ref() is leaf and version == _version(leaf)
            for ref, leaf, version in zip(self.leaves, leaves, self.versions, strict=True)
        )


_MEMO: dict[tuple[Any, ...], _Entry] = {}
_LOCK = threading.RLock()


@functools.lru_cache(maxsize=65536)
def _recipe(text: str) -> Recipe:
    return Recipe.parse(text)


def _look_up(text: str, leaves: Sequence[Tensor]) -> Packed | None:
    """The packed weight; None if it is cold inside a capture, where nothing can be measured."""
    key = (text, *(id(leaf) for leaf in leaves))
    capturing = leaves[0].is_cuda and torch.cuda.is_current_stream_capturing()
    entry = _MEMO.get(key)
    if entry is not None and entry.fresh(leaves):
        if capturing:
            entry.captured = True
        return entry.packed
    if capturing:
        records.count("run.captured_cold")
        return None
    with _LOCK:
        entry = _MEMO.get(key)
        if entry is not None and entry.fresh(leaves):
            return entry.packed
        if entry is not None and entry.captured and entry.live() is not None:
            _refresh(entry, leaves)
            return entry.packed
        recipe = _recipe(text)
        versions = tuple(_version(leaf) for leaf in leaves)
        packed = _pack_off_pool(recipe, leaves)
        records.count("run.packed")
        if packed.kind == DENSE:
            records.count("run.dense")
            warnings.warn(
                f"intlass: a weight [{recipe.rows}, {recipe.k}] stays dense: {packed.reason}",
                stacklevel=2,
            )
        entry = _Entry(recipe, leaves, packed)
        entry.versions = versions
        _MEMO[key] = entry
        for leaf in leaves:
            weakref.finalize(leaf, _MEMO.pop, key, None)
        return packed


def _refresh(entry: _Entry, leaves: Sequence[Tensor]) -> None:
    """Repack in place, so that captured CUDA graphs read the new values."""
    versions = tuple(_version(leaf) for leaf in leaves)
    new = _pack_off_pool(entry.recipe, leaves)
    old = entry.packed
    same = new.kind == old.kind and [(t.shape, t.dtype) for t in new.tensors()] == [
        (t.shape, t.dtype) for t in old.tensors()
    ]
    if not same:
        raise RuntimeError(
            f"linear_from_leaves: a weight captured in a CUDA graph as {old.kind} is now "
            f"{new.kind} with other shapes or dtypes; call torch.compiler.reset() and recompile"
        )
    for target, source in zip(old.tensors(), new.tensors(), strict=True):
        target.copy_(source)
    entry.versions = versions
    records.count("run.refreshed")


def refresh_captured() -> None:
    """Repack every weight that a CUDA graph reads and that changed since."""
    for entry in list(_MEMO.values()):
        if entry.captured:
            leaves = entry.live()
            if leaves is not None and not entry.fresh(leaves):
                with _LOCK:
                    _refresh(entry, leaves)


def invalidate() -> None:
    """Forget what was packed; captured weights are repacked in place instead."""
    with _LOCK:
        for key, entry in list(_MEMO.items()):
            leaves = entry.live()
            if entry.captured and leaves is not None:
                _refresh(entry, leaves)
            else:
                _MEMO.pop(key, None)


def packed_bytes() -> int:
    """Memory held by repacked weights."""
    entries = list(_MEMO.values())
    return sum(t.numel() * t.element_size() for e in entries for t in e.packed.tensors())


def _multiply(
    x: Tensor,
    packed: Packed,
    rows: slice,
    k: int,
    a_scale: Tensor | None,
    a_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if packed.order is not None:
        x = x.index_select(-1, packed.order)
    weight = packed.weight[rows]
    if packed.kind == DENSE:
        return _dense(x, weight, a_scale, a_zero, bias, out_dtype)
    assert packed.scales is not None
    scales = packed.scales[rows]
    zeros = None if packed.zeros is None else packed.zeros[rows]
    ops: Any = torch.ops.intlass
    common = {"a_scale": a_scale, "a_zero": a_zero}
    if packed.kind == INT8:
        y: Tensor = ops.matmul_int8_bf16_tn(
            x, weight, a_scale, scales, a_zero=a_zero, bias=bias, out_dtype=out_dtype
        )
        return y
    if packed.kind == INT4:
        y = ops.matmul_int4_bf16_tn(
            x, weight, scales, zeros, k=k, bias=bias, out_dtype=out_dtype, **common
        )
        return y
    assert packed.high is not None and packed.high_scales is not None
    none = torch.zeros((), dtype=packed.high_scales.dtype, device=x.device)
    top = ops.matmul_int4_bf16_tn(
        x, packed.high[rows], packed.high_scales[rows], none, k=k, out_dtype=torch.float32, **common
    )
    y = top + ops.matmul_int4_bf16_tn(
        x, weight, scales, zeros, k=k, out_dtype=torch.float32, **common
    )
    return (y if bias is None else y + bias.float()).to(out_dtype)


def _dense(
    x: Tensor,
    weight: Tensor,
    a_scale: Tensor | None,
    a_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if a_scale is not None or not x.is_floating_point():
        wide = x.float() if a_zero is None else x.float() - a_zero.float()
        y = torch.nn.functional.linear(wide, weight.float())
        y = y if a_scale is None else y * a_scale.float()
    else:
        y = torch.nn.functional.linear(x, weight.to(x.dtype))
    return (y if bias is None else y.float() + bias.float()).to(out_dtype)


def _linear(
    x: Tensor,
    leaves: list[Tensor],
    recipe: str,
    a_scale: Tensor | None = None,
    a_zero: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    parsed = _recipe(recipe)
    packed = _look_up(recipe, leaves)
    if packed is None:
        weight = evaluate_real(parsed, leaves).weight()
        stacked = weight.reshape(parsed.batch, *weight.shape[-2:])
        if parsed.layout == "kn":
            stacked = stacked.transpose(1, 2)
        packed = Packed(DENSE, stacked.reshape(parsed.rows, parsed.k))
    dtype = out_dtype or x.dtype
    args = (parsed.k, a_scale, a_zero, bias, dtype)
    if parsed.batch == 1:
        return _multiply(x, packed, slice(None), *args)
    parts = [
        _multiply(x[e], packed, slice(e * parsed.n, (e + 1) * parsed.n), *args)
        for e in range(parsed.batch)
    ]
    return torch.stack(parts)


def _linear_fake(
    x: Tensor,
    leaves: list[Tensor],
    recipe: str,
    a_scale: Tensor | None = None,
    a_zero: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], _recipe(recipe).n), dtype=out_dtype or x.dtype)


# A fragment: ops/ owns the namespace.
LIBRARY = torch.library.Library("intlass", "FRAGMENT")  # noqa: TOR901
LIBRARY.define(
    "linear_from_leaves(Tensor x, Tensor[] leaves, str recipe, Tensor? a_scale=None, "
    "Tensor? a_zero=None, Tensor? bias=None, ScalarType? out_dtype=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
torch.library.register_fake("intlass::linear_from_leaves", _linear_fake, lib=LIBRARY)
LIBRARY.impl("linear_from_leaves", _linear, "CPU")
LIBRARY.impl("linear_from_leaves", _linear, "CUDA")
