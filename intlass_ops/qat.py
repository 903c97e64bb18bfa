"""Quantisation-aware training: linear layers that multiply integers forward and, if wanted, back.

    xq, sx = quantise(x h) per token      wq, sw = quantise(w h) per row      y = (xq wqᵀ)·sx·sw + b

with h a rotation or nothing, by the GEMMs that inference runs. Gradients go straight through the
rounding and stop where a value was clipped (masks m):

    dx = ((dy ŵ) ⊙ m_x) hᵀ      dw = ((dyᵀ x̂) ⊙ m_w) hᵀ      x̂ = xq·sx, ŵ = wq·sw

backward="int8" computes both products with integers too, reusing those of the forward pass: only
dy·sw and (dy·sx)ᵀ are quantised anew, rounded stochastically, so that the gradients are unbiased.
backward="float" keeps dy and multiplies by the dequantised tensors.

Not here: the function and its gradient (straight_through.py), the quantisers (fused_quantize.py).
The formulas are those of QuTLASS and of Panferov et al., "QuEST: Stable Training of LLMs with 1-Bit
Weights and Activations" (2025).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import side_by_side
from .integrations import conv1d, weight_readers
from .nn import IntLinear, as_autocast
from .ops._library import require_module
from .rotation import hadamard_matrix
from .straight_through import (
    SCHEMES,
    StraightThrough,
    product,
    quantise,
    quantise_activations,
)

_NO_ROTATION = 16
_rotations: weakref.WeakValueDictionary[tuple[int | None, torch.dtype, torch.device], Tensor] = (
    weakref.WeakValueDictionary()
)


@dataclass(frozen=True)
class QATConfig:
    """How `quantize_` makes a model trainable with quantised linears.

    ``scheme``: bits of weights and activations. ``rotation``: size of the Hadamard blocks that both
    operands are rotated by (16, 32, 64, 128 or 256, dividing every K), None for no rotation.
    ``method``: scales from the largest magnitude ("abs_max") or of least error on Gaussian data,
    clipping the tails ("quest"). ``backward``: products of the gradients, "int8" or "float".

    >>> QATConfig('w8a8', rotation=None, method='abs_max')
    QATConfig(scheme='w8a8', rotation=None, method='abs_max', backward='float')
    """

    scheme: Literal["w4a4", "w4a8", "w8a8"] = "w4a4"
    rotation: int | None = 32
    method: Literal["abs_max", "quest"] = "quest"
    backward: Literal["int8", "float"] = "float"

    def __post_init__(self) -> None:
        allowed = {
            "scheme": tuple(SCHEMES),
            "rotation": (None, 16, 32, 64, 128, 256),
            "method": ("abs_max", "quest"),
            "backward": ("int8", "float"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"QATConfig: {name}={getattr(self, name)!r}; expected one of {values}"
                )


class QATLinear(nn.Module):
    """A linear layer for training: floating weights, multiplied as integers.

    ``weight`` [N, K] and ``bias`` [N] are the parameters of the layer it replaces, and remain so.
    Takes fp32, bf16 or fp16 [..., K], K a multiple of 16 and of the rotation, and returns that
    dtype, or autocast's where it is on: weights are quantised from their own dtype either way.
    :meth:`convert` gives the layer for inference, which computes the same numbers.

    >>> layer = QATLinear(nn.Linear(32, 8), QATConfig('w4a4', rotation=32))
    >>> layer(torch.ones(2, 32)).sum().backward()
    >>> layer.weight.grad.shape
    torch.Size([8, 32])
    """

    h: Tensor

    def __init__(self, linear: nn.Linear, config: QATConfig) -> None:
        super().__init__()
        r = config.rotation or _NO_ROTATION
        if linear.in_features % r:
            raise ValueError(f"QATLinear: K={linear.in_features} is not a multiple of {r}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.config = config
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("h", self._rotation(), persistent=False)

    def _rotation(self) -> Tensor:
        """One tensor for all layers: torch.compile then sees which of them quantise the same x."""
        r = self.config.rotation
        made = hadamard_matrix(r) if r else torch.eye(_NO_ROTATION, device="cpu")
        h = made.to(self.weight)
        if type(h) is not Tensor or h.is_inference():
            return h
        return _rotations.setdefault((r, h.dtype, h.device), h)

    def _apply(self, fn: Any, recurse: bool = True) -> QATLinear:
        """Recomputes ``h``, which `to_empty` leaves uninitialised and casts round."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.h = self._rotation()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Recomputes ``h``: loading with assign=True takes the weight, not it, from meta."""
        super()._load_from_state_dict(*args)
        self.h = self._rotation()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that nn.Linear has)
        x = as_autocast(input)
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"QATLinear: x is {tuple(x.shape)}, the layer has K={self.in_features}"
            )
        c = self.config
        rows = x.reshape(-1, self.in_features)
        y: Tensor = StraightThrough.apply(  # type: ignore[no-untyped-call]
            rows, self.weight, self.bias, self.h, c.scheme, c.method, c.backward
        )
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def convert(self) -> nn.Module:
        """The layer with its integer weight alone."""
        w_bits, a_bits = SCHEMES[self.config.scheme]
        wq, sw, _ = quantise(self.weight, self.h, w_bits, self.config.method)
        bias = None if self.bias is None else self.bias.detach()
        if self.config.rotation is None and self.config.method == "abs_max":
            name: Literal["int4", "int8"] = "int4" if a_bits == 4 else "int8"
            return IntLinear(wq, sw, None, bias, in_features=self.in_features, activation=name)
        return RotatedIntLinear(wq, sw, bias, self.h, a_bits, self.config.method)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.config}"


