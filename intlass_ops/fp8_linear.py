"""`Fp8Linear` and `Fp8ExpertLinear`: FP8 weights (e4m3) under floating activations.

Lives here: the modules and their buffers. Not here: the products and their kernels (ops/matmul.py,
ops/experts.py), layers of FP4 (fp4_linear.py), of INT4 and INT8 (nn.py), files (formats/).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .nn import Stored, as_autocast, require_bias, require_floating, require_tensors
from .ops import dequantize, matmul_experts, matmul_fp8_bf16_tn
from .ops._library import FLOATS
from .ops.problem import GROUP_STEP
from .side_by_side import Movable

FP8 = "fp8"
CODES = torch.float8_e4m3fn
_ROWS = 1024


def has_nan(codes: Tensor) -> bool:
    """Whether one of the two codes that are no number is among these."""
    # Few rows at a time, which stay in a CPU's cache: 18 GB/s a core, and 0.7 with all of them.
    rows = codes.view(torch.uint8).flatten(0, -2).split(_ROWS // 4)
    return any(int((octets & 0x7F).max()) == 0x7F for octets in rows if octets.numel())


class Fp8Layer(Stored):
    """What layers of FP8 weights share: their buffers, the checks of them, and decoding."""

    kind = FP8
    kept = ("weight", "scales")
    sizes: ClassVar[tuple[str, ...]]  # names of those of a weight, but for the last
    weight: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        name = type(self).__name__
        require_tensors(name, weight=weight, scales=scales)
        if weight.dim() != len(self.sizes) + 1 or weight.dtype != CODES:
            raise TypeError(
                f"{name}: weight is {weight.dtype} {tuple(weight.shape)}; expected float8_e4m3fn "
                f"[{', '.join(self.sizes)}, K]"
            )
        if scales.dtype not in FLOATS:
            raise TypeError(f"{name}: scales are {scales.dtype}; expected fp32, bf16 or fp16")
        super().__init__()
        self.out_features, self.in_features = weight.shape[-2:]
        self._check_groups(weight, scales)
        if not weight.is_meta and has_nan(weight):
            raise ValueError(f"{name}: weight holds a NaN, which its products would not show")
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    def _check_groups(self, weight: Tensor, scales: Tensor) -> None:
        name, k = type(self).__name__, self.in_features
        groups = scales.shape[-1] if scales.dim() == weight.dim() else 0
        if groups < 1 or scales.shape[:-1] != weight.shape[:-1]:
            own = [f"{of}={size}" for of, size in zip(self.sizes, weight.shape, strict=False)]
            raise ValueError(
                f"{name}: scales has shape {tuple(scales.shape)}; expected "
                f"[{', '.join(self.sizes)}, K/group_size] with {', '.join(own)}, K={k}"
            )
        if k % groups or (groups > 1 and k // groups % GROUP_STEP):
            raise ValueError(
                f"{name}: {groups} scales a row of K={k}; expected one, or one for each group of "
                f"a multiple of {GROUP_STEP} columns"
            )

    @property
    def group_size(self) -> int:
        """How many k share a scale."""
        return self.in_features // self.scales.shape[-1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight: float32 arithmetic, then one rounding to ``dtype``."""
        codes, scales = self.weight.flatten(0, -2), self.scales.flatten(0, -2)
        dense = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        # In blocks of rows: the steps of a whole vocabulary would be several times its size.
        for start in range(0, len(codes), _ROWS):
            rows = slice(start, start + _ROWS)
            dense[rows] = dequantize(codes[rows], scales[rows], dtype=dtype)
        return dense.view(self.weight.shape)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, scheme=fp8a16, "
            f"group_size={self.group_size}"
        )


class Fp8Linear(Movable, Fp8Layer):
    """y = x @ w.T + bias with w[n, k] = e4m3(q[n, k]) * scales[n, k // group_size].

    ``weight``: codes, float8_e4m3fn [N, K]. ``scales``: fp32, bf16 or fp16 [N, K/group_size], with
    one group or groups of a multiple of 16 columns; scales of blocks are repeated for each row.
    ``bias``: floating [N] or None. x is fp32, bf16 or fp16 [..., K], and y of its dtype, or of
    autocast's where that is on. All tensors are buffers, so that `state_dict` holds exactly the
    layer, and no cast of the model changes the dtype of weight and scales.

    Activations are never quantised, as in a file that was made for FP8 activations too: more exact
    than that, on any GPU. The sum, the bias with it, is rounded once.

    Raises ValueError or TypeError for shapes and dtypes that do not fit, and ValueError for codes
    that are NaN.

    >>> codes = torch.tensor([[1.0, -2.0] * 8]).to(torch.float8_e4m3fn)
    >>> layer = Fp8Linear(codes, torch.tensor([[0.5]]), bias=torch.tensor([1.0]))
    >>> layer(torch.ones(16))
    tensor([-3.])
    """

    sizes = ("N",)
    bias: Tensor | None

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, scales)
        require_bias(self, bias, self.out_features)
        self.register_buffer("bias", bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that nn.Linear has)
        x = as_autocast(input)
        require_floating(self, x)
        return matmul_fp8_bf16_tn(x, self.weight, self.scales, bias=self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"


class Fp8ExpertLinear(Fp8Layer):
    """A linear of every expert of a mixture: `Fp8Linear`s, stacked.

    ``weight`` [experts, N, K], ``scales`` [experts, N, K/group_size], otherwise as in `Fp8Linear`.
    Called as an `IntExpertLinear` is: with tokens [T, K] sorted by expert, where the tokens of each
    expert end, and biases [experts, N], if there are any; or with tokens in any order, and
    ``rows``: which of them each expert has, one expert after the other (see `matmul_experts`).

    Raises ValueError or TypeError for shapes and dtypes that do not fit, and ValueError for codes
    that are NaN.

    >>> codes = torch.ones(2, 1, 16).to(torch.float8_e4m3fn)
    >>> layer = Fp8ExpertLinear(codes, torch.tensor([[[0.5]], [[1.0]]]))
    >>> layer(torch.ones(3, 16), ends=torch.tensor([1, 3])).tolist()
    [[8.0], [16.0], [16.0]]
    """

    sizes = ("experts", "N")

    def forward(
        self, x: Tensor, ends: Tensor, bias: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        require_floating(self, x)
        return matmul_experts(
            x if rows is None else x[rows], self.weight, self.scales, ends=ends, bias=bias
        )

    def extra_repr(self) -> str:
        return f"experts={self.weight.shape[0]}, {super().extra_repr()}"
