"""Modules over the ops: `IntLinear`, a linear layer whose weight is INT4 or INT8 codes, and kin.

How a weight becomes codes is quantize.py's; this file only stores and applies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from . import packing
from .ops import (
    dequantize,
    matmul_experts,
    matmul_int4_bf16_tn,
    matmul_int8_bf16_tn,
    quantize_int4,
    quantize_int8,
)
from .ops._library import FLOATS
from .ops.lanes import takes_lanes
from .side_by_side import Movable

if TYPE_CHECKING:
    from typing_extensions import Self

    from .lowering.storage import Packed

Activation = Literal["int8", "int8_full_range", "int4"] | None
_BITS = {None: 16, "int8": 8, "int8_full_range": 8, "int4": 4}  # of each activation


def as_autocast(x: Tensor) -> Tensor:
    """``x`` as `torch.autocast`, where it is on, hands it to a linear layer."""
    device = "cuda" if x.is_cuda else "cpu"  # half the time of x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def require_tensors(layer: str, **values: Tensor) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{layer}: {name} is a {type(value).__name__}; expected a tensor")


def require_bias(layer: nn.Module, bias: Tensor | None, n: int) -> None:
    """ValueError for a bias that is neither None nor floating-point [N]."""
    if bias is not None and (bias.dtype not in FLOATS or bias.shape != (n,)):
        raise ValueError(
            f"{type(layer).__name__}: bias is {bias.dtype} {tuple(bias.shape)}; expected floating "
            f"point ({n},)"
        )


def require_floating(layer: nn.Module, x: Tensor) -> None:
    """TypeError for an input that is not floating-point, or cast to what FP8 weights are."""
    if not x.is_floating_point() or x.dtype == torch.float8_e4m3fn:
        raise TypeError(
            f"{type(layer).__name__}: x is {x.dtype}; expected fp32, bf16 or fp16. If the model "
            "casts it to the dtype of `weight`, leave this layer out (filter_fn, "
            "modules_to_not_convert)"
        )


class Stored(nn.Module):
    """A layer of codes and scales, which are what they were made as: no cast, no load changes it.

    ``kept``: the buffers whose dtype stays. ``codes``: those that hold codes rather than numbers.
    """

    kept: ClassVar[tuple[str, ...]] = ("weight", "scales", "zeros")
    codes: ClassVar[tuple[str, ...]] = ("weight",)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes codes alone: those of a layer that was not quantised would be cut to integers."""
        for name in self.codes:
            given, own = state.get(prefix + name), getattr(self, name)
            if given is not None and given.dtype != own.dtype:
                rest[-1].append(
                    f"{prefix}{name} is {given.dtype}, the {type(self).__name__} holds codes of "
                    f"{own.dtype}: load what was not quantised before quantize_"
                )
                return
        super()._load_from_state_dict(state, prefix, *rest)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move between devices; keep codes, scales and zeros in the dtype they were made in.

        `model.half()` and `.to(dtype)` would round fp32 scales, silently changing every weight, and
        `.type(dtype)` would make numbers of the codes.
        """
        tensors = {name: getattr(self, name) for name in self.kept}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in tensors.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self


class _Codes(Stored):
    """What layers of INT4 or INT8 codes share: their buffers, and their activations."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        in_features: int | None,
        activation: Activation,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.bits = 4 if weight.dtype == torch.uint8 else 8
        n, width = weight.shape[-2:]
        self.out_features = n
        self.in_features = in_features or width * (2 if self.bits == 4 else 1)
        stored = packing.packed_size(self.in_features) if self.bits == 4 else self.in_features
        if stored != width:
            raise ValueError(
                f"{name}: weight has {width} columns; in_features={self.in_features} needs {stored}"
            )
        if activation not in _BITS:
            names = ", ".join(map(repr, _BITS))
            raise ValueError(f"{name}: activation={activation!r}; expected one of {names}")
        if activation == "int4" and self.bits == 8:
            raise ValueError(f"{name}: activation='int4' needs an INT4 weight, this one is INT8")
        if zeros is not None and self.bits == 8:
            raise ValueError(f"{name}: zeros belong to INT4 weights, this one is INT8")
        self.activation = activation
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("bias", bias)

    def _activations(self, x: Tensor, lanes: bool = False) -> tuple[Tensor, Tensor | None]:
        """(x, None), or its codes and their scales."""
        require_floating(self, x)
        if self.activation is None:
            return x, None
        # Of packed codes the op cannot tell an odd number from the next even one.
        if self.activation == "int4" and x.dim() and x.shape[-1] != self.in_features:
            raise ValueError(
                f"{type(self).__name__}: x is {tuple(x.shape)}, the layer has K={self.in_features}"
            )
        if self.activation == "int4":
            codes, scales, _ = quantize_int4(x)
        else:
            full_range = self.activation == "int8_full_range"
            codes, scales, _ = quantize_int8(x, full_range=full_range, lanes=lanes)
        return codes, scales

    def extra_repr(self) -> str:
        groups = self.scales.shape[-1] if self.scales.dim() > 1 else 1
        a_bits = _BITS[self.activation]
        more = ", full_range=True" if self.activation == "int8_full_range" else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme=w{self.bits}a{a_bits}, group_size={self.in_features // groups}, "
            f"zeros={self.zeros is not None}, bias={self.bias is not None}{more}"
        )


