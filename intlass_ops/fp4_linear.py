"""`Fp4Linear` and `Fp4ExpertLinear`: FP4 weights, MXFP4 or NVFP4, under floating activations.

Lives here: the modules and their buffers. Not here: the formats (fp4.py), the products and their
kernels (ops/block_scaled_kernels.py, ops/experts.py), layers of INT4 and INT8 (nn.py), files
(formats/).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import fp4
from .nn import Stored, as_autocast, require_bias, require_floating, require_tensors
from .ops import matmul_experts
from .ops.block_scaled_kernels import decode
from .ops.experts import expert_of
from .side_by_side import Movable

MXFP4, NVFP4 = "mxfp4", "nvfp4"
GROUPS = {MXFP4: fp4.MXFP4_GROUP, NVFP4: fp4.NVFP4_GROUP}
_KINDS = {group: kind for kind, group in GROUPS.items()}
_SCALES = {MXFP4: torch.float8_e8m0fnu, NVFP4: torch.float8_e4m3fn}
_OP_FORMATS = {MXFP4: "mxf4", NVFP4: "nvf4"}
_ROWS = 1024


class Fp4Layer(Stored):
    """What layers of FP4 weights share: their buffers, the checks of them, and decoding."""

    kept = ("weight", "scales", "global_scale")
    codes = ("weight", "scales")
    sizes: ClassVar[tuple[str, ...]]  # names of those of a weight, but for the last
    weight: Tensor
    scales: Tensor
    global_scale: Tensor | None

    def __init__(self, weight: Tensor, scales: Tensor, global_scale: Tensor | None = None) -> None:
        name = type(self).__name__
        require_tensors(name, weight=weight, scales=scales)
        if weight.dim() != len(self.sizes) + 1 or weight.dtype != torch.uint8:
            raise TypeError(
                f"{name}: weight is {weight.dtype} {tuple(weight.shape)}; expected uint8 "
                f"[{', '.join(self.sizes)}, K/2]"
            )
        super().__init__()
        self.out_features, self.in_features = weight.shape[-2], 2 * weight.shape[-1]
        self.kind = self._kind_of(weight, scales)
        if global_scale is not None:
            global_scale = self._checked(global_scale, weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales.view(torch.uint8))
        self.register_buffer("global_scale", global_scale)

    def _kind_of(self, weight: Tensor, scales: Tensor) -> str:
        name, k = type(self).__name__, self.in_features
        if scales.shape[:-1] != weight.shape[:-1]:
            rows = ", ".join(self.sizes)
            own = [f"{of}={size}" for of, size in zip(self.sizes, weight.shape, strict=False)]
            raise ValueError(
                f"{name}: scales has shape {tuple(scales.shape)}; expected [{rows}, K/32] (MXFP4) "
                f"or [{rows}, K/16] (NVFP4) with {', '.join(own)}, K={k}"
            )
        kind = _KINDS[fp4.group_size_of(name, k, scales.shape[-1])]
        if scales.dtype not in (torch.uint8, _SCALES[kind]):
            raise TypeError(
                f"{name}: scales are {scales.dtype}, one for {GROUPS[kind]} codes; expected "
                f"{_SCALES[kind]} or its bytes in uint8"
            )
        return kind

    def _checked(self, global_scale: Tensor, weight: Tensor) -> Tensor:
        """A number for each expert, or for one weight; experts may have one for each piece of N."""
        each = weight.shape[:-2]
        if global_scale.dtype == torch.float32:
            if global_scale.numel() == each.numel():
                return global_scale.reshape(each)
            pieces = global_scale.shape[1] if each and global_scale.dim() == 2 else 0
            if pieces and len(global_scale) == each[0] and weight.shape[1] % pieces == 0:
                return global_scale
        raise ValueError(
            f"{type(self).__name__}: global_scale is {global_scale.dtype} "
            f"{tuple(global_scale.shape)}; expected float32, "
            f"{f'[{each[0]}] or [{each[0]}, pieces of N]' if each else 'one number'}"
        )

    @property
    def group_size(self) -> int:
        """How many k share a scale."""
        return GROUPS[self.kind]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight: float32 arithmetic, then one rounding to ``dtype``."""
        codes = self.weight.flatten(0, -2)
        scales = self.scales.flatten(0, -2).view(_SCALES[self.kind])
        factors = self.global_scale
        if factors is not None:  # one a row
            factors = factors.reshape(-1, 1)
            factors = factors.expand(-1, len(codes) // len(factors)).reshape(-1, 1)
        dense = torch.empty(len(codes), self.in_features, dtype=dtype, device=codes.device)
        # In blocks of rows: the steps of a whole vocabulary would be several times its size.
        for start in range(0, len(codes), _ROWS):
            rows = slice(start, start + _ROWS)
            w = decode(codes[rows], scales[rows], False, torch.float32)
            dense[rows] = w if factors is None else w * factors[rows]
        return dense.view(*self.weight.shape[:-1], self.in_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, scheme=w4a16, "
            f"format={self.kind}, group_size={self.group_size}, "
            f"global_scale={self.global_scale is not None}"
        )


class Fp4Linear(Movable, Fp4Layer):
    """y = x @ w.T + bias with w[n, k] = e2m1(q[n, k]) * scale[n, k // group] * global_scale.

    ``weight``: codes, uint8 [N, K/2], the even k in the low nibble. ``scales``: of MXFP4 e8m0
    [N, K/32], of NVFP4 e4m3 [N, K/16], as their bytes (uint8) or in torch's own type; K and their
    number say which of the two it is. ``global_scale``: float32, one number, or None: 1. ``bias``:
    floating [N] or None. x is fp32, bf16 or fp16 [..., K], and y of its dtype, or of autocast's
    where that is on. All tensors are buffers, so that `state_dict` holds exactly the layer.

    Activations are never quantised, as in a file that was made for FP4 activations too (W4A4): more
    exact than that, on any GPU. With a bias the product is float32 and the sum rounded once. fp32
    activations have no kernel of their own: the weight is decoded at each call.

    Raises ValueError or TypeError for shapes and dtypes that do not fit.

    >>> codes = torch.full((1, 8), 0x42, dtype=torch.uint8)  # 2 is the code of 1.0, 4 that of 2.0
    >>> layer = Fp4Linear(codes, torch.tensor([[0.5]]).to(torch.float8_e4m3fn))
    >>> layer(torch.ones(16))
    tensor([12.])
    """

    sizes = ("N",)
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        global_scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(weight, scales, global_scale)
        require_bias(self, bias, self.out_features)
        self.register_buffer("bias", bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that nn.Linear has)
        x = as_autocast(input)
        require_floating(self, x)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"Fp4Linear: x is {tuple(x.shape)}, the layer has K={self.in_features}"
            )
        y: Tensor = torch.ops.intlass.matmul_block_scaled(
            x,
            self.weight,
            None,
            self.scales,
            _OP_FORMATS[self.kind],
            False,
            False,
            self.global_scale,
            x.dtype if self.bias is None else torch.float32,
        )
        return y if self.bias is None else (y + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"


class Fp4ExpertLinear(Fp4Layer):
    """A linear of every expert of a mixture: `Fp4Linear`s of one kind, stacked.

    ``weight`` [experts, N, K/2], ``scales`` [experts, N, K/32 or K/16], ``global_scale`` [experts],
    None, or [experts, P]: of each of P pieces of N (gate and up), which multiply a product in
    float32; otherwise as in `Fp4Linear`. Called as an `IntExpertLinear` is: with tokens [T, K]
    sorted by expert, where the tokens of each expert end, and biases [experts, N], if there are
    any; or with tokens in any order, and ``rows``: which of them each expert has, one expert after
    the other. On a GPU all tokens are one kernel, but those in float32 (see `matmul_experts`).

    Raises ValueError or TypeError for shapes and dtypes that do not fit.

    >>> codes = torch.full((2, 1, 8), 0x42, dtype=torch.uint8)  # 1.0 and 2.0, of both experts
    >>> scales = torch.ones(2, 1, 1).to(torch.float8_e4m3fn)
    >>> layer = Fp4ExpertLinear(codes, scales, global_scale=torch.tensor([0.5, 1.0]))
    >>> layer(torch.ones(3, 16), ends=torch.tensor([1, 3])).tolist()
    [[12.0], [24.0], [24.0]]
    """

    sizes = ("experts", "N")

    def forward(
        self, x: Tensor, ends: Tensor, bias: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        require_floating(self, x)
        by_piece = self.global_scale is not None and self.global_scale.dim() == 2
        y = matmul_experts(
            x if rows is None else x[rows],
            self.weight,
            self.scales,
            ends=ends,
            k=self.in_features,
            bias=None if by_piece else bias,
            out_dtype=torch.float32 if by_piece else x.dtype,
            alpha=None if by_piece else self.global_scale,
        )
        if by_piece:
            y = self._scaled(y, ends, bias).to(x.dtype)
        return y

    def _scaled(self, y: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
        """y [T, N] by what multiplies each piece of N, and the bias; 0 for tokens of no expert."""
        assert self.global_scale is not None
        expert = expert_of(len(y), ends)
        # One more, for tokens of none
        factors = pad(self.global_scale, (0, 0, 0, 1))[expert]
        y = (y.unflatten(1, (factors.shape[1], -1)) * factors[:, :, None]).flatten(1)
        return y if bias is None else y + pad(bias.to(y.dtype), (0, 0, 0, 1))[expert]

    def extra_repr(self) -> str:
        return f"experts={self.weight.shape[0]}, {super().extra_repr()}"
