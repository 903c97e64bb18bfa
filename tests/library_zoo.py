"""Models quantised by the real libraries, for the lowering tests and benchmarks/lowering_table.py.

`LIBRARY` maps "library: scheme" to a maker of (model, input) and what becomes of its linears. A
missing library raises ImportError from the maker; nothing here knows about the lowering.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

IN, HIDDEN = 256, 128
DEVICE = "cpu"  # where makers put what `model.to` does not move
Case = tuple[nn.Module, Tensor]


@dataclass(frozen=True)
class Entry:
    make: Callable[[], Case]
    outcome: str  # what is expected of each of the two linears: "swapped" or "declined"
    scheme: str  # bits of weight and activation as packed


def mlp(dtype: torch.dtype = torch.bfloat16) -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, IN, bias=False))
    return model.to(dtype).eval(), torch.randn(32, IN).to(dtype)  # _int_mm wants > 16 on CUDA


def _torchao(config: Callable[[Any], Any]) -> Callable[[], Case]:
    def make() -> Case:
        import torchao.quantization as q

        model, x = mlp()
        q.quantize_(model, config(q))
        return model, x

    return make


def _granularity(name: str, *args: int) -> Any:
    import torchao.quantization.granularity as granularity

    return getattr(granularity, name)(*args)


def _intx(bits: int, group: int) -> Callable[[Any], Any]:
    return lambda q: q.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"), granularity=_granularity("PerGroup", group)
    )


def _hqq(bits: int, axis: int) -> Callable[[], Case]:
    def make() -> Case:
        from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

        model, x = mlp()
        HQQLinear.set_backend(HQQBackend.PYTORCH)
        for i in (0, 2):
            config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
            model[i] = HQQLinear(model[i], config, compute_dtype=x.dtype, device=DEVICE)
        return model, x

    return make


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """quanto::unpack: codes of 2 or 4 bits, those of the lowest bits in front."""
    return torch.cat([(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)])


def _bitsandbytes(kind: str, double: bool) -> Callable[[], Case]:
    def make() -> Case:
        from bitsandbytes.nn import Linear4bit

        model, x = mlp(torch.bfloat16)
        for name, linear in list(model.named_modules()):
            if isinstance(linear, nn.Linear):
                new = Linear4bit(
                    linear.in_features, linear.out_features, linear.bias is not None,
                    torch.bfloat16, double, kind,
                )  # fmt: skip
                new.load_state_dict(linear.state_dict())
                # In training mode: else it lays weights out for this CPU, if that has bfloat16.
                model.set_submodule(name, new.to("cpu").train())
        return model, x

    return make


def _quanto(weights: str, dtype: torch.dtype) -> Callable[[], Case]:
    def make() -> Case:
        from optimum import quanto
        from optimum.quanto.library.extensions import cpp

        # Else quanto's op on CPUs compiles two C++ files when it is first called: a minute.
        cpp.ext._lib = SimpleNamespace(unpack=_unpack)
        model, x = mlp(dtype)
        quanto.quantize(model, weights=getattr(quanto, weights))
        quanto.freeze(model)
        return model, x

    return make


def _pt2e(dynamic: bool) -> Callable[[], Case]:
    def make() -> Case:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            X86InductorQuantizer,
            get_default_x86_inductor_quantization_config,
        )

        model, x = mlp(torch.float32)
        # Before torch 2.13 only a strict export says which nodes were an nn.Linear, without which
        # torchao's quantiser finds none.
        exported = torch.export.export(model, (x,), strict=True).module()
        quantizer = X86InductorQuantizer()
        quantizer.set_global(get_default_x86_inductor_quantization_config(is_dynamic=dynamic))
        prepared = prepare_pt2e(exported, quantizer)
        prepared(x)
        return convert_pt2e(prepared), x

    return make


def _torchao_static(asymmetric: bool) -> Callable[[Any], Any]:
    def config(q: Any) -> Any:
        kind = q.MappingType.ASYMMETRIC if asymmetric else q.MappingType.SYMMETRIC
        return q.Int8StaticActivationInt8WeightConfig(
            act_quant_scale=torch.tensor([[0.03]], dtype=torch.bfloat16),
            act_quant_zero_point=torch.tensor([[7]], dtype=torch.int8) if asymmetric else None,
            granularity=_granularity("PerTensor"),
            act_mapping_type=kind,
        )

    return config


def _torchao_qat() -> Case:
    """Trained with fake quantisation, then converted."""
    import torchao.quantization as q
    from torchao.quantization.qat import QATConfig

    model, x = mlp()
    base = q.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=_granularity("PerGroup", 32)
    )
    q.quantize_(model, QATConfig(base, step="prepare"))
    with torch.enable_grad():
        model(x).float().sum().backward()
    q.quantize_(model, QATConfig(base, step="convert"))
    return model.eval().requires_grad_(False), x


def _torchao_tile_packed() -> Case:
    import torchao.quantization as q

    model, x = mlp()
    if DEVICE != "cuda":
        raise ImportError("this layout is packed on a GPU")
    packing = "tile_packed_to_4d"
    config = q.Int4WeightOnlyConfig(
        group_size=32, int4_packing_format=packing, set_inductor_config=False
    )
    q.quantize_(model.to(DEVICE), config)
    return model, x


def _torchao_float8_activations() -> Case:
    import torchao.quantization as q

    model, x = mlp()
    if DEVICE != "cuda":
        raise ImportError("torchao quantises so on a GPU only")
    granularity = _granularity("PerRow")
    config = q.Float8DynamicActivationFloat8WeightConfig(granularity=granularity)
    q.quantize_(model.to(DEVICE), config)
    return model, x


class PackedLinear(nn.Module):
    """compressed-tensors pack-quantized, decompressed inside the graph by the library itself."""

    def __init__(self, source: nn.Linear, group: int) -> None:
        super().__init__()
        from compressed_tensors.compressors import pack_to_int32

        w = source.weight.detach().float().view(source.out_features, -1, group)
        scale = w.abs().amax(-1, keepdim=True) / 7
        q = (w / scale).round().clamp(-8, 7).to(torch.int8).view(source.out_features, -1)
        self.shape = torch.Size(q.shape)
        self.register_buffer("packed", pack_to_int32(q, 4))
        self.register_buffer("scale", scale.to(source.weight.dtype))
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        from compressed_tensors.compressors import unpack_from_int32

        q = unpack_from_int32(self.packed, 4, self.shape).to(x.dtype)
        w = (q.view(self.shape[0], self.scale.shape[1], -1) * self.scale).view(self.shape)
        return nn.functional.linear(x, w, self.bias)


def _compressed_tensors() -> Case:
    model, x = mlp()
    model[0], model[2] = PackedLinear(model[0], 32), PackedLinear(model[2], 32)
    return model, x


LIBRARY: dict[str, Entry] = {
    "torchao: int8 weight-only per row": Entry(
        _torchao(lambda q: q.Int8WeightOnlyConfig()), "swapped", "w8a16"
    ),
    "torchao: int8 weight-only per tensor": Entry(
        _torchao(lambda q: q.Int8WeightOnlyConfig(granularity=_granularity("PerTensor"))),
        "swapped",
        "w8a16",
    ),
    "torchao: int8 weight-only group 64": Entry(
        _torchao(lambda q: q.Int8WeightOnlyConfig(granularity=_granularity("PerGroup", 64))),
        "swapped",
        "w8a16",
    ),
    "torchao: float8 weight-only per row": Entry(
        _torchao(lambda q: q.Float8WeightOnlyConfig()), "swapped", "fp8a16"
    ),
    "torchao: float8 dynamic activation, float8 weight": Entry(
        _torchao_float8_activations, "declined", "quantised"
    ),
    "torchao: intx int4 weight-only group 32": Entry(_torchao(_intx(4, 32)), "swapped", "w4a16"),
    "torchao: intx int8 weight-only group 64": Entry(_torchao(_intx(8, 64)), "swapped", "w8a16"),
    "torchao: int8 dynamic activation, int8 weight": Entry(
        _torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig()), "swapped", "w8a8"
    ),
    "torchao: int8 dynamic asymmetric activation, int8 weight": Entry(
        _torchao(
            lambda q: q.Int8DynamicActivationInt8WeightConfig(
                act_mapping_type=q.MappingType.ASYMMETRIC
            )
        ),
        "swapped",
        "w8a8",
    ),
    "torchao: 8da4w group 32": Entry(
        _torchao(
            lambda q: q.Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4, weight_granularity=_granularity("PerGroup", 32)
            )
        ),
        "swapped",
        "w4a8",
    ),
    "torchao: int8 static activation, int8 weight": Entry(
        _torchao(_torchao_static(False)), "swapped", "w8a8"
    ),
    "torchao: int8 static asymmetric activation, int8 weight": Entry(
        _torchao(_torchao_static(True)), "swapped", "w8a8"
    ),
    "torchao: 8da4w after QAT": Entry(_torchao_qat, "swapped", "w4a8"),
    "torchao: int4 tile-packed": Entry(_torchao_tile_packed, "swapped", "w4a16"),
    "hqq: 4-bit axis 1": Entry(_hqq(4, 1), "swapped", "w4a16"),
    "hqq: 8-bit axis 1": Entry(_hqq(8, 1), "swapped", "w8a16"),
    "hqq: 3-bit axis 1": Entry(_hqq(3, 1), "swapped", "w4a16"),
    "hqq: 2-bit axis 1": Entry(_hqq(2, 1), "swapped", "w4a16"),
    "hqq: 4-bit axis 0": Entry(_hqq(4, 0), "declined", "quantised"),
    "optimum-quanto: qint8": Entry(_quanto("qint8", torch.bfloat16), "swapped", "w8a16"),
    "optimum-quanto: qint4 fp32": Entry(_quanto("qint4", torch.float32), "swapped", "w4a16"),
    "optimum-quanto: qfloat8": Entry(_quanto("qfloat8", torch.bfloat16), "swapped", "fp8a16"),
    "optimum-quanto: qfloat8_e5m2": Entry(
        _quanto("qfloat8_e5m2", torch.bfloat16), "declined", "quantised"
    ),
    "compressed-tensors: pack-quantized, decompressed in graph": Entry(
        _compressed_tensors, "swapped", "w4a16"
    ),
    "bitsandbytes: NF4": Entry(_bitsandbytes("nf4", False), "swapped", "nf4a16"),
    "bitsandbytes: NF4, double quantisation": Entry(
        _bitsandbytes("nf4", True), "swapped", "nf4a16"
    ),
    "bitsandbytes: FP4": Entry(_bitsandbytes("fp4", False), "swapped", "bnbfp4a16"),
    "PT2E x86: static": Entry(_pt2e(False), "swapped", "w8a8"),
    "PT2E x86: dynamic": Entry(_pt2e(True), "swapped", "w8a8"),
}
