"""NF4 and FP4 weights, what they are exactly, and bitsandbytes' layout, written without its code.

Not here: tests (test_lut4_linear.py, test_formats_bitsandbytes_4bit.py), checkpoints
(tiny_checkpoints.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import oracle
import torch
from torch import Tensor

STATE = "weight.quant_state.bitsandbytes__nf4"
# The table of a kind, and what its numbers are divided by.
KINDS = {"nf4": ("nf4", 1.0), "fp4": ("bnbfp4", 192.0)}


@dataclass
class Nested:
    """absmax = table[q]·largest[i // block] + offset, in float32, of double quantisation."""

    q: Tensor  # [B] bytes
    table: Tensor  # [256]
    largest: Tensor  # [ceil(B/block)]
    offset: float
    block: int

    def absmax(self) -> Tensor:
        largest = self.largest.repeat_interleave(self.block)[: len(self.q)]
        return self.table[self.q] * largest + torch.tensor(self.offset)


@dataclass
class Nf4Weight:
    """w[n, k] = NF4[q[n, k]]·s[n, k // group]; of FP4 s is divided once, in float32."""

    q: Tensor  # [N, K]
    s: Tensor  # float32 [N, K/group]
    nested: Nested | None = None
    kind: str = "nf4"

    def packed(self) -> Tensor:
        """As an `Lut4Linear` has them: the even element low."""
        return (self.q[:, ::2] | (self.q[:, 1::2] << 4)).to(torch.uint8)

    def exact(self) -> Tensor:
        group = self.q.shape[1] // self.s.shape[1]
        table, unit = KINDS[self.kind]
        scales = (self.s / unit).double()
        return oracle.numbers(table, self.q) * scales.repeat_interleave(group, 1)

    def dense(self) -> Tensor:
        return self.exact().float()


def draw_nf4(
    n: int,
    k: int,
    seed: int,
    *,
    group: int = 64,
    double: bool = False,
    dtype: torch.dtype = torch.float32,
    kind: str = "nf4",
) -> Nf4Weight:
    """Any codes; scales around 0.5, of numbers in ``dtype``."""
    rng = torch.Generator().manual_seed(seed)
    q, blocks = torch.randint(0, 16, (n, k), generator=rng), n * k // group
    if not double:
        s = (torch.rand(n, k // group, generator=rng) * 0.5 + 0.25).to(dtype).float()
        return Nf4Weight(q, s, kind=kind)
    block = 16  # many in a small weight; bitsandbytes has 256
    nested = Nested(
        torch.randint(0, 256, (blocks,), generator=rng),
        torch.linspace(-1, 1, 256),
        torch.rand(-(-blocks // block), generator=rng) * 0.2 + 0.05,
        0.4123,
        block,
    )
    return Nf4Weight(q, nested.absmax().view(n, -1), nested, kind)


def state_of(w: Nf4Weight) -> dict[str, Any]:
    """What the JSON of a layer says."""
    n, k = w.q.shape
    state = {"quant_type": w.kind, "blocksize": k // w.s.shape[1], "dtype": "bfloat16",
             "shape": [n, k]}  # fmt: skip
    if w.nested is not None:
        state |= {"nested_blocksize": w.nested.block, "nested_dtype": "float32",
                  "nested_offset": w.nested.offset}  # fmt: skip
    return state


def text_of(state: Any) -> Tensor:
    """JSON as bitsandbytes stores it."""
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def bitsandbytes_4bit(w: Nf4Weight, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    flat = w.q.flatten()
    table, unit = KINDS[w.kind]
    octets = ((flat[::2] << 4) | flat[1::2]).to(torch.uint8)
    tensors = {
        "weight": octets.view(storage)[:, None],
        "weight.absmax": w.s.flatten(),
        "weight.quant_map": torch.tensor(oracle.TABLES[table]) / unit,
        STATE.replace("nf4", w.kind): text_of(state_of(w)),
    }
    if w.nested is not None:
        tensors |= {
            "weight.absmax": w.nested.q.to(torch.uint8),
            "weight.nested_absmax": w.nested.largest,
            "weight.nested_quant_map": w.nested.table,
        }
    return tensors
