"""Codes that index a table of sixteen numbers: one of lut4.py, or small integers times a number.

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

from .. import lut4
from .program import Evaluation, inputs_of

NUMBERS = 16
OTHER = "its codes index a table of numbers that are neither known nor small integers times one"
# Which are known, and what their numbers may be divided by.
_TABLES = (
    (lut4.NF4, 1.0), (lut4.FP4, 1.0), (lut4.FP4, 0.5), (lut4.FP4, 6.0), (lut4.IQ4NL, 1.0),
    (lut4.IQ4NL, 127.0), (lut4.BNBFP4, 192.0),
)  # fmt: skip
_ROWS = 16  # show whether a table is meant
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
    """Numbers as float32; a table's of ours where they are those in ``dtype``, the coarsest that
    the graph rounds to.

    Tables of four digits, or rounded to bfloat16, are such.
    """
    values = values.float()
    for table, unit in _TABLES:
        for some in (values[:_ROWS], values):  # most often a few say that it is another table
            numbers = _nearest(some, table, unit)[1]
            if not torch.equal(numbers.to(dtype), some.to(dtype)):
                break
        else:
            return numbers
    return values


def _nearest(values: Tensor, table: str, unit: float) -> tuple[Tensor, Tensor]:
    """(codes uint8, numbers float32) of a table that is divided by ``unit``."""
    codes = lut4.encode(values.double() * unit, table)
    return codes, (lut4.decode_codes(codes, table, torch.float64) / unit).float()


def codes_of(values: Tensor, of: str | None = None) -> tuple[str, Tensor, float] | None:
    """(table, codes uint8, unit) with values = numbers[codes] / unit; ``of``: in this table."""
    for table, unit in _TABLES:
        if of not in (None, table):
            continue
        for some in (values[:_ROWS], values):
            codes, numbers = _nearest(some, table, unit)
            if not torch.equal(numbers, some):
                break
        else:
            return table, codes, unit
    return None


def integers(values: Tensor) -> tuple[Tensor, float] | None:
    """(codes int16, factor) with values = codes * factor and |codes| <= 127, or None."""
    for factor in (1.0, 0.5, 0.25, 0.125, 0.0625):
        codes = values / factor
        if bool((codes.abs() <= 127).all()) and torch.equal(codes, codes.round()):
            return codes.to(torch.int16), factor
    return None


def is_stored(values: Tensor) -> bool:
    """Whether a weight of such numbers can be packed."""
    return codes_of(values) is not None or integers(values) is not None
