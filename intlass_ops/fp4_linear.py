"""`Fp4Linear`: a linear layer whose weight is FP4, MXFP4 or NVFP4, under floating activations.

Lives here: the module and its buffers. Not here: the formats (fp4.py), the product and its kernels
(ops/block_scaled_kernels.py), layers of INT4 and INT8 (nn.py), files (formats/).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import fp4
from .nn import Stored, as_autocast, require_floating, require_tensors
from .ops._library import FLOATS
from .ops.block_scaled_kernels import decode
from .side_by_side import Movable

MXFP4, NVFP4 = "mxfp4", "nvfp4"
GROUPS = {MXFP4: fp4.MXFP4_GROUP, NVFP4: fp4.NVFP4_GROUP}
_KINDS = {group: kind for kind, group in GROUPS.items()}
_SCALES = {MXFP4: torch.float8_e8m0fnu, NVFP4: torch.float8_e4m3fn}
_OP_FORMATS = {MXFP4: "mxf4", NVFP4: "nvf4"}
_ROWS = 1024


class Fp4Linear(Movable, Stored):
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

    kept = ("weight", "scales", "global_scale")
    codes = ("weight", "scales")
    weight: Tensor
    scales: Tensor
    global_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        global_scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        require_tensors("Fp4Linear", weight=weight, scales=scales)
        if weight.dim() != 2 or weight.dtype != torch.uint8:
            raise TypeError(
                f"Fp4Linear: weight is {weight.dtype} {tuple(weight.shape)}; expected uint8 "
                "[N, K/2]"
            )
        super().__init__()
        self.out_features, self.in_features = weight.shape[0], 2 * weight.shape[1]
        self.kind = self._kind_of(scales)
        if global_scale is not None and (
            global_scale.dtype != torch.float32 or global_scale.numel() != 1
        ):
            raise ValueError(
                f"Fp4Linear: global_scale is {global_scale.dtype} {tuple(global_scale.shape)}; "
                "expected float32, one number"
            )
        if bias is not None and (bias.dtype not in FLOATS or bias.shape != (self.out_features,)):
            raise ValueError(
                f"Fp4Linear: bias is {bias.dtype} {tuple(bias.shape)}; expected floating point "
                f"({self.out_features},)"
            )
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales.view(torch.uint8))
        one = None if global_scale is None else global_scale.reshape(())
        self.register_buffer("global_scale", one)
        self.register_buffer("bias", bias)

    def _kind_of(self, scales: Tensor) -> str:
        n, k = self.out_features, self.in_features
        if scales.dim() != 2 or scales.shape[0] != n:
            raise ValueError(
                f"Fp4Linear: scales has shape {tuple(scales.shape)}; expected [N, K/32] (MXFP4) or "
                f"[N, K/16] (NVFP4) with N={n}, K={k}"
            )
        kind = _KINDS[fp4.group_size_of("Fp4Linear", k, scales.shape[1])]
        if scales.dtype not in (torch.uint8, _SCALES[kind]):
            raise TypeError(
                f"Fp4Linear: scales are {scales.dtype}, one for {GROUPS[kind]} codes; expected "
                f"{_SCALES[kind]} or its bytes in uint8"
            )
        return kind

    @property
    def group_size(self) -> int:
        """How many k share a scale."""
        return GROUPS[self.kind]

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

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K]: float32 arithmetic, then one rounding to ``dtype``."""
        n, k = self.out_features, self.in_features
        dense = torch.empty(n, k, dtype=dtype, device=self.weight.device)
        scales = self.scales.view(_SCALES[self.kind])
        # In blocks of rows: the steps of a whole vocabulary would be several times its size.
        for start in range(0, n, _ROWS):
            rows = slice(start, start + _ROWS)
            w = decode(self.weight[rows], scales[rows], False, torch.float32)
            dense[rows] = w if self.global_scale is None else w * self.global_scale
        return dense

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, scheme=w4a16, "
            f"format={self.kind}, group_size={self.group_size}, "
            f"global_scale={self.global_scale is not None}, bias={self.bias is not None}"
        )
