"""HQQ state dicts in safetensors, as `HQQLinear.state_dict()` encodes them: INT4 and INT8, axis 1.

    W_q         uint8: [R/2, g], rows r (high nibble) and r + R/2 (low) of q; 8 bits: [R, g];
                R = N·K/g rows, row r is group r % (K/g) of channel r // (K/g)
    scale, zero [R, 1], floating; w = (q - zero) · scale
    nbits, group_size, axis, shape, packing, view_as_float: numbers and text as small tensors

Groups along N (axis 0) are refused: no permutation makes them groups along K. HQQ dequantises in
its compute dtype; here the same codes, scales and zeros are taken in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import packing
from .checkpoint import Checkpoint, Layer
from .stored import StoredWeight, group_size_of, unsigned

MARKER = "W_q"
_PACKINGS = {4: "4bit_u8", 8: "8bit_u8"}
_INTEGERS = (torch.int32, torch.int64)


class Hqq:
    """Reader of one checkpoint; every layer describes itself."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.paths = checkpoint.layers(MARKER)

    def activation(self, path: str) -> None:
        """HQQ keeps activations in floating point."""

    def stored(self, path: str) -> StoredWeight:
        layer = Layer(self.checkpoint, path)
        bits, group, axis = (_number(layer, name) for name in ("nbits", "group_size", "axis"))
        if bits not in _PACKINGS:
            raise layer.fail(f"nbits is {bits}; expected 4 or 8")
        if axis != 1:
            raise layer.fail(f"axis is {axis}: groups along N are not read, quantise with axis=1")
        if layer.has("view_as_float") and layer.take("view_as_float", (), (torch.uint8,)).item():
            raise layer.fail("view_as_float is set; save the model without it")
        text = layer.take("packing", layer.shape("packing", 1, (torch.uint8,)), (torch.uint8,))
        if bytes(text.tolist()) != _PACKINGS[bits].encode():
            raise layer.fail(f"packing is {bytes(text.tolist())!r}; expected {_PACKINGS[bits]!r}")
        n, k = (int(size) for size in layer.take("shape", (2,), _INTEGERS))
        stored = layer.shape("W_q", 2, (torch.uint8,))
        if n < 1 or k < 1 or group < 1 or k % group or stored[1] != group:
            raise layer.fail(f"shape [{n}, {k}] with group_size={group}, W_q {list(stored)}")
        rows = n * k // group
        groups = k // group
        group_size_of(layer, k, groups)
        scales = layer.scales("scale", (rows, 1)).view(n, groups)
        zeros = layer.scales("zero", (rows, 1)).view(n, groups)
        halves = 8 // bits
        if rows % halves or stored[0] != rows // halves:
            raise layer.fail(f"W_q has shape {list(stored)}; [{n}, {k}] needs {rows} rows")

        def codes() -> Tensor:
            octets = layer.take("W_q", stored, (torch.uint8,))
            if bits == 8:
                return octets.reshape(n, k)
            return packing.pack(torch.cat((octets >> 4, octets & 15)).view(n, k))

        return unsigned(path, bits, (n, k), scales, zeros, None, codes)


def _number(layer: Layer, name: str) -> int:
    return int(layer.take(name, (), _INTEGERS))
