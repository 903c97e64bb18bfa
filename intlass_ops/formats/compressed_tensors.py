"""compressed-tensors checkpoints: integers (W4A16 to W8A8, act-order), FP8, NVFP4 and MXFP4.

    weight_packed     int32 [N, ceil(K·b/32)]   q + 2^(b-1), lowest bits first (pack-quantized)
    weight_shape      int [2]                   N, K
    weight            int8 [N, K]               q (int-quantized; INT4 too, one code a byte)
    weight_scale      [N, G], [N, 1] or [1]     w = (q - z) · scale
    weight_zero_point int32 [N·b/32, G]         z + 2^(b-1), packed along N; or int8 [N, G]
    weight_g_idx      int32 [K]                 group of each k (act-order)

    nvfp4-pack-quantized, mxfp4-pack-quantized: w = code · scale / global_scale
    weight_packed       uint8 [N, K/2]          e2m1, the even k in the low nibble
    weight_scale        e4m3 [N, K/16]          NVFP4; or uint8 [N, K/32], e8m0 (MXFP4)
    weight_global_scale float32 [1]             NVFP4 alone

    float-quantized: w = code · scale
    weight              e4m3 [N, K]
    weight_scale        [1], [N, 1], [N, G], or of blocks: [ceil(N/bn), ceil(K/bk)]; in
                        mxfp8-quantized uint8 [N, K/32], e8m0

Activations of FP4 and FP8 layers stay in 16 bits, also in files of W4A4 and W8A8, and so does a
quantised cache of keys and values. Activations of integer layers, quantised per token on the fly
(symmetric INT8 or INT4), are quantised by our own ops: their scale is amax / 127 where the
library's is amax / 127.5.
Other activation schemes are refused: `prepare_` converts the library's own model exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import packing
from ..fp4_linear import GROUPS, MXFP4, NVFP4
from ..fp8_linear import FP8
from ..nn import Activation
from . import FormatError, fp4, fp8
from .checkpoint import Checkpoint, Layer, number
from .layers import AnyStored
from .stored import act_order, fields, group_size_of, unsigned

_INDEX = (torch.int32, torch.int64)
_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
_FP4 = fp4.Names("weight_packed", "weight_scale", "weight_global_scale", True, "input_global_scale")


@dataclass(frozen=True)
class _Group:
    """An entry of config_groups: the layers that it is for, and what it says of them."""

    targets: list[str]
    kind: str | None  # of the weights: "int", "mxfp4", "nvfp4", "fp8"; None for what is not read
    bits: int
    activations: Any
    block: fp8.Block | None = None  # of FP8: what shares a scale, but for rows and whole tensors


class CompressedTensors:
    """Reader of one checkpoint; ``config`` is its quantization_config."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self.checkpoint = checkpoint
        self.where = f"{checkpoint.directory}: compressed-tensors config"
        self._formats(config)
        if config.get("transform_config"):
            raise FormatError(f"{self.where}: transform_config (rotations) is not supported")
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise FormatError(f"{self.where}: config_groups is {groups!r}; expected an object")
        self.groups = [self._group(name, group) for name, group in groups.items()]
        packed = checkpoint.layers("weight_packed")
        self.paths = [
            *packed,
            *(p for p in checkpoint.layers("weight_scale") if p not in {*packed}),
        ]

    def _formats(self, config: Mapping[str, Any]) -> None:
        sparsity = config.get("sparsity_config")
        every = [config.get("format")]
        if isinstance(sparsity, dict):
            every.append(sparsity.get("format"))
        for name in every:
            if name not in (None, "dense", *_FORMATS):
                raise FormatError(
                    f"{self.where}: format is {name!r}; read are {', '.join(_FORMATS)}"
                )

    def _group(self, name: str, group: Any) -> _Group:
        weights = group.get("weights") if isinstance(group, dict) else None
        where = f"{self.where}: {name}"
        if not isinstance(weights, dict) or not isinstance(group.get("targets"), list):
            raise FormatError(f"{where} lacks targets or weights")
        kind, targets = weights.get("type", "int"), [str(t) for t in group["targets"]]
        if kind == "int":
            bits = number(weights, "num_bits", where, 4, 8)
            return _Group(targets, kind, bits, group.get("input_activations"))
        if kind != "float":
            raise FormatError(f"{where}: weights of type {kind!r}; expected 'int' or 'float'")
        bits, size = number(weights, "num_bits", where), weights.get("group_size")
        if bits == 8:
            return _Group(targets, FP8, bits, None, _block(weights, where))
        of_size = (each for each, group in GROUPS.items() if group == size and bits == 4)
        return _Group(targets, next(of_size, None), bits, None)

    def _groups(self, path: str) -> list[_Group]:
        """Groups a layer can be of. Patterns are not run: those of a hostile file can take forever.

        A layer named outright belongs there; else its tensors decide among the groups.
        """
        return [g for g in self.groups if path in g.targets] or self.groups

    def activation(self, path: str) -> Activation:
        layer = Layer(self.checkpoint, path)
        if self._is_fp4(layer) or fp8.is_fp8(layer):
            return None
        bits = self._bits(layer)
        found = [g.activations for g in self._groups(path) if g.kind == "int" and g.bits == bits]
        if not found:
            raise layer.fail("no config group has weights of its number of bits")
        if any(each != found[0] for each in found):
            raise layer.fail("several config groups fit, with other activations each")
        scheme = found[0]
        if scheme is None:
            return None
        expected = {"type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
        if (
            isinstance(scheme, dict)
            and scheme.get("num_bits") in (4, 8)
            and all(scheme.get(key, value) == value for key, value in expected.items())
        ):
            return "int8" if scheme["num_bits"] == 8 else "int4"
        raise layer.fail(
            f"input_activations {scheme!r} are not read (INT8 or INT4, symmetric, dynamic per "
            "token are); load the model with compressed-tensors and call intlass_ops.prepare_"
        )

    def _is_fp4(self, layer: Layer) -> bool:
        header = self.checkpoint.tensors.get(f"{layer.path}.weight_packed")
        return header is not None and header.dtype == torch.uint8

    def _stored_fp4(self, layer: Layer) -> fp4.StoredFp4:
        layer.shape("weight_scale", 2, (torch.float8_e4m3fn, torch.uint8))
        scales = self.checkpoint.tensors[f"{layer.path}.weight_scale"]
        kind = MXFP4 if scales.dtype == torch.uint8 else NVFP4
        if all(group.kind != kind for group in self._groups(layer.path)):
            raise layer.fail(
                f"no config group has weights of 4 floating-point bits in groups of {GROUPS[kind]}"
            )
        return fp4.stored(layer, kind, _FP4)

    def _stored_fp8(self, layer: Layer) -> fp8.StoredFp8:
        groups = [group for group in self._groups(layer.path) if group.kind == FP8]
        if not groups:
            raise layer.fail("no config group has weights of 8 floating-point bits")
        blocks = [group.block for group in groups if group.block is not None]
        return fp8.stored(layer, "weight_scale", blocks)

    def _bits(self, layer: Layer) -> int:
        if not layer.has("weight_packed"):
            layer.shape("weight", 2, (torch.int8,))
            every = {g.bits for g in self._groups(layer.path) if g.kind == "int"}
            if not every:
                raise layer.fail("no config group has integer weights")
            if len(every) > 1:
                raise layer.fail("groups of 4 and of 8 bits fit; the file does not say which")
            return every.pop()
        _, words = layer.shape("weight_packed", 2, (torch.int32,))
        _, k = self._shape(layer)
        for bits in (4, 8):
            if words == -(-k * bits // 32):
                return bits
        raise layer.fail(f"weight_packed has {words} words a row; K={k} needs K/8 or K/4")

    def _shape(self, layer: Layer) -> tuple[int, int]:
        n, k = (int(v) for v in layer.take("weight_shape", (2,), _INDEX))
        rows, _ = layer.shape("weight_packed", 2, (torch.int32,))
        if n != rows or k < 1:
            raise layer.fail(f"weight_shape is [{n}, {k}], but weight_packed has {rows} rows")
        return n, k

    def stored(self, path: str) -> AnyStored:
        layer = Layer(self.checkpoint, path)
        if self._is_fp4(layer):
            return self._stored_fp4(layer)
        if fp8.is_fp8(layer):
            return self._stored_fp8(layer)
        bits, packed = self._bits(layer), layer.has("weight_packed")
        n, k = self._shape(layer) if packed else layer.shape("weight", 2, (torch.int8,))
        scales = self._scales(layer, n)
        groups = scales.shape[1]
        group_size_of(layer, k, groups)
        order = None
        if layer.has("weight_g_idx"):
            index = layer.take("weight_g_idx", (k,), _INDEX)
            # The library's "not set".
            order = None if bool((index == -1).all()) else act_order(layer, index, groups)
        zeros = self._zeros(layer, bits, n, groups, packed)

        def codes() -> Tensor:
            if not packed:
                return _plain_codes(layer, bits, n, k)
            words = layer.take("weight_packed", (n, -(-k * bits // 32)), (torch.int32,))
            if bits == 8:
                return fields(words, 8)[:, :k]
            # Lowest first is what our bytes are, too.
            q = words.contiguous().view(torch.uint8)[:, : packing.packed_size(k)].contiguous()
            if k % 2:
                q[:, -1] &= 0x0F
            return q

        return unsigned(path, bits, (n, k), scales, zeros, order, codes)

    def _scales(self, layer: Layer, n: int) -> Tensor:
        header = self.checkpoint.tensors.get(f"{layer.path}.weight_scale")
        if header is not None and len(header.shape) < 2:
            # One scale of the whole tensor.
            return layer.scales("weight_scale", header.shape[:1] and (1,)).expand(n, 1).contiguous()
        _, groups = layer.shape("weight_scale", 2, (torch.float16, torch.bfloat16, torch.float32))
        return layer.scales("weight_scale", (n, groups)).contiguous()

    def _zeros(self, layer: Layer, bits: int, n: int, groups: int, packed: bool) -> Tensor | None:
        """Zero points of the unsigned codes, [N, G]; None: the middle."""
        header = self.checkpoint.tensors.get(f"{layer.path}.weight_zero_point")
        if header is None:
            return None
        middle = 1 << (bits - 1)
        if packed and header.dtype == torch.int32:
            rows = -(-n * bits // 32)
            words = layer.take("weight_zero_point", (rows, groups), (torch.int32,))
            return fields(words.t(), bits)[:, :n].t().contiguous()
        shape = (n, groups) if len(header.shape) == 2 else (1,)
        values = layer.take("weight_zero_point", shape, (torch.int8, *_INDEX)).to(torch.int64)
        if bool((values < -middle).any()) or bool((values >= middle).any()):
            raise layer.fail(f"weight_zero_point leaves the {bits}-bit codes")
        return (values + middle).to(torch.int16).expand(n, groups)


def _block(weights: Mapping[str, Any], where: str) -> fp8.Block | None:
    if weights.get("strategy") == "block":
        return fp8.block_of(weights.get("block_structure"), f"{where}: block_structure")
    size = weights.get("group_size")
    # -1: one scale a row.
    return (1, size) if type(size) is int and size > 0 else None


def _plain_codes(layer: Layer, bits: int, n: int, k: int) -> Tensor:
    q = layer.take("weight", (n, k), (torch.int8,))
    if bits == 8:
        return q.view(torch.uint8) ^ 0x80
    if bool((q < packing.S4_MIN).any()) or bool((q > packing.S4_MAX).any()):
        raise layer.fail("weight holds codes outside [-8, 7], but the config says 4 bits")
    return packing.pack(q + 8)
