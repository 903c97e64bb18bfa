"""Linear modules whose weight a graph does not show, or shows only in part, for `prepare_`.

`MODULES` maps "library: scheme" to a maker of (linear, input, its exact output in float64 terms of
the library's own dequantised weight). GPTQ and AWQ modules hold tensors in the published layouts
and refuse to run, as the libraries' modules do without their CUDA extensions; the others are the
libraries' own. A missing library raises ImportError from the maker.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

N, K, GROUP = 64, 128, 32
Case = tuple[nn.Module, Tensor, Tensor]


def _words(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Codes packed lowest first along dim into int32."""
    per = 32 // bits
    blocks = codes.long().movedim(dim, -1).unflatten(-1, (-1, per))
    words = (blocks << (torch.arange(per) * bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int().movedim(-1, dim)


class HiddenKernel(nn.Module):
    def __init__(self, **state: Any) -> None:
        super().__init__()
        for name, value in state.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("this kernel needs a CUDA extension")


def _random(bits: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [K, N], z [G, N], s [G, N], x."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 1 << bits, (K, N), generator=g)
    z = torch.randint(0, 1 << bits, (K // GROUP, N), generator=g)
    s = (torch.rand(K // GROUP, N, generator=g) * 0.02 + 0.01).half()
    return q, z, s, torch.randn(5, K, generator=g).half()


def _gptq(bits: int, version: int, act_order: bool) -> Callable[[], Case]:
    def make() -> Case:
        q, z, s, x = _random(bits)
        g = torch.Generator().manual_seed(1)
        index = torch.arange(K) // GROUP
        index = index[torch.randperm(K, generator=g)] if act_order else index
        module = HiddenKernel(
            qweight=_words(q, bits, 0),
            qzeros=_words(z, bits, 1) - (2 - version) * _words(torch.ones_like(z), bits, 1),
            scales=s,
            g_idx=index.int(),
            bits=bits,
            infeatures=K,
            outfeatures=N,
            bias=torch.randn(N, generator=g).half(),
            qzero_format=version,
        )
        w = (q - z[index]) * s.double()[index]
        return module, x, x.double() @ w + module.bias.double()

    return make


def _awq() -> Case:
    q, z, s, x = _random(4, seed=2)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def words(codes: Tensor) -> Tensor:
        return _words(codes.unflatten(1, (-1, 8))[..., order].flatten(1), 4, 1)

    module = HiddenKernel(
        qweight=words(q), qzeros=words(z), scales=s, w_bit=4, in_features=K, out_features=N
    )
    w = (q - z.repeat_interleave(GROUP, 0)) * s.double().repeat_interleave(GROUP, 0)
    return module, x, x.double() @ w


def _compressed(weights: dict[str, Any], inputs: dict[str, Any] | None) -> Callable[[], Case]:
    def make() -> Case:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationConfig,
            QuantizationScheme,
            apply_quantization_config,
        )
        from compressed_tensors.quantization.utils import calculate_qparams

        scheme = QuantizationScheme(
            targets=["Linear"], weights=weights, input_activations=inputs or None
        )
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(K, N).bfloat16())
        apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}))
        linear: Any = model[0]
        groups = linear.weight_scale.shape[1]
        w = linear.weight.detach().view(N, groups, -1).float()
        scale, zero = calculate_qparams(w.amin(-1), w.amax(-1), scheme.weights)
        linear.weight_scale.data.copy_(scale)
        if hasattr(linear, "weight_zero_point"):
            linear.weight_zero_point.data.copy_(zero)
        if hasattr(linear, "input_scale"):
            linear.input_scale.data.fill_(0.03)
        x = torch.randn(1, 5, K).bfloat16()
        expected = model(x).double()
        quiet = contextlib.redirect_stderr(io.StringIO())
        with quiet:
            ModelCompressor.from_pretrained_model(model).compress_model(model)
        return linear, x, expected

    return make


def _compressed_fp8(strategy: str, **more: Any) -> Callable[[], Case]:
    """Weights alone; the state that `ModelCompressor` leaves, which no forward reads."""

    def make() -> Case:
        from compressed_tensors.quantization import QuantizationScheme

        weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **more}
        whole = N if strategy == "tensor" else 1, more.get("group_size", K)
        rows, columns = more.get("block_structure", whole)
        q, s, x = _random_fp8(rows, columns, torch.bfloat16)
        if strategy == "group":  # MXFP8
            exponents = s.float().log2().floor()
            s, stored = exponents.exp2(), (exponents + 127).to(torch.uint8)
        else:
            stored = s.flatten() if s.numel() == 1 else s
        module = nn.Linear(K, N).bfloat16()
        bias = module.bias.detach().double()
        module.weight = nn.Parameter(q, requires_grad=False)
        module.weight_scale = nn.Parameter(stored, requires_grad=False)
        module.quantization_scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        return module, x, x.double() @ _times(q, s, rows, columns).t() + bias

    return make


def _random_fp8(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, K], a scale for each block of it, x."""
    g = torch.Generator().manual_seed(10)
    q = (torch.randn(N, K, generator=g) * 80).to(torch.float8_e4m3fn)
    s = (torch.rand(-(-N // rows), -(-K // columns), generator=g) * 0.001 + 0.0001).to(dtype)
    return q, s, torch.randn(5, K, generator=g).bfloat16()


def _times(q: Tensor, s: Tensor, rows: int, columns: int) -> Tensor:
    spread = s.double().repeat_interleave(rows, 0)[:N].repeat_interleave(columns, 1)[:, :K]
    return q.double() * spread


class PlainFp8(nn.Module):
    """A hand-written FP8 linear, scales of blocks of 32 x 64 as in DeepSeek's reference code."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = K, N
        q, s, _ = _random_fp8(32, 64, torch.float32)
        self.weight = nn.Parameter(q, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(s)

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.weight.float().unflatten(0, (-1, 32)).unflatten(-1, (-1, 64))
        w = (blocks * self.weight_scale_inv[:, None, :, None]).reshape(N, K)
        return nn.functional.linear(x, w.to(x.dtype))


def _plain_fp8() -> Case:
    module, (q, s, x) = PlainFp8(), _random_fp8(32, 64, torch.float32)
    return module, x, x.double() @ _times(q, s, 32, 64).t()


def fp8_linear_of_transformers(block: tuple[int, int] | None = (32, 64)) -> Case:
    """Its activations are quantised by the kernel that it calls; the output is without that."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    rows, columns = block or (N, K)
    q, s, x = _random_fp8(rows, columns, torch.float32)
    module = FP8Linear(K, N, block_size=block)
    module.weight = nn.Parameter(q, requires_grad=False)
    module.weight_scale_inv = nn.Parameter(s if block else s.reshape(()))
    return module, x, x.double() @ _times(q, s, rows, columns).t()


def _gguf(name: str) -> Callable[[], Case]:
    def make() -> Case:
        import gguf
        from transformers.integrations.gguf.utils import GGML_BLOCK, GgufLinear

        kind = gguf.GGMLQuantizationType[name]
        if kind not in GGML_BLOCK:
            raise ImportError(f"this transformers has no linears in {name}")
        w = torch.randn(N, 256, generator=torch.Generator().manual_seed(4)) / 16
        if name.endswith("K"):
            g = torch.Generator().manual_seed(5)
            size = gguf.GGML_QUANT_SIZES[kind][1]
            blocks = torch.randint(0, 256, (N, size), generator=g).to(torch.uint8)
            half = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
            for at in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[name]:
                blocks[:, at : at + 2] = half
        else:
            blocks = torch.from_numpy(gguf.quantize(w.numpy(), kind))
        module = GgufLinear(256, N, int(kind), bias=True)
        module.weight.data.copy_(blocks)
        module.bias.data.normal_()
        real = torch.from_numpy(gguf.dequantize(blocks.numpy(), kind)).double()
        x = torch.randn(5, 256).bfloat16()
        return module, x, x.double() @ real.t() + module.bias.double()

    return make


def _bitsandbytes(kind: str, double: bool) -> Callable[[], Case]:
    """Against the weight before it is rounded to its dtype, which ours never is."""

    def make() -> Case:
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Linear4bit, Params4bit

        g = torch.Generator().manual_seed(12)
        module = Linear4bit(K, N)
        w = torch.randn(N, K, generator=g).bfloat16()
        module.weight = Params4bit(w, quant_type=kind, compress_statistics=double)
        module.bias.data = torch.randn(N, generator=g).bfloat16()
        module = module.to("cpu")
        state, x = module.weight.quant_state, torch.randn(5, K, generator=g).bfloat16()
        dtype, state.dtype = state.dtype, torch.float32
        real, state.dtype = dequantize_4bit(module.weight.data, state), dtype
        return module, x, x.double() @ real.double().t() + module.bias.detach().double()

    return make


def _bitlinear() -> Case:
    from transformers.integrations.bitnet import BitLinear, pack_weights

    g = torch.Generator().manual_seed(6)
    q = torch.randint(-1, 2, (N, K), generator=g)
    module = BitLinear(K, N, bias=True, dtype=torch.float32)
    module.weight.copy_(pack_weights(q.float()))
    module.weight_scale.fill_(3.0)
    module.bias.normal_(generator=g)
    x = torch.randn(5, K, generator=g)
    scale = 127 / x.abs().amax(-1, keepdim=True)
    codes = (x * scale).round().clamp(-128, 127)
    return module, x, (codes.double() @ q.double().t()) / (scale * 3.0) + module.bias.double()


def _gemma(bits: int) -> Callable[[], Case]:
    def make() -> Case:
        from transformers.integrations.gemma_quant import QuantizedLinear

        g = torch.Generator().manual_seed(7)
        module = QuantizedLinear(K, N, bias=False, num_bits=bits)
        low, high = (-128, 128) if module.weight.dtype == torch.int8 else (0, 256)
        codes = torch.randint(low, high, tuple(module.weight.shape), generator=g)
        module.weight.data.copy_(codes.to(module.weight.dtype))
        module.weight_scale.data.uniform_(0.01, 0.02, generator=g)
        x = torch.randn(5, K, generator=g).bfloat16()
        return module, x, module(x).detach().double()

    return make


class GptFastInt8(nn.Module):
    """The weight-only int8 linear of gpt-fast: the scale comes after the product."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = K, N
        g = torch.Generator().manual_seed(8)
        codes = torch.randint(-127, 128, (N, K), generator=g)
        self.register_buffer("weight", codes.to(torch.int8))
        self.register_buffer("scales", (torch.rand(N, generator=g) * 0.01).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(dtype=x.dtype)) * self.scales


def _gpt_fast() -> Case:
    module = GptFastInt8()
    x = torch.randn(5, K).bfloat16()
    return module, x, x.double() @ (module.weight.double() * module.scales.double()[:, None]).t()


class SinqLinear(nn.Module):
    """SINQ's product in PyTorch: groups along K, halves of them in one byte, a second scale along
    K."""

    def __init__(self, **state: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = K, N
        for name, value in state.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        q = torch.cat([self.W_q >> 4, self.W_q & 15]).to(x.dtype)
        w = ((q - self.zero) * self.scale).view(N, K) * self.scale2
        return torch.matmul(x, w.t()) + self.bias


def _sinq() -> Case:
    g = torch.Generator().manual_seed(9)
    q = torch.randint(0, 16, (N * K // GROUP, GROUP), generator=g).to(torch.uint8)
    high, low = q.chunk(2)
    s, z, c, bias = (
        torch.rand(shape, generator=g).half() for shape in (((len(q), 1),) * 2 + ((1, K), (N,)))
    )
    module = SinqLinear(W_q=(high << 4) | low, scale=s / 50, zero=z * 15, scale2=c + 0.5, bias=bias)
    x = torch.randn(5, K, generator=g).half()
    w = ((q - module.zero.double()) * module.scale.double()).view(N, K) * module.scale2.double()
    return module, x, x.double() @ w.t() + bias.double()


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
_INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
_STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True}

MODULES: dict[str, tuple[Callable[[], Case], str]] = {
    "GPTQ: 4-bit v1": (_gptq(4, 1, False), "w4a16"),
    "GPTQ: 4-bit v2": (_gptq(4, 2, False), "w4a16"),
    "GPTQ: 4-bit v1, act-order": (_gptq(4, 1, True), "w4a16"),
    "GPTQ: 8-bit v1": (_gptq(8, 1, False), "w8a16"),
    "AWQ: GEMM": (_awq, "w4a16"),
    "compressed-tensors: W4A16 symmetric": (
        _compressed({**_INT4, "symmetric": True}, None),
        "w4a16",
    ),
    "compressed-tensors: W4A16 asymmetric": (
        _compressed({**_INT4, "symmetric": False}, None),
        "w4a16",
    ),
    "compressed-tensors: W8A16": (_compressed(_INT8, None), "w8a16"),
    "compressed-tensors: W8A8 dynamic": (_compressed(_INT8, _TOKEN), "w8a8"),
    "compressed-tensors: W8A8 static": (_compressed(_INT8, _STATIC), "w8a8"),
    "compressed-tensors: W4A8": (_compressed({**_INT4, "symmetric": True}, _TOKEN), "w4a8"),
    "compressed-tensors: FP8 per channel": (_compressed_fp8("channel"), "fp8a16"),
    "compressed-tensors: FP8 per tensor": (_compressed_fp8("tensor"), "fp8a16"),
    "compressed-tensors: MXFP8": (_compressed_fp8("group", group_size=32), "fp8a16"),
    "compressed-tensors: FP8 in blocks": (
        _compressed_fp8("block", block_structure=[32, 64]),
        "fp8a16",
    ),
    "FP8 in blocks, by hand": (_plain_fp8, "fp8a16"),
    "bitsandbytes: NF4": (_bitsandbytes("nf4", False), "nf4a16"),
    "bitsandbytes: NF4, double quantisation": (_bitsandbytes("nf4", True), "nf4a16"),
    "bitsandbytes: FP4": (_bitsandbytes("fp4", False), "bnbfp4a16"),
    "GGUF: Q4_0": (_gguf("Q4_0"), "w4a16"),
    "GGUF: Q4_1": (_gguf("Q4_1"), "w4a16"),
    "GGUF: Q8_0": (_gguf("Q8_0"), "w8a16"),
    "GGUF: Q4_K": (_gguf("Q4_K"), "w4a16"),
    "GGUF: Q5_K": (_gguf("Q5_K"), "w8a16"),
    "GGUF: Q6_K": (_gguf("Q6_K"), "w8a16"),
    "transformers: BitLinear": (_bitlinear, "w4a8"),
    "transformers: gemma int4": (_gemma(4), "w4a16"),
    "transformers: gemma int8": (_gemma(8), "w8a16"),
    "SINQ: 4-bit": (_sinq, "w4a16"),
    "gpt-fast: int8 weight-only": (_gpt_fast, "w8a16"),
}
