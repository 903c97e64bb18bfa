"""GEMM calls that must be refused: each `Mutation` makes one illegal call out of a legal one.

Not here: the legal ones (strategies.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import oracle
import torch
from gemm_case import Call, Case
from torch import Tensor


@dataclass(frozen=True)
class Mutation:
    """``fragments`` gives what the message must name besides the op, for the mutated call."""

    name: str
    error: type[Exception]
    applies: Callable[[Case], bool]
    mutate: Callable[[Call], Call]
    fragments: Callable[[Call], tuple[str, ...]]

    def __str__(self) -> str:
        return self.name


_OF_FLOATS = (
    "e4m3",
    *oracle.TABLES,
)  # weights whose ops take no integer activations and no zero points


def _option(call: Call, **options: object) -> Call:
    return replace(call, options={**call.options, **options})


def _w(call: Call) -> str:
    return "packed_w" if call.case.packed else "b"


def _s(call: Call) -> str:
    return "scales" if call.case.packed else "b_scale"


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _full(like: Tensor, *shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float32, device=like.device)


def _residual(call: Call) -> Tensor:
    shape = *call.a.shape[:-1], call.case.n
    return torch.ones(shape, dtype=call.case.out_dtype, device=call.a.device)


def _wide(call: Call, k: int) -> Call:
    """A legal call but for its K, without the memory it would take."""
    a = call.a.new_zeros(1, 1).expand(2, k if call.case.x == "s8" else k // 2)
    w = call.w.new_zeros(1, 1).expand(call.case.n, k // 2 if call.case.packed else k)
    options = {n: v for n, v in call.options.items() if n in ("bias", "alpha")}
    if "zeros" in call.options:
        options["zeros"] = _full(w)
    if "a_zero" in call.options:
        options["a_zero"] = _full(w)
    call = replace(call, a=a, w=w, scales=_full(w), options=options)
    return call if call.k is None else replace(call, k=k)


def _dtype(name: str, dtype: torch.dtype) -> Mutation:
    def change(call: Call) -> Call:
        if name in ("a", "w", "scales"):
            return replace(call, **{name: getattr(call, name).to(dtype)})
        shape = (call.case.n,) if name == "bias" else ()
        return _option(call, **{name: torch.ones(shape, dtype=dtype, device=call.a.device)})

    def named(call: Call) -> tuple[str, ...]:
        shown = {"w": _w(call), "scales": _s(call)}.get(name, name)
        return f"{shown} has dtype {str(dtype).removeprefix('torch.')}", "expected one of"

    def applies(case: Case) -> bool:
        if name in ("a_scale", "a_zero"):
            return case.integer
        if name == "zeros":
            return case.packed and case.w not in _OF_FLOATS
        if dtype == torch.int8:
            return name == "scales" or case.w in _OF_FLOATS
        of_integers = case.packed and case.w not in _OF_FLOATS
        return not (name == "a" and dtype == torch.uint8 and of_integers)

    return Mutation(f"{name}-{str(dtype)[6:]}", TypeError, applies, change, named)


def _always(case: Case) -> bool:
    return True


MUTATIONS = (
    *(_dtype("a", d) for d in (torch.float64, torch.int16, torch.bool, torch.uint8, torch.int8)),
    *(_dtype("w", d) for d in (torch.int32, torch.bfloat16, torch.bool, torch.int8)),
    _dtype("w", torch.float8_e5m2),
    *(_dtype("scales", d) for d in (torch.float64, torch.int8)),
    *(_dtype("zeros", d) for d in (torch.complex64, torch.bool)),
    *(_dtype("a_zero", d) for d in (torch.complex64, torch.bool)),
    *(_dtype(n, torch.int32) for n in ("bias", "alpha", "a_scale")),
    Mutation(
        "out_dtype-int8",
        TypeError,
        _always,
        lambda c: replace(c, out_dtype=torch.int8),
        lambda c: ("out_dtype has dtype int8",),
    ),
    Mutation(
        "activation-unknown",
        ValueError,
        _always,
        lambda c: _option(c, activation="swish"),
        lambda c: ("activation='swish'", "'silu'"),
    ),
    Mutation(
        "residual-dtype",
        TypeError,
        _always,
        lambda c: _option(c, residual=_residual(c).to(torch.int32)),
        lambda c: ("residual has dtype int32", "the output"),
    ),
    Mutation(
        "residual-shape",
        ValueError,
        _always,
        lambda c: _option(c, residual=_residual(c)[..., None]),
        lambda c: (
            f"residual has shape {_shape(c.options['residual'])}",
            f"the output's, {(*c.case.lead, c.case.n)}",
        ),
    ),
    Mutation(
        "a-scalar",
        ValueError,
        _always,
        lambda c: replace(c, a=c.a.new_ones(())),
        lambda c: ("a is a scalar", "expected [..., K]"),
    ),
    Mutation(
        "w-one-dimension",
        ValueError,
        _always,
        lambda c: replace(c, w=c.w[0] if c.case.n else c.w.reshape(-1)),
        lambda c: (_w(c), _shape(c.w), "two dimensions"),
    ),
    Mutation(
        "w-three-dimensions",
        ValueError,
        _always,
        lambda c: replace(c, w=c.w[None]),
        lambda c: (_w(c), _shape(c.w), "two dimensions"),
    ),
    Mutation(
        "a-too-wide",
        ValueError,
        _always,
        lambda c: replace(c, a=torch.cat([c.a, c.a.new_zeros(*c.a.shape[:-1], 16)], dim=-1)),
        lambda c: (
            (f"a has {c.a.shape[-1]} columns", f"K={c.k}")
            if c.k is not None
            else (f"b has {c.w.shape[1]} columns", f"K={c.a.shape[-1]}")
        ),
    ),
    Mutation(
        "w-too-wide",
        ValueError,
        _always,
        lambda c: replace(c, w=torch.cat([c.w, c.w.new_zeros(c.w.shape[0], 3)], dim=1)),
        lambda c: (f"{_w(c)} has {c.w.shape[1]} ", f"K={c.case.k}"),
    ),
    Mutation(
        "k-negative",
        ValueError,
        lambda case: case.packed,
        lambda c: replace(c, k=-1, a=c.a[..., :0], w=c.w[:, :0]),
        lambda c: ("k=-1",),
    ),
    Mutation(
        "scales-of-other-rows",
        ValueError,
        _always,
        lambda c: replace(c, scales=_full(c.w, c.case.n + 2)),
        lambda c: (_s(c), _shape(c.scales), f"N={c.case.n}"),
    ),
    Mutation(
        "scales-three-dimensions",
        ValueError,
        _always,
        lambda c: replace(c, scales=_full(c.w, 2, c.case.n, 2)),
        lambda c: (_s(c), _shape(c.scales), f"N={c.case.n}"),
    ),
    Mutation(
        "groups-not-dividing-k",
        ValueError,
        lambda case: case.k > 0 and case.n > 1,
        lambda c: replace(c, scales=_full(c.w, c.case.n, c.case.k + 1)),
        lambda c: (_s(c), f"{c.case.k + 1} groups", f"K={c.case.k}"),
    ),
    Mutation(
        "group-size-8",
        ValueError,
        lambda case: case.k % 8 == 0 and case.k > 8 and case.n > 1,
        lambda c: replace(c, scales=_full(c.w, c.case.n, c.case.k // 8)),
        lambda c: ("group_size=8", f"K={c.case.k}", _s(c), _shape(c.scales), "multiple of 16"),
    ),
    Mutation(
        "no-groups",
        ValueError,
        lambda case: case.n > 1,
        lambda c: replace(c, scales=_full(c.w, c.case.n, 0)),
        lambda c: (_s(c), _shape(c.scales)),
    ),
    Mutation(
        "zeros-of-other-rows",
        ValueError,
        lambda case: case.w == "u4",
        lambda c: _option(c, zeros=_full(c.w, c.case.n + 2)),
        lambda c: ("zeros", _shape(c.options["zeros"]), f"N={c.case.n}"),
    ),
    Mutation(
        "zeros-of-other-groups",
        ValueError,
        lambda case: case.w == "u4" and case.k % 96 == 0 and case.k > 0 and case.n > 1,
        lambda c: _option(
            replace(c, scales=_full(c.w, c.case.n, 2)), zeros=_full(c.w, c.case.n, 3)
        ),
        lambda c: ("scales", f"({c.case.n}, 2)", "zeros", f"({c.case.n}, 3)", "groups"),
    ),
    Mutation(
        "float-a-with-a_scale",
        ValueError,
        lambda case: not case.integer and case.w not in _OF_FLOATS,
        lambda c: _option(c, a_scale=_full(c.w)),
        lambda c: ("a_scale", "integer", f"a is {str(c.a.dtype)[6:]}"),
    ),
    Mutation(
        "float-a-with-a_zero",
        ValueError,
        lambda case: not case.integer and case.w not in _OF_FLOATS,
        lambda c: _option(c, a_zero=_full(c.w)),
        lambda c: ("a_zero", "integer", f"a is {str(c.a.dtype)[6:]}"),
    ),
    Mutation(
        "a_scale-of-other-tokens",
        ValueError,
        lambda case: case.integer,
        lambda c: _option(c, a_scale=_full(c.w, 3, 7, 2)),
        lambda c: ("a_scale has shape (3, 7, 2)", _shape(c.a[..., 0])),
    ),
    Mutation(
        "a_zero-of-other-tokens",
        ValueError,
        lambda case: case.integer,
        lambda c: _option(c, a_zero=_full(c.w, 3, 7, 2)),
        lambda c: ("a_zero has shape (3, 7, 2)", _shape(c.a[..., 0])),
    ),
    Mutation(
        "alpha-of-two",
        ValueError,
        _always,
        lambda c: _option(c, alpha=_full(c.w, 2)),
        lambda c: ("alpha has shape (2,)",),
    ),
    Mutation(
        "bias-of-other-rows",
        ValueError,
        _always,
        lambda c: _option(c, bias=_full(c.w, c.case.n + 1)),
        lambda c: (f"bias has shape ({c.case.n + 1},)", f"expected ({c.case.n},)"),
    ),
    Mutation(
        "bias-two-dimensions",
        ValueError,
        _always,
        lambda c: _option(c, bias=_full(c.w, 1, c.case.n)),
        lambda c: (f"bias has shape (1, {c.case.n})", f"expected ({c.case.n},)"),
    ),
    Mutation(
        "int32-overflow",
        ValueError,
        lambda case: case.integer,
        lambda c: _wide(c, 1 << 17),
        lambda c: ("K=131072", "int32"),
    ),
)
