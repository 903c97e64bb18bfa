"""GPTQ checkpoints: codes of 2, 3, 4 and 8 bits, zero points of both versions, act-order.

    qweight int32 [K·b/32, N]   field j of word r, n is q[n, (32/b)·r + j], lowest bits first
    qzeros  int32 [G, N·b/32]   field j of word c is z[(32/b)·c + j], minus one in version 1
    scales  [G, N]              w[n, k] = scales[g, n] · (q[n, k] - z[n, g])
    g_idx   int32 [K]           g of each k; absent: k // group_size

Fields of 3 bits run on from word to word: 32 of them in three words. The bits of a layer are those
of its tensors' shapes (`layer_rules.py`: rules of single layers).

The version is that of the config: ``checkpoint_format`` "gptq" (and the older files that lack it)
is 1, "gptq_v2" is 2. Some writers say 1 and store 2; where the config says ``sym``, every zero
point is known to be 2^(b-1), so a file that contradicts itself is refused, not guessed at; say
which it is with ``checkpoint_format=``.

GPTQModel writes version 1 by subtracting one from every field of a word in a single subtraction,
so that zero point 0 borrows from the next field, and reads it by the opposite addition: so do we
(`second_version`). Kernels that unpack first take 2^b for such a field and 1 less for the next;
where no zero point is 0 they all agree.

Of 3 bits GPTQModel subtracts from every field by itself, modulo 8, but did otherwise before its
version 7 (`_OLD_OFFSETS`). AutoGPTQ and AutoRound destroy what lies beside a zero point of 0; that
one is stored as 7, as no other is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import packing
from . import FormatError
from .checkpoint import Checkpoint, Layer
from .layer_rules import LayerRules, of_gptq
from .stored import StoredWeight, act_order, fields, group_size_of, unsigned

_VERSIONS = {"gptq": 1, "gptq_v2": 2}
# What GPTQModel before 7 subtracted from three words of 3-bit zero points: the ones of the fields
# as they would lie if the words came in another order.
_OLD_OFFSETS = (0x24924924, 0x92492492 - (1 << 32), 0x49249249)


def second_version(qzeros: Tensor, bits: int) -> Tensor:
    """The int32 words of version 1 as those of version 2: one more in each field, with carries.

    Of 2, 4 and 8 bits.
    """
    return qzeros + sum(1 << place for place in range(0, 32, bits))


class Gptq:
    """Reader of one checkpoint, whose layers are as ``rules`` say.

    ``declared``: the version of its zero points, as checkpoint_format has it. ``gptqmodel``: which
    GPTQModel wrote it, if one did (its version, up to the first point).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        rules: LayerRules,
        declared: str,
        gptqmodel: int | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.rules = rules
        self.declared = declared
        self.gptqmodel = gptqmodel
        self.paths = checkpoint.layers("qweight")

    @classmethod
    def of_config(
        cls, checkpoint: Checkpoint, config: Mapping[str, Any], checkpoint_format: str | None = None
    ) -> Gptq:
        """``config`` as in quantization_config or quantize_config.json."""
        where = f"{checkpoint.directory}: GPTQ config"
        rules = of_gptq(config, where)
        in_file = config.get("checkpoint_format") or config.get("format") or "gptq"
        declared = version(checkpoint_format or in_file, where)
        if config.get("pack_dtype", "int32") not in ("int32", None):
            raise FormatError(f"{where}: pack_dtype is {config['pack_dtype']!r}; expected int32")
        if config.get("rotation"):
            raise FormatError(f"{where}: rotation={config['rotation']!r} is not supported")
        return cls(checkpoint, rules, declared, _gptqmodel(config))

    def activation(self, path: str) -> None:
        """GPTQ keeps activations in floating point."""

    def stored(self, path: str) -> StoredWeight:
        layer = Layer(self.checkpoint, path)
        rows, n = layer.shape("qweight", 2, (torch.int32,))
        groups, _ = layer.shape("scales", 2, (torch.float16, torch.bfloat16, torch.float32))
        bits, words = self._bits(layer, n)
        if rows * 32 % bits:
            raise layer.fail(f"qweight has {rows} rows, not a multiple of {bits}")
        k = rows * 32 // bits
        size = group_size_of(layer, k, groups)
        scales = layer.scales("scales", (groups, n)).t().contiguous()  # [N, G]
        order = None
        if layer.has("g_idx"):
            order = act_order(layer, layer.take("g_idx", (k,), (torch.int32, torch.int64)), groups)
        elif not self.rules.fits(size, k):
            said = ", ".join(map(str, sorted(self.rules.group_sizes)))
            raise layer.fail(f"K={k} in {groups} groups; the config says group_size={said}")
        qzeros = layer.take("qzeros", (groups, words), (torch.int32,))
        zeros = self._zeros(layer, qzeros, bits).t().contiguous()

        def codes() -> Tensor:
            q = layer.take("qweight", (rows, n), (torch.int32,)).t().contiguous()  # [N, words]
            if bits == 4:
                # Lowest first is what our bytes are, too.
                return q.view(torch.uint8)
            return fields(q, 8) if bits == 8 else packing.pack(fields(q, bits))

        # Codes of two and three bits are codes of four, with small values.
        return unsigned(path, max(bits, 4), (n, k), scales, zeros, order, codes)

    def _bits(self, layer: Layer, n: int) -> tuple[int, int]:
        """The bits of a layer and the words of its zero points a group, which tell them."""
        _, words = layer.shape("qzeros", 2, (torch.int32,))
        for bits in self.rules.bits:
            if 32 * words == n * bits:
                return bits, words
        said = " or ".join(map(str, sorted(self.rules.bits)))
        raise layer.fail(
            f"qzeros has {words} words a row, which are not N={n} fields of {said} bits"
        )

    def _zeros(self, layer: Layer, words: Tensor, bits: int) -> Tensor:
        first, middle = _VERSIONS[self.declared] == 1, 1 << (bits - 1)
        symmetric = self.rules.symmetric
        stored = fields(words, bits)
        zeros = _raised(words, bits) if first else stored
        if bool((zeros == middle).all()):
            return zeros
        if symmetric is not False:
            if first and bits == 3:
                offsets = torch.tensor(_OLD_OFFSETS, dtype=torch.int32)
                old = fields(words + offsets.repeat(words.shape[1] // 3), 3)
                if bool((old == middle).all()):
                    return old
            other = "gptq_v2" if first else "gptq"
            hint = middle if first else middle - 1
            if bool((stored == hint).all()):
                raise layer.fail(
                    f"the config says symmetric and checkpoint_format={self.declared!r}, but all "
                    f"stored zero points are {hint}, as in {other!r}; load it with "
                    f"checkpoint_format={other!r}"
                )
            if symmetric:
                raise layer.fail(f"the config says symmetric, but zero points differ from {middle}")
        if first and bits == 3:
            self._check_writer(layer, stored)
        return zeros

    def _check_writer(self, layer: Layer, stored: Tensor) -> None:
        """That 3-bit zero points of version 1 are what their writer meant."""
        if self.gptqmodel is not None and self.gptqmodel < 7:
            raise layer.fail(
                f"3-bit zero points of version 1 by GPTQModel {self.gptqmodel} are not read: "
                "before 7 it subtracted other numbers than one"
            )
        if self.gptqmodel is None and bool((stored == 7).any()):
            raise layer.fail(
                "3-bit zero points of version 1, of which some are 0, are not read unless the "
                "config's meta names GPTQModel 7 or later: other writers destroy those beside a 0"
            )


def version(declared: Any, where: str) -> str:
    """A checkpoint_format that is read."""
    if not isinstance(declared, str) or declared not in _VERSIONS:
        raise FormatError(f"{where}: checkpoint_format is {declared!r}; expected gptq or gptq_v2")
    return declared


def _raised(words: Tensor, bits: int) -> Tensor:
    """Zero points of version 1."""
    if bits == 3:
        return (fields(words, 3) + 1) & 7
    return fields(second_version(words, bits), bits)


def _gptqmodel(config: Mapping[str, Any]) -> int | None:
    """Which one wrote a file, by its ``meta``: 2 of "gptqmodel:2.2.0"; 0 if that has no number."""
    meta = config.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, dict) else None
    for writer in writers if isinstance(writers, list) else [writers]:
        name, _, number = str(writer).partition(":")
        major = number.partition(".")[0]
        if name == "gptqmodel":
            return int(major) if re.fullmatch("[0-9]{1,4}", major) else 0
    return None
