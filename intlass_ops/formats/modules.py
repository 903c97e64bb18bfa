"""Quantised linears of other libraries whose own forward hides the weight from a graph.

Lives here: `spelled_out`, which recognises a module by the tensors it holds and gives a stand-in
with the same numbers and an ordinary PyTorch forward: unpack, dequantise, multiply. What the
stand-in computes is then read, proved and packed like any other graph (prepare.py). Not here:
modules whose own forward says it all.

Layouts: GPTQ `qweight` int32 [K * b / 32, N], `qzeros` int32 [G, N * b / 32], `scales` [G, N],
`g_idx` [K]; AWQ `qweight` int32 [K, N / 8] in the order 0 2 4 6 1 3 5 7, `qzeros` [G, N / 8],
`scales` [G, N]; compressed-tensors `weight_packed` int32 [N, ceil(K * b / 32)] (codes + 2^(b-1)),
`weight_scale` [N, G], `weight_zero_point` packed along N, `weight_g_idx`; GGUF blocks as bytes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .gptq import second_version


def _fields(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n] to its 32 / bits fields, lowest first: [..., n, 32 / bits]."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)


def _awq_fields(words: Tensor) -> Tensor:
    """Nibble i holds channel (0, 2, 4, 6, 1, 3, 5, 7)[i]: two halves, interleaved."""
    halves: Tensor = _fields(words, 4).unflatten(-1, (2, 4))
    return halves.transpose(-1, -2).flatten(-2)


class _StandIn(nn.Module):
    """Holds the module it stands for; its tensors stay where they are."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module


