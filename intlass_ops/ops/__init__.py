"""The `torch.ops.intlass` ops, one file a family; importing this registers them."""

from .dequantize import dequantize
from .matmul import matmul_int4_bf16_tn, matmul_int8_bf16_tn
from .packing import pack_int4, unpack_int4
from .quantize import quantize_int4, quantize_int8

__all__ = [
    "dequantize",
    "matmul_int4_bf16_tn",
    "matmul_int8_bf16_tn",
    "pack_int4",
    "quantize_int4",
    "quantize_int8",
    "unpack_int4",
]
