"""`Case`, everything about one GEMM call except its numbers, and `build`, which makes those: either
such that float32 arithmetic has nothing to round (numbers="exact") or at random (numbers="random").

Not here: which cases are tested (strategies.py), what the result must be (oracle.py), how near is
near enough (tolerance.py), calls that must fail (illegal.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import oracle
import torch
from torch import Tensor

from intlass_ops import ops

X_DTYPE = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "s8": torch.int8,
    "s4": torch.uint8,
    "u4": torch.uint8,
}
# Of e4m3, places in the row of the codes that are numbers.
CODES = {"s8": (-128, 127), "s4": (-8, 7), "u4": (0, 15), "e4m3": (0, 253)}
CODES |= dict.fromkeys(oracle.TABLES, (0, 15))
# NF4's numbers as bf16 are multiples of 2^-11; in other types those of few bits are -1, 0 and 1.
NF4_INTEGERS = (0, 7, 15)
# "expanded" alone changes values, and comes last so that others can leave it out.
LAYOUTS = ("contiguous", "transposed", "columns", "padded", "rows", "offset", "expanded")
# Scales far from 1, one kind a row: see `special_scales`.
SPECIALS = ("one", "zero", "subnormal", "huge", "inf", "nan")


@dataclass(frozen=True)
class Case:
    """One call of matmul_int4_bf16_tn, _int8_, _fp8_ or that of a table, without its numbers."""

    x: str
    w: str
    lead: tuple[int, ...] = (5,)
    n: int = 48
    k: int = 128
    groups: int = 1  # of scales; 1 is per channel
    zero_groups: int = 0  # of zeros; 0: as many as scales have
    scale_shape: str = "table"  # with one group: "table" [N], "column" [N, 1], "scalar" []
    scale: torch.dtype = torch.float32
    zero: torch.dtype = torch.uint8  # of u4 weights
    out: torch.dtype | None = None
    bias: torch.dtype | None = None
    alpha: str = "none"  # "none", "float", "tensor"
    a_scale: str = "none"  # "none", "scalar", "token" [..., 1], "flat" [...]
    a_zero: torch.dtype | None = None  # of integer activations; u4 ones always have one
    a_layout: str = "contiguous"
    w_layout: str = "contiguous"
    scale_layout: str = "contiguous"
    activation: str | None = None
    residual: bool = False
    special: bool = False
    seed: int = 0

    @property
    def integer(self) -> bool:
        return self.x in CODES

    @property
    def packed(self) -> bool:
        """Whether its weights are two a byte."""
        return self.w in ("s4", "u4") or self.table is not None

    @property
    def table(self) -> str | None:
        """What codes of its weights index."""
        return self.w if self.w in oracle.TABLES else None

    @property
    def units(self) -> int:
        """How many of the numbers' common divisor are 1."""
        return {"nf4": 2**11 if self.x == "bf16" else 1, "fp4": 2}.get(self.w, 1)

    @property
    def op_name(self) -> str:
        return f"matmul_{self.table or {'s8': 'int8', 'e4m3': 'fp8'}.get(self.w, 'int4')}_bf16_tn"

    @property
    def op(self) -> Callable[..., Tensor]:
        if self.table is not None:
            return functools.partial(ops.matmul_lut4_bf16_tn, table=self.table)
        others: dict[str, Callable[..., Tensor]] = {
            "s8": ops.matmul_int8_bf16_tn,
            "e4m3": ops.matmul_fp8_bf16_tn,
        }
        return others.get(self.w, ops.matmul_int4_bf16_tn)

    @property
    def out_dtype(self) -> torch.dtype:
        return self.out or (torch.bfloat16 if self.integer else X_DTYPE[self.x])

    def __str__(self) -> str:
        group = self.k // max(self.groups, self.zero_groups)
        m = "x".join(map(str, self.lead))
        return f"{self.x}-{self.w}-m{m}-n{self.n}-k{self.k}-g{group}"


