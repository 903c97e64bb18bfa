"""Fast, exact INT4/INT8 inference and training for PyTorch, in pure Python.

Importing this package registers the `torch.ops.intlass` ops; it needs neither CUDA nor CuPy.
"""

from typing import TYPE_CHECKING, Any

from . import ops
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
from .nn import IntLinear
from .ops import (
    dequantize,
    matmul_int4_bf16_tn,
    matmul_int8_bf16_tn,
    pack_int4,
    quantize_int4,
    quantize_int8,
    unpack_int4,
)
from .quantize import (
    Int4DynamicActivationInt4Weight,
    Int4WeightOnly,
    Int8DynamicActivationInt4Weight,
    Int8DynamicActivationInt8Weight,
    Int8WeightOnly,
    Scheme,
    quantize_,
)

if TYPE_CHECKING:
    from .lowering import disable, enable

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "Dispatch",
    "Explanation",
    "FallbackError",
    "Int4DynamicActivationInt4Weight",
    "Int4WeightOnly",
    "Int8DynamicActivationInt4Weight",
    "Int8DynamicActivationInt8Weight",
    "Int8WeightOnly",
    "IntLinear",
    "IntlassError",
    "KernelCompileError",
    "KernelLaunchError",
    "KernelNotReadyError",
    "Scheme",
    "availability",
    "dequantize",
    "disable",
    "enable",
    "explain",
    "matmul_int4_bf16_tn",
    "matmul_int8_bf16_tn",
    "ops",
    "pack_int4",
    "quantize_",
    "quantize_int4",
    "quantize_int8",
    "strict",
    "unpack_int4",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """`enable` and `disable` bring Inductor, which takes seconds to import: on first use."""
    if name in ("enable", "disable"):
        from . import lowering

        return getattr(lowering, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
