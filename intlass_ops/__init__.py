"""Fast, exact INT4/INT8 inference and training for PyTorch, in pure Python.

Importing this package registers the `torch.ops.intlass` ops; it needs neither CUDA nor CuPy.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import calibrate, ops
from .batch_invariance import batch_invariant
from .cuda.jit import availability, warmup
from .errors import (
    BackendUnavailableError,
    FallbackError,
    IntlassError,
    KernelCompileError,
    KernelLaunchError,
    KernelNotReadyError,
)
from .explain import Dispatch, Explanation, explain, strict
from .fp4 import from_blocked, to_blocked
from .fp4_linear import Fp4ExpertLinear, Fp4Linear
from .fp8_linear import Fp8ExpertLinear, Fp8Linear
from .fused_quantize import (
    fused_quantize_int4,
    fused_quantize_int8,
    fused_quantize_mx,
    fused_quantize_nv,
)
from .gptq import gptq
from .lut4_linear import Lut4Linear
from .nn import IntExpertLinear, IntLinear
from .ops import (
    dequantize,
    matmul_ada_mxf4_bf16_tn,
    matmul_experts,
    matmul_fp8_bf16_tn,
    matmul_int4_bf16_tn,
    matmul_int8_bf16_tn,
    matmul_lut4_bf16_tn,
    matmul_mxf4_bf16_tn,
    matmul_mxf8_bf16_nn,
    matmul_mxf8_bf16_tn,
    matmul_nvf4_bf16_tn,
    mixed_mm,
    pack_int4,
    quantize_int4,
    quantize_int8,
    rms_norm_quantize,
    silu_mul_quantize,
    unpack_int4,
)
from .qat import QATConfig, QATLinear, RotatedIntLinear, convert_
from .quantize import (
    Int4DynamicActivationInt4Weight,
    Int4WeightOnly,
    Int8DynamicActivationInt4Weight,
    Int8DynamicActivationInt8Weight,
    Int8WeightOnly,
    Scheme,
    quantize_,
)
from .rotation import hadamard_matrix, hadamard_transform, rotate
from .scales import (
    int4_dequantize,
    int4_naive,
    int4_optimal,
    int4_optimal_hessian,
    int8_dequantize,
    int8_naive,
    int8_optimal,
    int8_optimal_hessian,
    mxfp4_dequantize,
    mxfp4_naive,
    mxfp4_optimal,
    mxfp4_optimal_hessian,
    nvfp4_dequantize,
    nvfp4_naive,
    nvfp4_optimal,
    nvfp4_optimal_hessian,
    uint4_dequantize,
    uint4_naive,
    uint4_optimal,
    uint4_optimal_hessian,
)

if TYPE_CHECKING:
    from .integrations.load_pretrained import load_pretrained
    from .integrations.rotate_llama import rotate_llama_
    from .integrations.transformers_quantizer import IntlassConfig, save_pretrained
    from .lowering import Decision, clear_report, disable, enable, refresh, report
    from .prepare import prepare_

# Bring Inductor or transformers, which take seconds to import: on first use.
_LAZY = {
    "Decision": "lowering",
    "IntlassConfig": "integrations.transformers_quantizer",
    "clear_report": "lowering",
    "disable": "lowering",
    "enable": "lowering",
    "load_pretrained": "integrations.load_pretrained",
    "prepare_": "prepare",
    "refresh": "lowering",
    "report": "lowering",
    "rotate_llama_": "integrations.rotate_llama",
    "save_pretrained": "integrations.transformers_quantizer",
}

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "Decision",
    "Dispatch",
    "Explanation",
    "FallbackError",
    "Fp4ExpertLinear",
    "Fp4Linear",
    "Fp8ExpertLinear",
    "Fp8Linear",
    "Int4DynamicActivationInt4Weight",
    "Int4WeightOnly",
    "Int8DynamicActivationInt4Weight",
    "Int8DynamicActivationInt8Weight",
    "Int8WeightOnly",
    "IntExpertLinear",
    "IntLinear",
    "IntlassConfig",
    "IntlassError",
    "KernelCompileError",
    "KernelLaunchError",
    "KernelNotReadyError",
    "Lut4Linear",
    "QATConfig",
    "QATLinear",
    "RotatedIntLinear",
    "Scheme",
    "availability",
    "batch_invariant",
    "calibrate",
    "clear_report",
    "convert_",
    "dequantize",
    "disable",
    "enable",
    "explain",
    "from_blocked",
    "fused_quantize_int4",
    "fused_quantize_int8",
    "fused_quantize_mx",
    "fused_quantize_nv",
    "gptq",
    "hadamard_matrix",
    "hadamard_transform",
    "int4_dequantize",
    "int4_naive",
    "int4_optimal",
    "int4_optimal_hessian",
    "int8_dequantize",
    "int8_naive",
    "int8_optimal",
    "int8_optimal_hessian",
    "load_pretrained",
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
    "mxfp4_dequantize",
    "mxfp4_naive",
    "mxfp4_optimal",
    "mxfp4_optimal_hessian",
    "nvfp4_dequantize",
    "nvfp4_naive",
    "nvfp4_optimal",
    "nvfp4_optimal_hessian",
    "ops",
    "pack_int4",
    "prepare_",
    "quantize_",
    "quantize_int4",
    "quantize_int8",
    "refresh",
    "report",
    "rms_norm_quantize",
    "rotate",
    "rotate_llama_",
    "save_pretrained",
    "silu_mul_quantize",
    "strict",
    "to_blocked",
    "uint4_dequantize",
    "uint4_naive",
    "uint4_optimal",
    "uint4_optimal_hessian",
    "unpack_int4",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        try:
            module = importlib.import_module(f".{_LAZY[name]}", __name__)
        except ModuleNotFoundError as error:
            if not _LAZY[name].startswith("integrations") or str(error.name).startswith(__name__):
                raise
            raise ImportError(
                f"intlass_ops.{name} needs {error.name}: pip install 'intlass-ops[demo]'"
            ) from error
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