@dataclass
class Call:
    """The tensors of one call; `run` calls the op, `expected` the oracle."""

    case: Case
    a: Tensor
    w: Tensor
    scales: Tensor
    options: dict[str, Any]  # keyword arguments that the ops and the oracle name alike
    k: int | None
    out_dtype: torch.dtype | None

    def run(self) -> Tensor:
        options = {**self.options, "out_dtype": self.out_dtype}
        if self.case.packed:
            return self.case.op(self.a, self.w, self.scales, k=self.k, **options)
        a_scale = (options.pop("a_scale", None),) if self.case.w == "s8" else ()
        return self.case.op(self.a, self.w, *a_scale, self.scales, **options)

    def expected(self) -> oracle.Expected:
        given = self.a, self.w, self.scales
        return oracle.matmul(*given, k=self.k, table=self.case.table, **self.options)

    def weight(self) -> Tensor:
        """float64 [N, K]."""
        case, zeros = self.case, self.options.get("zeros")
        of_table = case.table, X_DTYPE[case.x]
        return oracle.weight(self.w, self.scales, zeros, case.k, *of_table)

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with ``change`` applied to every tensor."""
        options = {n: change(v) if isinstance(v, Tensor) else v for n, v in self.options.items()}
        a, w, scales = (change(t) for t in (self.a, self.w, self.scales))
        return replace(self, a=a, w=w, scales=scales, options=options)


def stored(kind: str, codes: Tensor) -> Tensor:
    """Weights [N, K] as the ops take them; ``codes`` are those of CODES."""
    if kind == "e4m3":
        return (codes + (codes >= 127)).to(torch.uint8).view(torch.float8_e4m3fn)  # 127 is a NaN
    return codes.to(torch.int8) if kind == "s8" else oracle.pack(codes)


def relayout(t: Tensor, layout: str) -> Tensor:
    """The values of ``t`` with other strides, or at an offset that is not 16-byte aligned."""
    if t.dim() == 0 or t.numel() == 0 or layout == "contiguous":
        return t
    if layout == "transposed":
        return t.mT.contiguous().mT if t.dim() > 1 else relayout(t, "rows")
    # What lies around the values is as harmful as can be, should a kernel read it.
    garbage = math.nan if t.is_floating_point() else 77
    if layout in ("columns", "padded"):  # of a wider matrix, from an odd or an aligned one on
        first, width = (3, 5) if layout == "columns" else (0, 64 - t.shape[-1] % 64)
        shape = (*t.shape[:-1], t.shape[-1] + width)
        wide = torch.full(shape, garbage, dtype=t.dtype, device=t.device)
        wide[..., first : first + t.shape[-1]] = t
        return wide[..., first : first + t.shape[-1]]
    if layout == "rows":  # every second one
        shape = (2 * t.shape[0], *t.shape[1:])
        tall = torch.full(shape, garbage, dtype=t.dtype, device=t.device)
        tall[::2] = t
        return tall[::2]
    if layout == "offset":
        flat = t.new_empty(t.numel() + 1)
        flat[1:] = t.reshape(-1)
        return flat[1:].view(t.shape)
    if layout == "expanded":  # the first row for all
        return t[:1].expand_as(t)
    raise ValueError(layout)


def build(case: Case, device: str, *, numbers: str = "exact") -> Call:
    """The tensors of ``case`` on ``device``, the same at every call and on every device."""
    draw = _Draw(case, torch.Generator().manual_seed(case.seed), numbers == "exact")
    w, a, scales = draw.weight(), draw.activations(), draw.scales()
    options: dict[str, Any] = {}
    if case.w == "u4":
        options["zeros"] = draw.zeros()
    if case.a_scale != "none":
        options["a_scale"] = draw.a_scale()
    if case.a_zero is not None:
        options["a_zero"] = draw.a_zero()
    if case.alpha != "none":
        alpha = 0.5 if draw.exact else 0.7
        options["alpha"] = alpha if case.alpha == "float" else torch.tensor([alpha])
    if case.bias is not None:
        options["bias"] = draw.bias()
    if case.activation is not None:
        options["activation"] = case.activation
    if case.residual:
        options["residual"] = draw.residual()
    k = case.k if case.packed else None
    call = Call(case, a, w, scales, options, k, case.out).map(lambda t: t.to(device))
    call.a = relayout(call.a, case.a_layout)
    call.w = relayout(call.w, case.w_layout)
    call.scales = relayout(call.scales, case.scale_layout)
    if case.residual:
        call.options["residual"] = relayout(call.options["residual"], case.a_layout)
    for name in ("zeros", "bias"):
        if name in options:
            call.options[name] = relayout(call.options[name], case.scale_layout)
    return call


def special_scales(dtype: torch.dtype) -> dict[str, float]:
    """Factors for rows of scales. Finite ones leave room for `build`'s exact numbers."""
    subnormal = {torch.float32: -135, torch.bfloat16: -130, torch.float16: -20}[dtype]
    huge = 10 if dtype == torch.float16 else 100
    values = (1.0, 0.0, 2.0**subnormal, 2.0**huge, math.inf, math.nan)
    return dict(zip(SPECIALS, values, strict=True))


