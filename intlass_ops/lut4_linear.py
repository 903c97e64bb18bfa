"""`Lut4Linear`: 4-bit codes of a table, NF4 and others, under floating activations.

Lives here: the module and its buffers. Not here: the numbers (lut4.py), the product
(ops/matmul_lut4.py), layers of FP4 (fp4_linear.py), of INT4 and INT8 (nn.py), files (formats/).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import lut4
from .nn import Stored, as_autocast, require_bias, require_floating, require_tensors
from .ops import dequantize, matmul_lut4_bf16_tn
from .ops._library import FLOATS
from .ops.problem import GROUP_STEP
from .side_by_side import Movable

_ROWS = 1024


class Lut4Linear(Movable, Stored):
    """y = x @ w.T + bias with w[n, k] = numbers[q[n, k]] * scales[n, k // group_size].

    ``weight``: codes, uint8 [N, K/2], the even k in the low nibble. ``scales``: fp32, bf16 or fp16
    [N, K/group_size], with one group or groups of a multiple of 16 columns (bitsandbytes: 64).
    ``bias``: floating [N] or None. ``table``: whose numbers, "nf4" or another of
    `intlass_ops.lut4`; afterwards ``kind``. x is fp32, bf16 or fp16 [..., K], and y of its dtype,
    or of autocast's where that is on. All tensors are buffers, so that `state_dict` holds exactly
    the layer, and no cast of the model changes the dtype of weight and scales.

    NF4's numbers are rounded to the dtype of x, scales and sums are not; the sum, the bias
    with it, is rounded once. Gradients reach x, so that adapters train around it (QLoRA).

    Raises ValueError or TypeError for shapes and dtypes that do not fit.

    >>> codes = torch.full((1, 8), 0x7F, dtype=torch.uint8)  # 15 is the code of 1.0, 7 that of 0
    >>> layer = Lut4Linear(codes, torch.tensor([[0.5]]), bias=torch.tensor([1.0]))
    >>> layer(torch.ones(16))
    tensor([5.])
    """

    kept = ("weight", "scales")
    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, scales: Tensor, bias: Tensor | None = None, table: str = lut4.NF4
    ) -> None:
        if table not in lut4.TABLES:
            tables = ", ".join(map(repr, lut4.TABLES))
            raise ValueError(f"Lut4Linear: table={table!r}; expected one of {tables}")
        require_tensors("Lut4Linear", weight=weight, scales=scales)
        if weight.dim() != 2 or weight.dtype != torch.uint8:
            raise TypeError(
                f"Lut4Linear: weight is {weight.dtype} {tuple(weight.shape)}; expected uint8 "
                "[N, K/2]"
            )
        if scales.dtype not in FLOATS:
            raise TypeError(f"Lut4Linear: scales are {scales.dtype}; expected fp32, bf16 or fp16")
        super().__init__()
        self.kind = table
        self.out_features, self.in_features = weight.shape[0], 2 * weight.shape[1]
        self._check_groups(scales)
        require_bias(self, bias, self.out_features)
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    def _check_groups(self, scales: Tensor) -> None:
        n, k = self.out_features, self.in_features
        groups = scales.shape[1] if scales.dim() == 2 else 0
        if groups < 1 or len(scales) != n:
            raise ValueError(
                f"Lut4Linear: scales has shape {tuple(scales.shape)}; expected [N, K/group_size] "
                f"with N={n}, K={k}"
            )
        if k % groups or (groups > 1 and k // groups % GROUP_STEP):
            raise ValueError(
                f"Lut4Linear: {groups} scales a row of K={k}; expected one, or one for each group "
                f"of a multiple of {GROUP_STEP} columns"
            )

    @property
    def group_size(self) -> int:
        """How many k share a scale."""
        return self.in_features // self.scales.shape[1]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that nn.Linear has)
        x = as_autocast(input)
        require_floating(self, x)
        return matmul_lut4_bf16_tn(
            x, self.weight, self.scales, table=self.kind, k=self.in_features, bias=self.bias
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight: float32 arithmetic, then one rounding to ``dtype``."""
        n, k = self.out_features, self.in_features
        dense = torch.empty(n, k, dtype=dtype, device=self.weight.device)
        # In blocks of rows: the steps of a whole vocabulary would be several times its size.
        for start in range(0, n, _ROWS):
            rows = slice(start, start + _ROWS)
            codes, scales = self.weight[rows], self.scales[rows]
            dense[rows] = dequantize(codes, scales, dtype=dtype, table=self.kind)
        return dense

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.kind}a16, group_size={self.group_size}, bias={self.bias is not None}"
        )