class IntLinear(Movable, _Codes):
    """y = x @ w.T + bias with w[n, k] = (q[n, k] - zeros[n, g]) * scales[n, g].

    ``weight``: uint8 [N, ceil(K/2)] (INT4, see `pack_int4`) or int8 [N, K]; ``scales`` [N] or
    [N, K/group_size]; ``zeros`` likewise or None (INT4: None means signed codes). ``activation``:
    None keeps x as it is (W4A16, W8A16); "int8" or "int4" quantises x per token, symmetrically,
    on every call, "int8_full_range" in torchao's arithmetic (`quantize_int8`). ``input_scale`` [K]:
    x is multiplied by it first (under torch.compile as part of what makes x). x is fp32, bf16 or
    fp16 [..., K], and y of its dtype, or of autocast's where that is on. All tensors are buffers,
    so that `state_dict` holds exactly the quantised layer.

    Raises ValueError or TypeError, from the op, for shapes and dtypes that do not fit.

    >>> from intlass_ops import pack_int4
    >>> codes = torch.tensor([[1, -2] * 8, [3, 0] * 8])
    >>> layer = IntLinear(pack_int4(codes), scales=torch.tensor([0.5, 0.25]))
    >>> layer(torch.ones(16))
    tensor([-4.,  6.])
    """

    input_scale: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        in_features: int | None = None,
        activation: Activation = None,
        input_scale: Tensor | None = None,
    ) -> None:
        require_tensors("IntLinear", weight=weight, scales=scales)
        if weight.dim() != 2 or weight.dtype not in (torch.uint8, torch.int8):
            raise TypeError(
                f"IntLinear: weight is {weight.dtype} {tuple(weight.shape)}; expected uint8 "
                "[N, ceil(K/2)] (INT4) or int8 [N, K]"
            )
        super().__init__(weight, scales, zeros, bias, in_features, activation)
        if input_scale is not None and input_scale.shape != (self.in_features,):
            raise ValueError(
                f"IntLinear: input_scale has shape {tuple(input_scale.shape)}; expected "
                f"({self.in_features},)"
            )
        self.register_buffer("input_scale", input_scale)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that nn.Linear has)
        x = as_autocast(input)
        if self.input_scale is not None:
            x = x * self.input_scale.to(x.dtype)
        # A compiled graph sees to it itself, and its guards are few (lowering/lanes.py).
        lanes = not torch.compiler.is_compiling() and self._takes_lanes(x)
        a, a_scale = self._activations(x, lanes)
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

    def _takes_lanes(self, x: Tensor) -> bool:
        k = self.in_features
        if self.bits != 4 or _BITS[self.activation] != 8 or x.shape[-1:] != (k,):
            return False
        m = x.numel() // k
        return takes_lanes(m, k, [self.weight], self.scales, self.zeros, x.dtype)


