"""What rewritten graphs call: a GEMM that finds, proves and packs its weight from the leaves.

Lives here: the op `intlass::linear_from_leaves` and the memo that makes packing happen once per
weight. Not here: how codes are found (weights.py) and stored (storage.py), the GEMMs
(torch.ops.intlass.matmul_*).

The memo is keyed on the identity of the leaves, held weakly, and on what changes when they are
written: PyTorch's version counter and the data pointer. Packed tensors never leave this file, so
nothing can reuse their memory in place.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..explain import record as record_dispatch
from ..ops import matmul, matmul_kernels
from ..ops._library import implement
from ..ops.problem import FP8 as OF_FP8
from ..ops.problem import INT4 as OF_INT4
from ..ops.problem import INT8 as OF_INT8
from ..ops.problem import LUT4 as OF_LUT4
from . import records
from .program import device_of
from .storage import (
    BETWEEN,
    DENSE,
    FP8,
    INT4,
    INT8,
    Packed,
    dense_weight,
    pack_all,
    recipes_of,
    split_leaves,
)
from .weights import Recipe


def _pack_off_pool(recipes: Sequence[Recipe], leaves: Sequence[Tensor]) -> list[Packed]:
    """Pack in a thread of its own: CUDA-graph warm-up redirects the allocations of the calling
    thread into a pool that a later capture may overwrite."""
    device = device_of(leaves)
    if device.type != "cuda":
        return pack_all(recipes, leaves)
    result: list[list[Packed] | BaseException] = []
    caller = torch.cuda.current_stream(device)

    def work() -> None:
        try:
            with torch.cuda.device(device), torch.cuda.stream(_packing_stream(device)):
                torch.cuda.current_stream().wait_stream(caller)
                packed = pack_all(recipes, leaves)
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


@functools.cache
def _packing_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all weights: memory that one leaves is there for the next."""
    return torch.cuda.Stream(device)


def _version(leaf: Tensor) -> tuple[int, int]:
    # Inference tensors have no version counter; PyTorch forbids most writes to them.
    return (-1 if leaf.is_inference() else leaf._version, leaf.data_ptr())


class _Entry:
    """Packed weights and what their leaves looked like when they were packed."""

    def __init__(
        self, recipes: Sequence[Recipe], leaves: Sequence[Tensor], packed: list[Packed] | None
    ) -> None:
        self.recipes = recipes
        self.leaves = tuple(weakref.ref(leaf) for leaf in leaves)
        self.versions = tuple(_version(leaf) for leaf in leaves)
        self.packed = packed
        self.captured = False
        self.uses = 0

    def live(self) -> tuple[Tensor, ...] | None:
        leaves = tuple(ref() for ref in self.leaves)
        return None if any(leaf is None for leaf in leaves) else leaves  # type: ignore[return-value]

    def outdated(self) -> bool:
        """Whether the leaves, all of which are there, were written to. Asked before each replay."""
        for ref, (version, pointer) in zip(self.leaves, self.versions, strict=True):
            leaf = ref()
            if leaf is None:
                return False
            if leaf.data_ptr() != pointer or (version >= 0 and leaf._version != version):
                return True
        return False

    def fresh(self, leaves: Sequence[Tensor]) -> bool:
        # A loop: asked in every call, and all() of a generator takes twice as long.
        for ref, leaf, version in zip(self.leaves, leaves, self.versions, strict=True):
            if ref() is not leaf or version != _version(leaf):
                return False
        return True


_MEMO: dict[tuple[Any, ...], _Entry] = {}
_LOCK = threading.RLock()
# By recipe: packings in a row that were outdated by a write after one call (a cache, not a weight).
# From PATIENCE on, what was written is packed at its second sight only.
_WASTED: Counter[str] = Counter()
PATIENCE = 8


def _look_up(text: str, leaves: Sequence[Tensor], *, on_gpu: bool) -> list[Packed] | None:
    """The packed weight; None if it must be computed here: it is cold inside a capture, where
    nothing can be measured, or packing it would not pay."""
    key = (text, *map(id, leaves))
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    entry = _MEMO.get(key)
    if entry is not None and entry.packed is not None and entry.fresh(leaves):
        if capturing:
            entry.captured = True
        entry.uses += 1
        if entry.uses == 2:
            _WASTED.pop(text, None)
        return entry.packed
    if capturing:
        records.count("run.captured_cold")
        return None
    with _LOCK:
        entry = _MEMO.get(key)
        seen = entry is not None and entry.fresh(leaves)
        if entry is not None and seen and entry.packed is not None:
            return entry.packed
        if entry is not None and entry.captured and entry.live() is not None:
            _refresh(entry, leaves)
            return entry.packed
        if entry is not None and not seen and entry.uses <= 1:
            _WASTED[text] += 1
        return _add(key, text, leaves, pack=seen or _WASTED[text] < PATIENCE)