class _Gptq(_StandIn):
    """scales[g_idx] * (q - z): z is stored minus one in the first version of the format."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        version = getattr(module, "qzero_format", None)
        self.version = 2 if (version() if callable(version) else version) == 2 else 1

    def forward(self, x: Tensor) -> Tensor:
        m = self.module
        bits, (groups, n) = m.bits, m.scales.shape
        q = _fields(m.qweight, bits).transpose(1, 2).reshape(-1, n)  # [K, N]
        words = m.qzeros if self.version == 2 else second_version(m.qzeros, bits)
        z = _fields(words, bits).reshape(groups, n)
        if getattr(m, "g_idx", None) is not None:
            g = m.g_idx.long()
            w = (q - z.index_select(0, g)).to(x.dtype) * m.scales.index_select(0, g).to(x.dtype)
        else:
            grouped = q.view(groups, -1, n) - z.unsqueeze(1)
            w = (grouped.to(x.dtype) * m.scales.to(x.dtype).unsqueeze(1)).view(-1, n)
        return _plus(x @ w, m)


class _Awq(_StandIn):
    def forward(self, x: Tensor) -> Tensor:
        m = self.module
        groups, n = m.scales.shape
        q = _awq_fields(m.qweight).reshape(groups, -1, n)
        z = _awq_fields(m.qzeros).reshape(groups, 1, n)
        w = (q - z).to(x.dtype) * m.scales.to(x.dtype).unsqueeze(1)
        return _plus(x @ w.view(-1, n), m)


class _CompressedTensors(_StandIn):
    """Weight codes as stored; activations quantised by the library's own function."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.args = module.quantization_scheme.weights
        self.inputs = module.quantization_scheme.input_activations
        lifecycle = sys.modules.get("compressed_tensors.quantization.lifecycle.forward")
        self.quantize = getattr(lifecycle, "forward_quantize", None)
        packed = getattr(module, "weight_packed", None)
        self.n, self.k = module.weight.shape if packed is None else module.weight_shape.tolist()

    def forward(self, x: Tensor) -> Tensor:
        m, bits, dtype = self.module, self.args.num_bits, x.dtype
        if self.inputs is not None:
            x = self.quantize(m, x, "input", self.inputs)  # type: ignore[misc]
        scale = m.weight_scale.to(dtype)
        zero = getattr(m, "weight_zero_point", None)
        if hasattr(m, "weight_packed"):
            half = 1 << (bits - 1)
            q = _fields(m.weight_packed, bits).flatten(-2)[:, : self.k] - half
            if zero is not None:
                zero = _fields(zero.t(), bits).flatten(-2)[:, : self.n].t() - half
        else:
            q = m.weight
        order = getattr(m, "weight_g_idx", None)
        if order is not None and scale.dim() == 2 and scale.shape[1] > 1:
            g = order.long()
            shifted = q if zero is None else q - zero.index_select(1, g)
            w = shifted.to(dtype) * scale.index_select(1, g)
        else:
            shape = (self.n, -1, self.k // (scale.numel() // scale.shape[0]))
            w = q.view(shape)
            w = w if zero is None else w - zero.reshape(zero.shape[0], -1, 1)
            w = (w.to(dtype) * scale.reshape(scale.shape[0], -1, 1)).view(self.n, self.k)
        return _plus(x @ w.t(), m)


class _Gguf(_StandIn):
    def __init__(self, module: Any) -> None:
        super().__init__(module)
        package = type(module).__module__.rpartition(".")[0]
        self.dequantize = sys.modules[f"{package}.dequant"].dequantize

    def forward(self, x: Tensor) -> Tensor:
        m = self.module
        if m.input_permutation is not None:
            x = x.index_select(-1, m.input_permutation)
        n, k = m.out_features, m.in_features
        w = self.dequantize(m.weight.view(-1), m.ggml_type, x.dtype)
        return _plus(functional.linear(x, w.view(n, k)), m)


class _BitLinear(_StandIn):
    """transformers' BitLinear, whose own steps are compiled one by one already."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.unpack = sys.modules[type(module).__module__].unpack_weights

    def forward(self, x: Tensor) -> Tensor:
        m = self.module
        x = x if m.rms_norm is None else m.rms_norm(x)
        scale = 127 / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        codes = (x * scale).round().clamp(-128, 127).to(torch.int8)
        y = functional.linear(codes.to(x.dtype), self.unpack(m.weight, dtype=x.dtype))
        return _plus(y / (scale * m.weight_scale), m)


def _plus(y: Tensor, module: Any) -> Tensor:
    bias = getattr(module, "bias", None)
    return y if bias is None else y + bias.to(y.dtype)


def _is_gptq(m: Any) -> bool:
    return (
        all(hasattr(m, name) for name in ("qweight", "qzeros", "scales", "bits"))
        and m.bits in (2, 4, 8)
        and m.scales.shape[-1] == m.qweight.shape[-1]
    )


def _is_awq(m: Any) -> bool:
    return (
        all(hasattr(m, name) for name in ("qweight", "qzeros", "scales"))
        and getattr(m, "w_bit", getattr(m, "bits", 0)) == 4
        and m.scales.shape[-1] == 8 * m.qweight.shape[-1]
    )


def _is_compressed(m: Any) -> bool:
    args = getattr(getattr(m, "quantization_scheme", None), "weights", None)
    if getattr(args, "type", "int") != "int":  # FP4 in bytes of the same name
        return False
    packed = hasattr(m, "weight_packed") and getattr(args, "num_bits", 0) in (1, 2, 4, 8)
    plain = getattr(getattr(m, "weight", None), "dtype", None) == torch.int8
    return args is not None and hasattr(m, "weight_scale") and (packed or plain)


def _is_gguf(m: Any) -> bool:
    return hasattr(m, "ggml_type") and hasattr(m, "in_features")


def _is_bitlinear(m: Any) -> bool:
    unpack = hasattr(sys.modules.get(type(m).__module__), "unpack_weights")
    return type(m).__name__ == "BitLinear" and unpack and hasattr(m, "rms_norm")


# Which modules, and whether their own forward is worth a try first.
_STAND_INS: tuple[tuple[Callable[[Any], bool], Callable[[Any], nn.Module], bool], ...] = (
    (_is_compressed, _CompressedTensors, False),
    (_is_gguf, _Gguf, False),
    (_is_bitlinear, _BitLinear, False),
    (_is_gptq, _Gptq, True),
    (_is_awq, _Awq, True),
)


def spellings(module: nn.Module) -> list[Callable[[], nn.Module]]:
    """Makers of modules that compute what `module` does, the one to be tried first in front."""
    own: Callable[[], nn.Module] = lambda: module  # noqa: E731
    for matches, make, own_first in _STAND_INS:
        if matches(module):
            stand_in = functools.partial(make, module)
            return [own, stand_in] if own_first else [stand_in]
    return [own]


def input_size(module: nn.Module) -> int | None:
    """K of a linear, by the names libraries give it."""
    for name in ("in_features", "infeatures", "input_size", "in_feature"):
        value = getattr(module, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