class IntExpertLinear(_Codes):
    """A linear of every expert of a mixture: `IntLinear`s of one kind, stacked.

    ``weight`` [experts, N, ceil(K/2) or K], ``scales`` and ``zeros`` [experts, N, K/group_size],
    otherwise as in `IntLinear`. Called with tokens [T, K] sorted by expert, where the tokens of
    each expert end, and biases [experts, N], if there are any (see `matmul_experts`). Or with
    tokens in any order, and ``rows``: which of them each expert has, one expert after the other.

    >>> layer = IntExpertLinear(torch.ones(2, 1, 16, dtype=torch.int8), torch.ones(2, 1, 1))
    >>> layer(torch.ones(3, 16), ends=torch.tensor([3, 3])).tolist()
    [[16.0], [16.0], [16.0]]
    """

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        *,
        in_features: int | None = None,
        activation: Activation = None,
    ) -> None:
        require_tensors("IntExpertLinear", weight=weight, scales=scales)
        if weight.dim() != 3 or weight.dtype not in (torch.uint8, torch.int8):
            raise TypeError(
                f"IntExpertLinear: weight is {weight.dtype} {tuple(weight.shape)}; expected uint8 "
                "[experts, N, ceil(K/2)] (INT4) or int8 [experts, N, K]"
            )
        super().__init__(weight, scales, zeros, None, in_features, activation)

    @classmethod
    def stack(cls, layers: Sequence[IntLinear]) -> IntExpertLinear:
        """The layers of all experts, which are alike and have no biases, in one."""
        zeros = [layer.zeros for layer in layers if layer.zeros is not None]
        return cls(
            torch.stack([layer.weight for layer in layers]),
            torch.stack([layer.scales for layer in layers]),
            torch.stack(zeros) if zeros else None,
            in_features=layers[0].in_features,
            activation=layers[0].activation,
        )

    def forward(
        self, x: Tensor, ends: Tensor, bias: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        a, a_scale = self._activations(x)
        if rows is not None:  # only now: a token that several experts have is quantised once
            a, a_scale = a[rows], None if a_scale is None else a_scale[rows]
        return matmul_experts(
            a,
            self.weight,
            self.scales,
            self.zeros,
            ends=ends,
            k=self.in_features,
            a_scale=a_scale,
            bias=bias,
            out_dtype=x.dtype,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight: float32 arithmetic, then one rounding to ``dtype``."""
        zeros: Any = self.zeros if self.zeros is not None else [None] * len(self.weight)
        return torch.stack(
            [
                dequantize(w, s, z, k=self.in_features, dtype=dtype)
                for w, s, z in zip(self.weight, self.scales, zeros, strict=True)
            ]
        )

    def extra_repr(self) -> str:
        return f"experts={self.weight.shape[0]}, {super().extra_repr()}"


class IntExpertPairLinear(IntExpertLinear):
    """Experts of 8 bits with zero points, as two INT4 halves: w = s·(16·high + low - z).

    ``weight`` [experts, 2·N, ceil(K/2)]: the low halves of all rows, then the high ones; ``scales``
    and ``zeros`` [experts, 2·N, K/group_size]: s and z, then 16·s and 0. Called as an
    `IntExpertLinear` is. The halves are one product, in float32, of which both results are added.

    >>> codes = torch.tensor([[[0x44], [0x11]]], dtype=torch.uint8)  # 4 and 1: codes of 20
    >>> scales, zeros = torch.tensor([[[1.0], [16.0]]]), torch.tensor([[[18.0], [0.0]]])
    >>> layer = IntExpertPairLinear(codes, scales, zeros)
    >>> layer(torch.ones(1, 2), ends=torch.tensor([1])).tolist()
    [[4.0]]
    """

    def __init__(
        self, weight: Tensor, scales: Tensor, zeros: Tensor, *, in_features: int | None = None
    ) -> None:
        super().__init__(weight, scales, zeros, in_features=in_features)
        if self.bits != 4 or zeros is None or weight.shape[1] % 2:
            raise ValueError(
                f"IntExpertPairLinear: weight is {weight.dtype} {tuple(weight.shape)}; expected "
                "uint8 [experts, 2*N, ceil(K/2)], and zeros"
            )
        self.out_features = weight.shape[1] // 2

    def forward(
        self, x: Tensor, ends: Tensor, bias: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        require_floating(self, x)
        y = matmul_experts(
            x if rows is None else x[rows],
            self.weight,
            self.scales,
            self.zeros,
            ends=ends,
            k=self.in_features,
            bias=None if bias is None else nn.functional.pad(bias, (0, self.out_features)),
            out_dtype=torch.float32,
        )
        return self._joined(y, -1).to(x.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._joined(super().dequantize(), 1).to(dtype)

    def _joined(self, values: Tensor, dim: int) -> Tensor:
        low, high = values.split(self.out_features, dim)
        joined: Tensor = low + high
        return joined


class PackedWeight(Movable):
    """A weight in any form that lowering/storage.py knows, and products with it."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    high: Tensor | None
    high_scales: Tensor | None
    order: Tensor | None
    bias: Tensor | None

    def __init__(self, packed: Packed, in_features: int) -> None:
        super().__init__()
        self.kind, self.in_features = packed.kind, in_features
        self.out_features = packed.weight.shape[0]
        for name in ("weight", "scales", "zeros", "high", "high_scales", "order", "bias"):
            self.register_buffer(name, getattr(packed, name, None))

    def multiply(
        self,
        x: Tensor,
        a_scale: Tensor | None = None,
        a_zero: Tensor | None = None,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        from .lowering.runtime import multiply
        from .lowering.storage import INT4_PAIR, INT8, Packed

        # torch.compile checks at every call what was read: here, only what the kind has.
        packed = Packed(self.kind, self.weight, self.scales, order=self.order)
        if self.kind != INT8:
            packed.zeros = self.zeros
        if self.kind == INT4_PAIR:
            packed.high, packed.high_scales = self.high, self.high_scales
        bias = self.bias if bias is None else bias
        dtype = out_dtype or x.dtype
        return multiply(x, packed, self.in_features, a_scale, a_zero, bias, dtype)


class PackedLinear(PackedWeight):
    """A linear of a weight that is act-order, or has 8 bits and zero points.

    Called with activations and, if they are codes, their scale and zero point. `prepare_` makes
    it; for plain weights it makes an `IntLinear` instead.
    """

    forward = PackedWeight.multiply

    def extra_repr(self) -> str:
        groups = self.scales.shape[1] if self.scales.dim() == 2 else 1
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"kind={self.kind}, group_size={self.in_features // groups}, "
            f"zeros={self.zeros is not None}, act_order={self.order is not None}"
        )
