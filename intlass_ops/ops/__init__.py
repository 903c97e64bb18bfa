"""The `torch.ops.intlass` ops, one file a family; importing this registers them."""

from . import fused_quantize as _fused_quantize  # noqa: F401 (registers its op)
from . import training as _training  # noqa: F401 (registers its ops)
from .block_scaled import (
    matmul_ada_mxf4_bf16_tn,
    matmul_mxf4_bf16_tn,
    matmul_mxf8_bf16_nn,
    matmul_mxf8_bf16_tn,
    matmul_nvf4_bf16_tn,
)
from .dequantize import dequantize
from .experts import matmul_experts
from .matmul import matmul_fp8_bf16_tn, matmul_int4_bf16_tn, matmul_int8_bf16_tn
from .matmul_lut4 import matmul_lut4_bf16_tn
from .mixed_mm import mixed_mm
from .packing import pack_int4, unpack_int4
from .quantize import quantize_int4, quantize_int8
from .quantize_after import rms_norm_quantize, silu_mul_quantize

__all__ = [
    "dequantize",
    "matmul_ada_mxf4_bf16_tn",
    "matmul_experts",
    "matmul_fp8_bf16_tn",
    "matmul_int4_bf16_tn",
    "matmul_int8_bf16_tn",
    "matmul_lut4_bf16_tn",
    "matmul_mxf4_bf16_tn",
    "matmul_mxf8_bf16_nn",
    "matmul_mxf8_bf16_tn",
    "matmul_nvf4_bf16_tn",
    "mixed_mm",
    "pack_int4",
    "quantize_int4",
    "quantize_int8",
    "rms_norm_quantize",
    "silu_mul_quantize",
    "unpack_int4",
]