def _add(
    key: tuple[Any, ...], text: str, leaves: Sequence[Tensor], *, pack: bool
) -> list[Packed] | None:
    recipes = recipes_of(text)
    versions = tuple(_version(leaf) for leaf in leaves)
    packed = _pack_off_pool(recipes, leaves) if pack else None
    if packed is not None:
        _note(text.split(BETWEEN), packed)
    known = key in _MEMO
    entry = _Entry(recipes, leaves, packed)
    entry.versions = versions
    entry.uses = int(pack)
    _MEMO[key] = entry
    if not known:
        for leaf in leaves:
            weakref.finalize(leaf, _MEMO.pop, key, None)
    return packed


def _note(lines: Sequence[str], packed: Sequence[Packed]) -> None:
    """Report what became of the weights of these recipes, joined into one or not."""
    records.count("run.packed", len(lines))
    for each, line in zip(
        packed if len(packed) > 1 else [*packed] * len(lines), lines, strict=True
    ):
        records.stored(line, each)
    for each in packed:
        records.count(f"run.packed.{each.kind}")
        if each.kind == DENSE:
            records.count("run.dense")
            warnings.warn(
                f"intlass: a weight {list(each.weight.shape)} stays dense: {each.reason}",
                stacklevel=5,
            )


def _refresh(entry: _Entry, leaves: Sequence[Tensor]) -> None:
    """Repack in place, so that captured CUDA graphs read the new values."""
    if entry.packed is None:
        return
    versions = tuple(_version(leaf) for leaf in leaves)
    new = _pack_off_pool(entry.recipes, leaves)
    old = entry.packed
    if [each.form() for each in new] != [each.form() for each in old]:
        kinds = [", ".join(each.kind for each in packed) for packed in (old, new)]
        raise RuntimeError(
            f"linear_from_leaves: a weight captured in a CUDA graph as {kinds[0]} is now "
            f"{kinds[1]} with other shapes, dtypes or memory; call torch.compiler.reset() and "
            "recompile"
        )
    for before, after in zip(old, new, strict=True):
        for target, source in zip(before.tensors(), after.tensors(), strict=True):
            target.copy_(source)
    entry.versions = versions
    records.count("run.refreshed")


def refresh_captured() -> None:
    """Repack every weight that a CUDA graph reads and that changed since."""
    for entry in list(_MEMO.values()):
        if entry.captured and entry.outdated():
            leaves = entry.live()
            if leaves is not None:
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


def take(leaves: Sequence[Tensor], text: str) -> Packed:
    """The packed weight of one recipe, which the caller owns."""
    (packed,) = pack_all(recipes_of(text), leaves)
    _note([text], [packed])
    return packed


def packed_bytes() -> int:
    """Memory held by repacked weights."""
    entries = list(_MEMO.values())
    every = [each for entry in entries for each in entry.packed or ()]
    tensors = [t for p in every for t in p.tensors() if not (p.borrowed and t is p.weight)]
    return sum(t.numel() * t.element_size() for t in tensors)


_OF = {INT8: OF_INT8, FP8: OF_FP8, **OF_LUT4}