class RotatedIntLinear(nn.Module):
    """y = (xq @ wqᵀ)·sx·sw + bias with xq, sx = quantise(x h): a `QATLinear` after training.

    ``weight``: uint8 [N, K/2] or int8 [N, K], codes of the rotated weight; ``scales`` [N, 1]; ``h``
    [R, R]; ``a_bits`` 4 or 8 and ``method`` as in `QATConfig`.

    >>> layer = QATLinear(nn.Linear(32, 8), QATConfig('w4a4', rotation=32)).convert()
    >>> layer
    RotatedIntLinear(in_features=32, out_features=8, scheme=w4a4, rotation=32, method=quest)
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    h: Tensor

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        h: Tensor,
        a_bits: int,
        method: str,
    ) -> None:
        super().__init__()
        self.in_features = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
        self.out_features = weight.shape[0]
        self.a_bits, self.method = a_bits, method
        for name, tensor in (("weight", weight), ("scales", scales), ("bias", bias), ("h", h)):
            self.register_buffer(name, tensor)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that nn.Linear has)
        x = as_autocast(input)
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"RotatedIntLinear: x is {tuple(x.shape)}, the layer has K={self.in_features}"
            )
        rows = x.reshape(-1, self.in_features)
        xq, sx, _ = quantise_activations(rows, self.h, self.a_bits, self.method, mask=False)
        y = product(xq, sx, self.weight, self.scales, self.bias, self.in_features, x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> RotatedIntLinear:
        """Move between devices; codes and scales keep the dtype they were made in."""
        kept = {"weight": self.weight, "scales": self.scales}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        w_bits = 4 if self.weight.dtype == torch.uint8 else 8
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme=w{w_bits}a{self.a_bits}, rotation={self.h.shape[0]}, method={self.method}"
        )


def prepare_qat_(
    model: nn.Module,
    config: QATConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Replace every nn.Linear of ``model`` by a `QATLinear` on the same parameters, in place.

    Of a `Conv1D` the weight is another one, transposed: make the optimizer afterwards.
    """
    if isinstance(model, nn.Linear):
        raise TypeError("quantize_: the model is a Linear itself and cannot be replaced in place")
    kept = weight_readers.kept_in_fp32(model)
    found: list[tuple[nn.Module, str, Any, str]] = []
    for parent_path, parent in model.named_modules():
        for name, child in parent._modules.items():
            path = f"{parent_path}.{name}" if parent_path else name
            if path in kept or not (type(child) is nn.Linear or conv1d.is_conv1d(child)):
                continue
            if filter_fn is None or filter_fn(child, path):
                found.append((parent, name, child, path))
    made: dict[nn.Module, QATLinear] = {}
    for *_, module, path in found:
        weight_readers.require_plain(path, module.weight)
        linear = conv1d.linear_of(module) if conv1d.is_conv1d(module) else module
        try:
            made[module] = made.get(module) or QATLinear(linear, config)
            weight_readers.succeed(made[module], module)
        except ValueError as problem:
            raise ValueError(f"quantize_: {path}: {problem}") from problem
    for parent, name, module, _ in found:
        setattr(parent, name, made[module])
    weight_readers.announce(model)


def convert_(model: nn.Module) -> None:
    """Replace every `QATLinear` of ``model`` by its layer for inference, in place.

    TypeError for a model that is itself one: `QATLinear.convert` returns its layer.

    >>> model = nn.Sequential(nn.Linear(32, 8))
    >>> prepare_qat_(model, QATConfig('w8a8', rotation=None, method='abs_max'))
    >>> convert_(model)
    >>> model[0]
    IntLinear(in_features=32, out_features=8, scheme=w8a8, group_size=32, zeros=False, bias=True)
    """
    require_module("convert_", model)
    if isinstance(model, QATLinear):
        raise TypeError("convert_: the model is a QATLinear itself; use its convert()")
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, QATLinear)
    ]
    layers = dict.fromkeys(child for *_, child in found)
    made = {layer: weight_readers.succeed(layer.convert(), layer) for layer in layers}
    for parent, name, child in found:
        setattr(parent, name, made[child])
    side_by_side.lay_siblings(model)
    weight_readers.announce(model)
