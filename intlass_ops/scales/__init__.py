"""Block scales for weights in NVFP4, MXFP4, INT4, INT8 and unsigned INT4: from the largest
magnitude (`*_naive`), of least error (`*_optimal`), of least output error (`*_optimal_hessian`).

Each takes ``w`` (float, any shape), cuts ``dim`` into blocks of ``group_size`` and returns

    (scales, codes)         scales [..., K/group_size], codes like w, unpacked
    (scales, zeros, codes)  from uint4_*, the asymmetric form; zeros int32 in [0, 15]

with the dequantised tensor (w's dtype) appended where return_dequant is set.

    format   codes                     scales           ŵ
    nvfp4    e2m1 in uint8, 0 … 15     float8_e4m3fn    decode(codes) · scales / global_scale
    mxfp4    e2m1 in uint8, 0 … 15     float8_e8m0fnu   decode(codes) · scales
    int4     int8 in [-7, 7]           float32          codes · scales
    int8     int8 in [-127, 127]       float32          codes · scales
    uint4    uint8 in [0, 15]          float32          (codes - zeros) · scales

`*_optimal` minimises Σ (w - ŵ)² of each block, or Σ weights·(w - ŵ)² with ``weights`` >= 0 that
broadcast to w (a diagonal Hessian). `*_optimal_hessian` minimises rᵀ H_j r over the residuals r of
block j, with H_j = X_jᵀ X_j the block of the Gram matrix of the layer's inputs ``X`` [..., K], or
given as ``hessian`` [K/group_size, group_size, group_size]. Both find the best scale there is
(integer scales: to float32 resolution; e8m0: up to 2^125, above which a code may decode beyond
float32), rounding is to nearest even, and no block is ever worse than under `*_naive`.
A block of zeros gets scale 1. A block with an infinity or a NaN gets a scale that is not finite, so
that it cannot pass for numbers.

floating.py has the FP4 formats, integer.py the others, goal.py what they share. How the searches
work: ../scale_search.py.
"""

from __future__ import annotations

from .floating import (
    mxfp4_dequantize,
    mxfp4_naive,
    mxfp4_optimal,
    mxfp4_optimal_hessian,
    nvfp4_dequantize,
    nvfp4_global_scale,
    nvfp4_naive,
    nvfp4_optimal,
    nvfp4_optimal_hessian,
)
from .goal import (
    block_hessians,
)
from .integer import (
    int4_dequantize,
    int4_naive,
    int4_optimal,
    int4_optimal_hessian,
    int8_dequantize,
    int8_naive,
    int8_optimal,
    int8_optimal_hessian,
    uint4_dequantize,
    uint4_naive,
    uint4_optimal,
    uint4_optimal_hessian,
)

__all__ = [
    "block_hessians",
    "int4_dequantize",
    "int4_naive",
    "int4_optimal",
    "int4_optimal_hessian",
    "int8_dequantize",
    "int8_naive",
    "int8_optimal",
    "int8_optimal_hessian",
    "mxfp4_dequantize",
    "mxfp4_naive",
    "mxfp4_optimal",
    "mxfp4_optimal_hessian",
    "nvfp4_dequantize",
    "nvfp4_global_scale",
    "nvfp4_naive",
    "nvfp4_optimal",
    "nvfp4_optimal_hessian",
    "uint4_dequantize",
    "uint4_naive",
    "uint4_optimal",
    "uint4_optimal_hessian",
]
