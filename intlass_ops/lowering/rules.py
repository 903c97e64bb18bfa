"""What a matched linear becomes: a table of named rules.

Lives here: `Match` (all that is known about one linear) and `RULES` (the first whose condition
holds wins, and emits the new nodes). Not here: how a linear is matched (linears.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from .activations import Activation
from .editor import CAST, Editor, Slice, aten
from .gemms import FLOATS, Epilogue, Gemm, shape_of
from .probing import WeightForm


@dataclass(frozen=True)
class Match:
    """Everything known about one linear that will be swapped."""

    gemm: Gemm
    piece: Slice
    form: WeightForm
    tail: Epilogue
    activation: Activation | None
    x: Node
    a_scale: Node | None = None
    a_zero: Node | None = None
    integer_bias: Node | None = None
    quantised_by_us: bool = False  # x and a_scale are those of our op (full_range.py)

    @property
    def out_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.tail.last.meta["val"].dtype
        return dtype

    @property
    def scheme(self) -> str:
        weight = "fp8" if self.form.fp8 else f"w{self.form.bits}"
        weight = "lut4" if self.form.looked_up else weight
        return f"{weight}a{16 if self.activation is None else 8}"

    @property
    def bound(self) -> float:
        """`records.Decision.bound`: the roundings that the graph makes and the fused op does not,
        and those of its own result.

        Weight and activations are each proved equal to within 2 eps (weights.py, activations.py);
        a sum of K products errs by K/2 eps of float32 at most, on either side; then a rounding of
        eps/2 for the product, each step of the epilogue, and the fused result.
        """
        eps, tail = self.form.eps, self.tail
        dtype = self.gemm.x.meta["val"].dtype
        if self.activation is not None and dtype.is_floating_point:
            eps += torch.finfo(dtype).eps
        if self.form.columns is not None:
            # The activations are rounded once more, and so may be a scale on either side.
            eps += (torch.finfo(dtype).eps + self.form.eps) / 2
        steps = 3 + len(tail.column_scales) + len(tail.row_scales) + 2 * (tail.bias is not None)
        dtypes = [each.meta["val"].dtype for each in (self.gemm.node, tail.last)]
        coarsest = max(torch.finfo(each).eps for each in dtypes if each.is_floating_point)
        return 2 * eps + self.gemm.k * torch.finfo(torch.float32).eps + steps * coarsest / 2


@dataclass(frozen=True)
class Rule:
    """name: counted and shown. applies: when. emit: the GEMM's new nodes, [.., M, N].

    packs: the weight is read from its leaves and packed when the graph runs.
    """

    name: str
    applies: Callable[[Match], bool]
    emit: Callable[[Editor, Match, Node | None], Node]
    why: str
    packs: bool = False


def _scale_node(m: Match) -> Node | None:
    found = (m.piece.node_of(i) for i in m.form.scale_values)
    return next((node for node in found if node is not None), None)


def _is_direct(m: Match) -> bool:
    plain = m.gemm.batch == 1 and m.form.codes_leaf is not None and not m.form.has_zeros
    return plain and _scale_node(m) is not None


def _emit_direct(edit: Editor, m: Match, bias: Node | None) -> Node:
    assert m.form.codes_leaf is not None
    weight, scale = m.piece.node_of(m.form.codes_leaf), _scale_node(m)
    assert weight is not None
    assert scale is not None
    flat = scale.meta["val"].numel()
    if shape_of(scale) not in ((flat,), ()):
        scale = edit.call(aten.reshape.default, scale, [flat])
    if scale.meta["val"].dtype not in FLOATS:
        scale = edit.call(CAST, scale, torch.float32)
    return edit.call(
        torch.ops.intlass.matmul_int8_bf16_tn.default,
        m.x,
        weight,
        m.a_scale,
        scale,
        a_zero=m.a_zero,
        bias=bias,
        out_dtype=m.out_dtype,
    )


def _emit_ones(edit: Editor, m: Match, bias: Node | None) -> Node:
    assert m.form.codes_leaf is not None
    weight = m.piece.node_of(m.form.codes_leaf)
    assert weight is not None
    one = edit.call(aten.full.default, [], 1.0, dtype=torch.float32, device=m.x.meta["val"].device)
    return edit.call(
        torch.ops.intlass.matmul_int8_bf16_tn.default,
        m.x,
        weight,
        m.a_scale,
        one,
        a_zero=m.a_zero,
        bias=bias,
        out_dtype=m.out_dtype,
    )


def _emit_packed(edit: Editor, m: Match, bias: Node | None) -> Node:
    return edit.call(
        torch.ops.intlass.linear_from_leaves.default,
        m.x,
        list(m.piece.leaves),
        m.form.recipe.text(),
        m.a_scale,
        m.a_zero,
        bias,
        m.out_dtype,
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "int8_codes_unscaled",
        lambda m: m.gemm.batch == 1 and m.form.codes_leaf is not None and m.form.codes_are_weight,
        _emit_ones,
        "the int8 leaf is the weight; its scale, if any, stays in the graph",
    ),
    Rule(
        "int8_leaf_read_in_place",
        _is_direct,
        _emit_direct,
        "the int8 leaf already is W[N, K] with one scale per row: nothing to pack",
    ),
    Rule(
        "packed_from_leaves",
        lambda m: True,
        _emit_packed,
        "codes, scales and zeros are recovered from the leaves once and packed",
        packs=True,
    ),
)