class _Draw:
    """The numbers of one case. Exact ones are integers, quarters and powers of two, and so small
    that no sum a kernel may form has more than 24 bits (`float32_is_exact` is the proof)."""

    def __init__(self, case: Case, generator: torch.Generator, exact: bool) -> None:
        self.case, self.generator, self.exact = case, generator, exact

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def weight(self) -> Tensor:
        kind, shape = self.case.w, (self.case.n, self.case.k)
        if kind == "e4m3" and self.exact:
            return self.integers(-16, 16, *shape).to(torch.float8_e4m3fn)
        if kind == "nf4" and self.exact and self.case.units == 1:
            return stored(kind, torch.tensor(NF4_INTEGERS)[self.integers(0, 2, *shape)])
        return stored(kind, self.integers(*CODES[kind], *shape))

    def activations(self) -> Tensor:
        case = self.case
        if case.x in ("s4", "u4"):
            return oracle.pack(self.integers(*CODES[case.x], *case.lead, case.k))
        if self.exact:
            quarters = 4 if case.w == "u4" and case.zero.is_floating_point else 1
            of_integers = {"s8": 128, "s4": 8, "u4": 20, "e4m3": 16}
            largest = of_integers.get(case.w) or int(case.units * max(oracle.TABLES[case.w]))
            largest_weight = largest * 4 * quarters
            bound = max(1, min(100, 2**24 // (largest_weight * max(case.k, 1)) - 3))
            a = self.integers(-bound, bound, *case.lead, case.k).to(X_DTYPE[case.x])
        elif case.x == "s8":
            a = self.integers(-128, 127, *case.lead, case.k).to(torch.int8)
        else:
            a = self.normal(*case.lead, case.k).to(X_DTYPE[case.x])
        if case.x == "s8" and case.k <= 512:
            a[..., :1], a[..., -1:] = -128, 127
        return a

    def _table(self, groups: int) -> tuple[int, ...]:
        n = self.case.n
        shapes: dict[str, tuple[int, ...]] = {"scalar": (), "column": (n, 1), "table": (n,)}
        return (n, groups) if groups > 1 else shapes[self.case.scale_shape]

    def _row_factors(self) -> Tensor:
        special = list(special_scales(self.case.scale).values()) if self.case.special else [1.0]
        return torch.tensor([f for f, _ in zip(cycle(special), range(self.case.n), strict=False)])

    def scales(self) -> Tensor:
        shape = self._table(self.case.groups)
        if self.exact:
            s = torch.exp2(self.integers(-2, 0, *shape).float())
        else:
            s = 0.01 * (0.5 + self.normal(*shape).abs())
        if self.case.special and s.dim():
            s = s * self._row_factors().reshape(-1, *[1] * (s.dim() - 1))
        return s.to(self.case.scale)

    def zeros(self) -> Tensor:
        shape = self._table(self.case.zero_groups or self.case.groups)
        zero = self.case.zero
        if not zero.is_floating_point:
            return self.integers(0 if zero == torch.uint8 else -4, 15, *shape).to(zero)
        z = self.integers(-16, 60, *shape) / 4 if self.exact else 8 + 4 * self.normal(*shape)
        return z.to(zero)

    def _per_token(self) -> tuple[int, ...]:
        lead = self.case.lead
        return {"scalar": (), "flat": lead}.get(self.case.a_scale, (*lead, 1))

    def a_scale(self) -> Tensor:
        shape = self._per_token()
        if self.exact:
            return torch.exp2(self.integers(-1, 1, *shape).float())
        return 0.02 * (0.5 + self.normal(*shape).abs())

    def a_zero(self) -> Tensor:
        dtype = self.case.a_zero
        assert dtype is not None
        low, high = (0, 15) if self.case.x == "u4" else (0 if dtype == torch.uint8 else -3, 3)
        return self.integers(low, high, *self._per_token()).to(dtype)

    def bias(self) -> Tensor:
        n = self.case.n
        b = self.integers(-64, 64, n) / 2 if self.exact else self.normal(n)
        if self.case.special:  # where the sum is tiny or huge, a bias would be rounded away
            b = torch.where(self._row_factors() == 1, b, 0.0)
        return b.to(self.case.bias)

    def residual(self) -> Tensor:
        shape = *self.case.lead, self.case.n
        r = self.integers(-64, 64, *shape) / 2 if self.exact else self.normal(*shape)
        if self.case.special:
            r = torch.where(self._row_factors() == 1, r, 0.0)
        return r.to(self.case.out_dtype)


def float32_is_exact(call: Call) -> bool:
    """Whether no sum that a kernel may form for ``call``, in any order, needs more than 24 bits.

    u4 codes may be summed as q - 8 with zero points z - 8, and zero points may be applied to sums,
    so there must be room for (|x - 8| + |z_x - 8|) * (|q - 8| + |z - 8|) * s.
    """
    case = call.case
    if case.activation not in (None, "relu"):
        return False
    n, k = call.w.shape[0], case.k
    if 0 in (n, k, call.a.numel()):
        return True
    q = oracle.unpack(call.w, k, case.w == "s4") if case.packed else call.w
    units = case.units
    if case.table is not None:
        q = oracle.numbers(case.table, q, X_DTYPE[case.x])
    x = oracle.unpack(call.a, k, case.x == "s4") if case.x in ("s4", "u4") else call.a
    shift_q, shift_x = (8 if kind == "u4" else 0 for kind in (case.w, case.x))
    q = (q.double() - shift_q).abs()
    x = (x.double().reshape(-1, k) - shift_x).abs()
    unit = 0.25 / units  # of s, whose largest value in a row becomes 1
    if "zeros" in call.options:
        zeros = call.options["zeros"]
        q = q + (oracle.per_weight(zeros, n, k) - 8).abs()
        unit *= 0.25 if zeros.is_floating_point() else 1.0
    if "a_zero" in call.options:
        x = x + (call.options["a_zero"].double().reshape(-1, 1) - shift_x).abs()
    s = oracle.per_weight(call.scales, n, k)
    s = (s / s.amax(dim=1, keepdim=True)).nan_to_num(1.0)
    # 2^13: a bias of 32 beside results that are multiples of alpha * a_scale * s * unit >= 2^-8;
    # without a_scale and fractions of zero points, 2^-5 / units
    added = (2**13 if units == 1 else 2**10 * units) * (1 + case.residual)
    return float((x @ (q * s).T).max()) / unit + added < 2**24
