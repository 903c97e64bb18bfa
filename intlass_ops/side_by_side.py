"""Layers whose weights lie in one piece of memory, so that one GEMM can read them all.

Lives here: `lay_siblings` (codes, scales, zero points and biases of a module's like linears
become rows of one tensor each), what lays them so again after a model was moved or copied, and
`as_one` (tensors that lie so, as one). Not here: which layers share an input, which a graph tells
(lowering/siblings.py), and their product (lowering/joined.py).

Every buffer keeps a storage of its own, of its own size, that only lies in the same memory: files
and copies of one layer hold that layer, and nothing that looks for tensors that share storage
(torch.cond, nested_compile_region, safetensors) finds any. Nothing depends on how weights lie: a
layer whose buffer is replaced computes with the new one, in a GEMM of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from typing_extensions import Self

_BUFFERS = ("weight", "scales", "zeros", "bias")
# What a layer that a GEMM is all of has not.
_OTHERS = ("high", "order")
_ALIGNMENT = 16  # bytes; kernels load rows in vectors of that size
# A list of more is no attention or MLP, and laying them takes their memory once more.
_MOST = 8
# By buffer: the tensor whose rows it is some of.
_WHOLE: Any = WeakTensorKeyDictionary()


class Movable(nn.Module):
    """A layer that may lie beside others, told when its buffers are moved and when it is a copy."""

    weight: Tensor
    beside: Beside | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = self.weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._moved_from(before)
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        before = self.weight
        super()._load_from_state_dict(*args, **options)
        self._moved_from(before)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._moved_from(None)  # into a copy

    def _moved_from(self, before: Tensor | None) -> None:
        if self.beside is not None and self.weight is not before:
            self.beside.moves(self)


class Beside:
    """The layers of one piece of memory, counted as each gets another place."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.moved: list[Movable] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "moved": []}

    def moves(self, layer: Movable) -> None:
        """The last one that moves has all laid side by side again."""
        if layer in self.moved:
            self.moved = []
        self.moved.append(layer)
        if len(self.moved) == self.layers:
            layers, self.moved = self.moved, []
            forms = {_form(each) for each in layers}
            if len(forms) == 1 and None not in forms:
                lay(layers)


def as_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors [N, ...], [M, ...], … as one [N + M + …, ...], if they lie so in memory."""
    first = tensors[0]
    whole: Tensor | None = _WHOLE.get(first)
    if whole is None:
        return None
    start = end = first.data_ptr()
    form = (whole.dtype, whole.shape[1:])
    for each in tensors:
        if each.data_ptr() != end or (each.dtype, each.shape[1:]) != form:
            return None
        if not each.is_contiguous():
            return None
        end += each.nbytes
    if start < whole.data_ptr() or end > whole.data_ptr() + whole.nbytes:
        return None  # the first one's data were replaced
    row = whole.stride(0) * whole.element_size()
    return whole.narrow(0, (start - whole.data_ptr()) // row, (end - start) // row)


def lay_siblings(model: nn.Module) -> None:
    """Lay the weights of like layers of each module side by side, in the order of the layers."""
    from .nn import IntLinear, PackedWeight

    done: set[nn.Module] = set()
    for parent in model.modules():
        alike: dict[Any, list[Movable]] = {}
        for layer in parent.children():
            if isinstance(layer, (IntLinear, PackedWeight)) and layer not in done:
                alike.setdefault(_form(layer), []).append(layer)
                done.add(layer)
        for form, layers in alike.items():
            if form is not None and 1 < len(layers) <= _MOST:
                lay(layers)


def lay(layers: Sequence[Movable]) -> None:
    """Move the buffers of like layers into one piece of memory for each kind of buffer."""
    if as_one([layer.weight for layer in layers]) is not None:
        return
    beside = Beside(len(layers))
    for layer in layers:
        layer.beside = beside
    for name in _BUFFERS:
        tensors = [t for t in (layer._buffers[name] for layer in layers) if t is not None]
        if not tensors:
            continue
        with torch.inference_mode(False), torch.no_grad():
            whole = torch.cat(tensors)
            parts = whole.split([t.shape[0] for t in tensors])
        for layer, part in zip(layers, parts, strict=True):
            own = torch.from_dlpack(part)  # type: ignore[attr-defined]
            layer._buffers[name] = own
            _WHOLE[own] = whole


def _form(layer: Movable) -> tuple[Any, ...] | None:
    """What layers must have in common; None for one that cannot be laid beside others."""
    found: list[Any] = []
    if any(layer._buffers.get(name) is not None for name in _OTHERS):
        return None
    for name in _BUFFERS:
        t = layer._buffers[name]
        if t is None:
            found.append(None)
            continue
        plain = type(t) is Tensor and t.device.type in ("cpu", "cuda") and t.is_contiguous()
        if not plain or t.dim() == 0 or t.numel() == 0 or t.nbytes % _ALIGNMENT:
            return None
        found.append((t.dtype, t.device, t.shape[1:]))
    return tuple(found)