def _dispatch(op: str, x: Tensor, weight: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    """The op on arguments in the order of its kernels."""
    if op in (OF_INT4, OF_INT8):
        return matmul.dispatch(op, x, weight, scales, *rest)
    _, k, a_scale, a_zero, *after = rest
    assert a_scale is None
    assert a_zero is None
    y: Tensor
    if op == OF_FP8:
        y = torch.ops.intlass.matmul_fp8_bf16_tn.default(x, weight, scales, *after)
    else:
        y = getattr(torch.ops.intlass, op).default(x, weight, scales, k, *after)
    return y


def multiply(
    x: Tensor,
    packed: Packed,
    k: int,
    a_scale: Tensor | None,
    a_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    activation: str | None = None,
    residual: Tensor | None = None,
    run: Callable[..., Tensor] = _dispatch,
) -> Tensor:
    """x by a packed weight, by the ops or, within an op, by their kernels (`run`)."""
    if packed.order is not None:
        x = x.index_select(-1, packed.order)
    weight = packed.weight
    if packed.kind == DENSE:
        sizes = (x.shape[:-1].numel(), weight.shape[0], k, k)
        reason = packed.reason or "not packed yet"
        record_dispatch("linear_from_leaves", "dense", sizes, "dense", reason, fallback=True)
        y = _dense(x, weight, a_scale, a_zero)
        return _finish(y, bias, out_dtype, activation, residual)
    assert packed.scales is not None
    scales, zeros = packed.scales, packed.zeros
    after = a_scale, a_zero, None, bias, out_dtype, activation, residual
    if packed.kind in _OF:
        odd = k if packed.kind in OF_LUT4 else None
        return run(_OF[packed.kind], x, weight, scales, None, odd, *after)
    if packed.kind == INT4:
        return run(OF_INT4, x, weight, scales, zeros, k, *after)
    assert packed.high is not None
    assert packed.high_scales is not None
    none = torch.zeros((), dtype=packed.high_scales.dtype, device=x.device)
    wide = k, a_scale, a_zero, None, None, torch.float32, None, None
    y = run(OF_INT4, x, packed.high, packed.high_scales, none, *wide)
    y = y + run(OF_INT4, x, weight, scales, zeros, *wide)
    return _finish(y, bias, out_dtype, activation, residual)


def _finish(
    y: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    if bias is not None:
        y = y.float() + bias.float()
    if activation is not None:
        y = reference.ACTIVATIONS[activation](y.float())
    if residual is not None:
        y = y.float() + residual.float()
    return y.to(out_dtype)


def _dense(
    x: Tensor,
    weight: Tensor,
    a_scale: Tensor | None,
    a_zero: Tensor | None,
) -> Tensor:
    if a_scale is not None or not x.is_floating_point():
        wide = x.float() if a_zero is None else x.float() - a_zero.float()
        y = torch.nn.functional.linear(wide, weight.float())
        y = y if a_scale is None else y * a_scale.float()
    else:
        y = torch.nn.functional.linear(x, weight.to(x.dtype))
    return y


def _linear(
    x: Tensor,
    leaves: list[Tensor],
    recipe: str,
    a_scale: Tensor | None = None,
    a_zero: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    recipes = recipes_of(recipe)
    packed = _look_up(recipe, leaves, on_gpu=x.is_cuda)
    if packed is None:
        cold = zip(recipes, split_leaves(recipes, leaves), strict=True)
        packed = [Packed(DENSE, dense_weight(each, part)) for each, part in cold]
    by_kernel = functools.partial(multiply, run=matmul_kernels.run)
    first = recipes[0]
    k, dtype = first.k, out_dtype or x.dtype
    if first.batch == 1:
        if len(packed) == 1:
            tail = bias, dtype, activation, residual
            return by_kernel(x, packed[0], k, a_scale, a_zero, *tail)
        sizes = [each.n for each in recipes]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        parts = zip(packed, biases, strict=True)
        outputs = [by_kernel(x, each, k, a_scale, a_zero, b, dtype) for each, b in parts]
        return torch.cat(outputs, dim=-1)
    stacked = []
    for e in range(first.batch):
        scale, zero = (t if t is None or t.dim() < 3 else t[e] for t in (a_scale, a_zero))
        own = packed[0].rows(e * first.n, (e + 1) * first.n)
        stacked.append(by_kernel(x[e], own, k, scale, zero, bias, dtype))
    return torch.stack(stacked)


def _linear_fake(
    x: Tensor,
    leaves: list[Tensor],
    recipe: str,
    a_scale: Tensor | None = None,
    a_zero: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    n = sum(each.n for each in recipes_of(recipe))
    return x.new_empty((*x.shape[:-1], n), dtype=out_dtype or x.dtype)


# A fragment: ops/ owns the namespace.
LIBRARY = torch.library.Library("intlass", "FRAGMENT")
LIBRARY.define(
    "linear_from_leaves(Tensor x, Tensor[] leaves, str recipe, Tensor? a_scale=None, "
    "Tensor? a_zero=None, Tensor? bias=None, ScalarType? out_dtype=None, "
    "str? activation=None, Tensor? residual=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
torch.library.register_fake("intlass::linear_from_leaves", _linear_fake, lib=LIBRARY)
implement(LIBRARY, "linear_from_leaves", cpu=_linear, cuda=_linear)
