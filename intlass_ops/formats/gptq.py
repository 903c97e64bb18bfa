"""GPTQ checkpoints: codes of 2, 4 and 8 bits, zero points of both versions, act-order.

    qweight int32 [K·b/32, N]   field j of word r, n is q[n, (32/b)·r + j], lowest bits first
    qzeros  int32 [G, N·b/32]   field j of word c is z[(32/b)·c + j], minus one in version 1
    scales  [G, N]              w[n, k] = scales[g, n] · (q[n, k] - z[n, g])
    g_idx   int32 [K]           g of each k; absent: k // group_size

The version is that of the config: ``checkpoint_format`` "gptq" (and the older files that lack it)
is 1, "gptq_v2" is 2. Some writers say 1 and store 2; where the config says ``sym``, every zero
point is known to be 2^(b-1), so a file that contradicts itself is refused, not guessed at; say
which it is with ``checkpoint_format=``.

GPTQModel writes version 1 by subtracting one from every field of a word in a single subtraction,
so that zero point 0 borrows from the next field, and reads it by the opposite addition: so do we
(`second_version`). Kernels that unpack first take 2^b for such a field and 1 less for the next;
where no zero point is 0 they all agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import FormatError
from .checkpoint import Checkpoint, Layer, number
from .stored import StoredWeight, act_order, fields, group_size_of, unsigned

_VERSIONS = {"gptq": 1, "gptq_v2": 2}


def second_version(qzeros: Tensor, bits: int) -> Tensor:
    """The int32 words of version 1 as those of version 2: one more in each field, with carries."""
    return qzeros + sum(1 << place for place in range(0, 32, bits))


class Gptq:
    """Reader of one checkpoint; ``config`` as in quantization_config or quantize_config.json."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any],
        checkpoint_format: str | None = None,
    ) -> None:
        where = f"{checkpoint.directory}: GPTQ config"
        self.checkpoint = checkpoint
        self.bits = number(config, "bits", where, 2, 4, 8)
        self.symmetric = config.get("sym", False) is True
        self.declared = checkpoint_format or config.get("checkpoint_format") or "gptq"
        if not isinstance(self.declared, str) or self.declared not in _VERSIONS:
            raise FormatError(
                f"{where}: checkpoint_format is {self.declared!r}; expected gptq or gptq_v2"
            )
        if config.get("dynamic"):
            raise FormatError(f"{where}: 'dynamic' (settings per layer) is not supported")
        if config.get("pack_dtype", "int32") not in ("int32", None):
            raise FormatError(f"{where}: pack_dtype is {config['pack_dtype']!r}; expected int32")
        self.paths = checkpoint.layers("qweight")

    def activation(self, path: str) -> None:
        """GPTQ keeps activations in floating point."""

    def stored(self, path: str) -> StoredWeight:
        layer = Layer(self.checkpoint, path)
        bits, per_word = self.bits, 32 // self.bits
        rows, n = layer.shape("qweight", 2, (torch.int32,))
        groups, _ = layer.shape("scales", 2, (torch.float16, torch.bfloat16, torch.float32))
        k = rows * per_word
        if n % per_word:
            raise layer.fail(f"N={n} is not a multiple of {per_word}, the codes of a word")
        group_size_of(layer, k, groups)
        scales = layer.scales("scales", (groups, n)).t().contiguous()  # [N, G]
        order = None
        if layer.has("g_idx"):
            order = act_order(layer, layer.take("g_idx", (k,), (torch.int32, torch.int64)), groups)
        words = layer.take("qzeros", (groups, n // per_word), (torch.int32,))
        zeros = self._zeros(layer, words).t().contiguous()

        def codes() -> Tensor:
            q = layer.take("qweight", (rows, n), (torch.int32,)).t().contiguous()  # [N, words]
            if bits == 4:
                # Lowest first is what our bytes are, too.
                return q.view(torch.uint8)
            if bits == 8:
                return fields(q, 8)
            low, high = fields(q, 2).view(n, -1, 2).unbind(-1)
            return low | (high << 4)

        # Codes of two bits are codes of four, with small values.
        return unsigned(path, max(bits, 4), (n, k), scales, zeros, order, codes)

    def _zeros(self, layer: Layer, words: Tensor) -> Tensor:
        version, middle = _VERSIONS[self.declared], 1 << (self.bits - 1)
        stored = fields(words, self.bits)
        zeros = stored if version == 2 else fields(second_version(words, self.bits), self.bits)
        if self.symmetric and not bool((zeros == middle).all()):
            other = "gptq_v2" if version == 1 else "gptq"
            hint = middle if version == 1 else middle - 1
            if bool((stored == hint).all()):
                raise layer.fail(
                    f"the config says symmetric and checkpoint_format={self.declared!r}, but all "
                    f"stored zero points are {hint}, as in {other!r}; load it with "
                    f"checkpoint_format={other!r}"
                )
            raise layer.fail(f"the config says symmetric, but zero points differ from {middle}")
        return zeros
