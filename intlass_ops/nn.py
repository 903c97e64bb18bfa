"""Modules over the ops: `IntLinear`, a linear layer whose weight is INT4 or INT8 codes.

How a weight becomes codes is quantize.py's; this file only stores and applies them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from . import packing
from .ops import (
    matmul_int4_bf16_tn,
    matmul_int8_bf16_tn,
    quantize_int4,
    quantize_int8,
)

if TYPE_CHECKING:
    from .lowering.storage import Packed

Activation = Literal["int8", "int4"] | None


class IntLinear(nn.Module):
    """y = x @ w.T + bias with w[n, k] = (q[n, k] - zeros[n, g]) * scales[n, g].

    ``weight``: uint8 [N, ceil(K/2)] (INT4, see `pack_int4`) or int8 [N, K]; ``scales`` [N] or
    [N, K/group_size]; ``zeros`` likewise or None (INT4: None means signed codes). ``activation``:
    None keeps x as it is (W4A16, W8A16); "int8" or "int4" quantises x per token, symmetrically,
    on every call. All tensors are buffers, so that `state_dict` holds exactly the quantised layer.

    Raises ValueError or TypeError, from the op, for shapes and dtypes that do not fit.

    >>> from intlass_ops import pack_int4
    >>> codes = torch.tensor([[1, -2] * 8, [3, 0] * 8])
    >>> layer = IntLinear(pack_int4(codes), scales=torch.tensor([0.5, 0.25]))
    >>> layer(torch.ones(16))
    tensor([-4.,  6.])
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        in_features: int | None = None,
        activation: Activation = None,
    ) -> None:
        super().__init__()
        if weight.dim() != 2 or weight.dtype not in (torch.uint8, torch.int8):
            raise TypeError(
                f"IntLinear: weight is {weight.dtype} {tuple(weight.shape)}; expected uint8 "
                "[N, ceil(K/2)] (INT4) or int8 [N, K]"
            )
        self.bits = 4 if weight.dtype == torch.uint8 else 8
        self.out_features = weight.shape[0]
        self.in_features = in_features or weight.shape[1] * (2 if self.bits == 4 else 1)
        stored = packing.packed_size(self.in_features) if self.bits == 4 else self.in_features
        if stored != weight.shape[1]:
            raise ValueError(
                f"IntLinear: weight has {weight.shape[1]} columns; "
                f"in_features={self.in_features} needs {stored}"
            )
        if activation not in (None, "int8", "int4"):
            raise ValueError(f"IntLinear: activation={activation!r}; expected None, 'int8', 'int4'")
        if activation == "int4" and self.bits == 8:
            raise ValueError("IntLinear: activation='int4' needs an INT4 weight, this one is INT8")
        if zeros is not None and self.bits == 8:
            raise ValueError("IntLinear: zeros belong to INT4 weights, this one is INT8")
        self.activation = activation
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        a, a_scale = x, None
        if self.activation is not None:
            quantize = quantize_int8 if self.activation == "int8" else quantize_int4
            a, a_scale, _ = quantize(x)
        if self.bits == 8:
            return matmul_int8_bf16_tn(
                a, self.weight, a_scale, self.scales, bias=self.bias, out_dtype=x.dtype
            )
        return matmul_int4_bf16_tn(
            a,
            self.weight,
            self.scales,
            self.zeros,
            k=self.in_features,
            a_scale=a_scale,
            bias=self.bias,
            out_dtype=x.dtype,
        )

    def extra_repr(self) -> str:
        groups = self.scales.shape[1] if self.scales.dim() == 2 else 1
        a_bits = {None: 16, "int8": 8, "int4": 4}[self.activation]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme=w{self.bits}a{a_bits}, group_size={self.in_features // groups}, "
            f"zeros={self.zeros is not None}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> IntLinear:
        """Move between devices; keep codes, scales and zeros in the dtype they were made in.

        `model.half()` and `.to(dtype)` would round fp32 scales, silently changing every weight, and
        `.type(dtype)` would make numbers of the codes.
        """
        tensors = (("weight", self.weight), ("scales", self.scales), ("zeros", self.zeros))
        kept = {name: t for name, t in tensors if t is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self


class PackedLinear(nn.Module):
    """A weight in any form that lowering/storage.py knows: act-order, or 8 bits with zero points.

    Called with activations and, if they are codes, their scale and zero point. `prepare_` makes
    it; for plain weights it makes an `IntLinear` instead.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bias: Tensor | None

    def __init__(self, packed: Packed, in_features: int) -> None:
        super().__init__()
        self.kind, self.in_features = packed.kind, in_features
        self.out_features = packed.weight.shape[0]
        for name in ("weight", "scales", "zeros", "high", "high_scales", "order", "bias"):
            self.register_buffer(name, getattr(packed, name, None))

    def forward(
        self,
        x: Tensor,
        a_scale: Tensor | None = None,
        a_zero: Tensor | None = None,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        from .lowering.runtime import multiply
        from .lowering.storage import Packed

        parts = (self.weight, self.scales, self.zeros, self.high, self.high_scales, self.order)
        bias = self.bias if bias is None else bias
        every, dtype = slice(None), out_dtype or x.dtype
        packed = Packed(self.kind, *parts)  # type: ignore[arg-type]
        return multiply(x, packed, every, self.in_features, a_scale, a_zero, bias, dtype)

    def extra_repr(self) -> str:
        groups = self.scales.shape[1] if self.scales.dim() == 2 else 1
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"kind={self.kind}, group_size={self.in_features // groups}, "
            f"zeros={self.zeros is not None}, act_order={self.order is not None}"
        )
