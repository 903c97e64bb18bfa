"""Codes that index a table of sixteen numbers: NF4's, or small integers times one number (FP4's).

Lives here: which values of a slice are such numbers, and how they are stored. Arithmetic with codes
that are indices shows nothing, with the numbers it does: these take the place of codes in a proof
(probing.py, weights.py), each of them a code of its own. What a table holds that is a leaf is
known when a weight is packed; one that a graph holds itself is looked at before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import nf4
from .program import Evaluation, inputs_of

NUMBERS = 16
OTHER = "its codes index a table of other numbers than NF4's or small integers times one number"
_LOOK_UPS = (
    *("aten.index.Tensor", "aten._unsafe_index.Tensor", "aten.index_select.default"),
    *("aten.embedding.default", "aten.gather.default", "aten.take.default"),
)


@dataclass(frozen=True)
class Table:
    """numbers: float32 [16]. constant: the same for any values of the leaves."""

    numbers: Tensor
    constant: bool

    def has(self, values: Tensor) -> bool:
        """Whether all values are numbers of the table."""
        return bool(torch.isin(values.float(), self.numbers).all())


def tables(evaluation: Evaluation) -> list[Table]:
    """What the program reads by an index, if it is sixteen floats."""
    program, found = evaluation.program, {}
    inputs = inputs_of(program)
    constant = [False] * program.leaves
    for op, used in zip(program.operations, inputs, strict=True):
        constant.append(all(constant[i] for i in used))
        if op.target not in _LOOK_UPS:
            continue
        first = op.args[0]
        value = evaluation.values[first["v"]]
        if value.numel() == NUMBERS and value.is_floating_point():
            found[first["v"]] = Table(value.float().flatten(), constant[first["v"]])
    return list(found.values())


def are_numbers(value: Tensor, of: Sequence[Table]) -> bool:
    """Whether a value of the slice is numbers of one of the tables, as far as its corner shows."""
    if not value.is_floating_point() or value.dtype.itemsize == 1:
        return False
    corner = value[(slice(NUMBERS * NUMBERS),) * value.dim()]
    return corner.numel() > 0 and any(table.has(corner) for table in of)


def snapped(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers as float32; NF4's where they are in ``dtype``, the coarsest that the graph rounds to.

    Tables of four digits, or rounded to bfloat16, are such.
    """
    values = values.float()
    numbers = nf4.decode_codes(nf4.encode(values))
    return numbers if torch.equal(numbers.to(dtype), values.to(dtype)) else values


def nf4_codes(values: Tensor) -> Tensor | None:
    """Codes uint8 of numbers that all are NF4's."""
    codes = nf4.encode(values)
    return codes if torch.equal(nf4.decode_codes(codes), values) else None


def integers(values: Tensor) -> tuple[Tensor, float] | None:
    """(codes int16, factor) with values = codes * factor and |codes| <= 127, or None."""
    for factor in (1.0, 0.5, 0.25, 0.125, 0.0625):
        codes = values / factor
        if bool((codes.abs() <= 127).all()) and torch.equal(codes, codes.round()):
            return codes.to(torch.int16), factor
    return None


def is_stored(values: Tensor) -> bool:
    """Whether a weight of such numbers can be packed."""
    return nf4_codes(values) is not None or integers(values) is not None
