"""Our own layout: what of an `IntLinear` or its kin goes to a file, and how it comes back.

A layer is saved as its buffers (`<path>.weight`, `.scales`, `.zeros`, `.order`, `.bias`, …) and a
`LayerSpec`, which config.json keeps under quantization_config:

    {"quant_method": "intlass", "version": 1,
     "layers": [{"modules": ["model.layers.0.mlp.up_proj", …], "kind": "int4", "in_features": 4096,
                 "activation": null, "tensors": {"weight": ["uint8", [11008, 2048]], …}}, …]}

Layers that are stored alike share an entry. Layers of experts have one dimension more: experts.
Of FP4 scales are their bytes, and NVFP4 has `.global_scale` beside them; of FP8 the weight is in
e4m3, of tables ("nf4" and others of lut4.py) packed as INT4 is, and scales are floating.
Not here: how a model is walked (integrations/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import lut4
from ..fp4_linear import GROUPS, MXFP4, NVFP4, Fp4ExpertLinear, Fp4Layer, Fp4Linear
from ..fp8_linear import CODES, FP8, Fp8ExpertLinear, Fp8Layer, Fp8Linear
from ..lowering.storage import INT4, INT4_PAIR, INT8, Packed
from ..lut4_linear import Lut4Linear
from ..nn import Activation, IntExpertLinear, IntExpertPairLinear, IntLinear, PackedLinear
from . import FormatError
from .fp4 import StoredFp4
from .fp8 import StoredFp8
from .lut4 import StoredLut4
from .stored import StoredWeight

AnyStored = StoredFp4 | StoredFp8 | StoredLut4 | StoredWeight
VERSION = 1
METHOD = "intlass"
_Floating = Fp4Layer | Fp8Layer | Lut4Linear
_FP4_LAYERS: tuple[type[Fp4Layer], type[Fp4Layer]] = (Fp4Linear, Fp4ExpertLinear)
# Layers of floating-point codes, by kind: of one weight, and of all experts.
_FLOATING: dict[str, tuple[type[_Floating], type[_Floating]]] = {
    MXFP4: _FP4_LAYERS, NVFP4: _FP4_LAYERS, FP8: (Fp8Linear, Fp8ExpertLinear),
    **dict.fromkeys(lut4.TABLES, (Lut4Linear, Lut4Linear)),  # which takes no experts
}  # fmt: skip
_KINDS = (INT4, INT8, INT4_PAIR, *_FLOATING)
_NAMES = (
    "weight", "scales", "zeros", "high", "high_scales", "order", "input_scale", "global_scale",
    "bias",
)  # fmt: skip
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, CODES,
    )
}  # fmt: skip


@dataclass(frozen=True)
class LayerSpec:
    """Everything about a quantised linear but the values of its tensors."""

    kind: str  # "int4", "int8", "int4 pair", "mxfp4", "nvfp4", "fp8", a table
    in_features: int
    activation: Activation
    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]

    @classmethod
    def of(cls, module: nn.Module) -> LayerSpec | None:
        """The spec of one of our layers; None for any other module."""
        if not isinstance(module, (_Floating, IntExpertLinear, IntLinear, PackedLinear)):
            return None
        buffers = ((name, getattr(module, name, None)) for name in _NAMES)
        tensors = tuple((name, t.dtype, tuple(t.shape)) for name, t in buffers if t is not None)
        if isinstance(module, (_Floating, PackedLinear)):
            return cls(module.kind, module.in_features, None, tensors)
        if isinstance(module, IntExpertPairLinear):
            return cls(INT4_PAIR, module.in_features, None, tensors)
        kind = INT4 if module.bits == 4 else INT8
        return cls(kind, module.in_features, module.activation, tensors)

    def module(self) -> nn.Module:
        """The layer on the meta device: shapes and dtypes, no memory."""
        t = {name: torch.empty(shape, dtype=d, device="meta") for name, d, shape in self.tensors}
        return layer_of(self.kind, self.in_features, self.activation, t)

    def to_dict(self, modules: Iterable[str]) -> dict[str, Any]:
        tensors = {n: [str(d).removeprefix("torch."), list(s)] for n, d, s in self.tensors}
        return {
            "modules": sorted(modules),
            "kind": self.kind,
            "in_features": self.in_features,
            "activation": self.activation,
            "tensors": tensors,
        }


def layer_of(
    kind: str, in_features: int, activation: Activation, tensors: dict[str, Tensor]
) -> nn.Module:
    """The module of a kind over these buffers; ValueError or TypeError if they do not fit."""
    weight, scales = tensors["weight"], tensors["scales"]
    if kind in _FLOATING:
        return _floating_layer(kind, in_features, activation, tensors)
    if weight.dim() == 3:
        if not tensors.keys() <= {"weight", "scales", "zeros"}:
            raise ValueError(f"experts of kind {kind!r} with {', '.join(tensors)}")
        if kind == INT4_PAIR:
            if activation is not None:
                raise ValueError("experts of 8-bit zero points with quantised activations")
            return IntExpertPairLinear(weight, scales, tensors["zeros"], in_features=in_features)
        return IntExpertLinear(
            weight, scales, tensors.get("zeros"), in_features=in_features, activation=activation
        )
    if kind != INT4_PAIR and "order" not in tensors:
        layer: nn.Module = IntLinear(
            weight, scales, tensors.get("zeros"), tensors.get("bias"),
            in_features=in_features, activation=activation, input_scale=tensors.get("input_scale"),
        )  # fmt: skip
        return layer
    if activation is not None:
        raise ValueError("act-order or 8-bit zero points with quantised activations")
    parts = {name: t for name, t in tensors.items() if name != "bias"}
    layer = PackedLinear(Packed(kind, **parts), in_features)  # type: ignore[arg-type]
    layer.bias = tensors.get("bias")
    return layer


def _floating_layer(
    kind: str, in_features: int, activation: Activation, tensors: dict[str, Tensor]
) -> _Floating:
    of_experts = tensors["weight"].dim() == 3
    made = _FLOATING[kind][of_experts]
    more = {*tensors}.difference(made.kept)
    if not of_experts:
        more.discard("bias")
    if more or activation is not None:
        raise ValueError(f"kind {kind!r} with {', '.join(more) or 'quantised activations'}")
    arguments: dict[str, Any] = {**tensors}
    if kind in lut4.TABLES:
        arguments["table"] = kind
    layer = made(**arguments)
    if (layer.kind, layer.in_features) != (kind, in_features):
        raise ValueError(
            f"kind {layer.kind!r} of in_features {layer.in_features}, by its tensors; expected "
            f"{kind!r} of {in_features}"
        )
    return layer


def buffers_of(
    stored: AnyStored, activation: Activation
) -> tuple[LayerSpec, dict[str, Callable[[], Tensor]]]:
    """The layer of a stored weight, without its bias: spec, and how to get each tensor.

    8-bit codes with zeros become two INT4 halves, w = 16·s·high + s·(low - zeros), both exact.
    """
    if isinstance(stored, StoredFp4):
        read = {"weight": stored.read, "scales": stored.read_scales}
        if stored.global_scale is not None:
            read["global_scale"] = _constant(stored.global_scale)
        return fp4_spec(stored.kind, stored.shape), read
    if isinstance(stored, StoredFp8):
        spec = fp8_spec(stored.shape, stored.groups, stored.scale_dtype)
        return spec, {"weight": stored.read, "scales": stored.read_scales}
    if isinstance(stored, StoredLut4):
        spec = lut4_spec(stored.table, stored.shape, stored.groups, stored.scale_dtype)
        return spec, {"weight": stored.read, "scales": stored.read_scales}
    n, k = stored.shape
    width = (k + 1) // 2
    known: dict[str, Tensor] = {"scales": stored.scales}
    late: dict[str, tuple[Callable[[], Tensor], torch.dtype, tuple[int, ...]]] = {}
    if stored.bits == 4:
        kind = INT4
        late["weight"] = stored.read, torch.uint8, (n, width)
    elif stored.zeros is None:
        kind = INT8
        late["weight"] = stored.read, torch.int8, (n, k)
    else:
        kind = INT4_PAIR
        known["high_scales"] = 16 * stored.scales.float()
        late["weight"] = lambda: half(stored.read(), 0), torch.uint8, (n, width)
        late["high"] = lambda: half(stored.read(), 4), torch.uint8, (n, width)
    if stored.zeros is not None:
        known["zeros"] = stored.zeros
    if stored.order is not None:
        known["order"] = stored.order
    if activation is not None and (kind == INT4_PAIR or stored.order is not None):
        raise FormatError(
            f"{stored.name}: act-order or 8-bit zero points with quantised activations are not "
            "supported; load the model with its own library and call intlass_ops.prepare_ on it"
        )
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in known.items()}
    shapes |= {name: (dtype, shape) for name, (_, dtype, shape) in late.items()}
    tensors = tuple((name, *shapes[name]) for name in _NAMES if name in shapes)
    read = {name: _constant(t) for name, t in known.items()}
    read |= {name: get for name, (get, _, _) in late.items()}
    return LayerSpec(kind, k, activation, tensors), read


def fp4_spec(kind: str, shape: tuple[int, ...], pieces: int = 1) -> LayerSpec:
    """Of a weight [N, K] or [experts, N, K] in the files of others: NVFP4 with global scales, of
    experts perhaps one for each of some pieces of N."""
    *rows, k = shape
    tensors = [
        ("weight", torch.uint8, (*rows, k // 2)),
        ("scales", torch.uint8, (*rows, k // GROUPS[kind])),
    ]
    if kind == NVFP4:
        each = (*rows[:-1], pieces) if pieces > 1 else tuple(rows[:-1])
        tensors.append(("global_scale", torch.float32, each))
    return LayerSpec(kind, k, None, tuple(tensors))


def fp8_spec(shape: tuple[int, ...], groups: int, scale_dtype: torch.dtype) -> LayerSpec:
    """Of a weight [N, K] or [experts, N, K] with this number of scales a row."""
    scales = (*shape[:-1], groups)
    return LayerSpec(
        FP8, shape[-1], None, (("weight", CODES, shape), ("scales", scale_dtype, scales))
    )


def lut4_spec(
    table: str, shape: tuple[int, int], groups: int, scale_dtype: torch.dtype
) -> LayerSpec:
    """Of a weight [N, K] with this number of scales a row."""
    n, k = shape
    tensors = (("weight", torch.uint8, (n, k // 2)), ("scales", scale_dtype, (n, groups)))
    return LayerSpec(table, k, None, tensors)


def _constant(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def half(codes: Tensor, shift: int) -> Tensor:
    """A nibble of each 8-bit code (signed, 128 below the unsigned one), packed."""
    from .. import packing

    return packing.pack(((codes.view(torch.uint8) ^ 0x80) >> shift) & 0xF)


def read_specs(where: str, config: dict[str, Any]) -> dict[str, LayerSpec]:
    """Specs by module path from a quantization_config; FormatError for what is malformed."""
    if config.get("version") != VERSION:
        raise FormatError(f"{where}: version is {config.get('version')!r}; this reads {VERSION}")
    entries = config.get("layers")
    if not isinstance(entries, list):
        raise FormatError(f"{where}: layers is no list")
    specs: dict[str, LayerSpec] = {}
    for number, entry in enumerate(entries):
        here = f"{where}: layers[{number}]"
        try:
            spec = _spec(entry)
            spec.module()
            modules = entry["modules"]
        except (KeyError, TypeError, ValueError, RuntimeError) as problem:
            raise FormatError(f"{here}: not a layer ({problem!r})") from None
        if not isinstance(modules, list) or not all(isinstance(m, str) for m in modules):
            raise FormatError(f"{here}: modules is no list of names")
        for path in modules:
            if path in specs:
                raise FormatError(f"{here}: {path} occurs twice")
            specs[path] = spec
    return specs


def _spec(entry: Any) -> LayerSpec:
    tensors = []
    for name in _NAMES:
        if name in entry["tensors"]:
            dtype, shape = entry["tensors"][name]
            if not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
                raise ValueError(f"{name} has shape {shape!r}")
            if _DTYPES[dtype] == CODES and name != "weight":
                raise ValueError(f"{name} is {dtype}")
            tensors.append((name, _DTYPES[dtype], tuple(shape)))
    k = entry["in_features"]
    if type(k) is not int or k < 1 or entry["kind"] not in _KINDS:
        raise ValueError(f"kind {entry['kind']!r} of in_features {k!r}")
    return LayerSpec(entry["kind"], k, entry.get("activation"), tuple(tensors))


def write_specs(specs: dict[str, LayerSpec]) -> dict[str, Any]:
    """The quantization_config of these layers."""
    alike: dict[LayerSpec, list[str]] = {}
    for path, spec in specs.items():
        alike.setdefault(spec, []).append(path)
    layers = [spec.to_dict(paths) for spec, paths in alike.items()]
    return {"quant_method": METHOD, "version": VERSION, "layers": layers}
