"""What an instruction makes of its operands' values: arrays with one element a thread.

Values come and go as unsigned integers of a register's width, predicates as bool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .text import Instruction

Values = Any  # np.ndarray, or a NumPy scalar
NUMPY = {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "u16": np.uint16, "s16": np.int16,
    "b16": np.uint16, "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "u64": np.uint64,
    "s64": np.int64, "b64": np.uint64, "f16": np.float16, "f32": np.float32, "f64": np.float64,
}  # fmt: skip
_CANONICAL_NAN = np.uint32(0x7FFFFFFF)


def to_odd(x: Values, error: Values) -> Values:
    """float64 x, off by ``error``, rounded to odd instead of to nearest."""
    even = (x.view(np.uint64) & np.uint64(1)) == 0
    toward = np.nextafter(x, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even & np.isfinite(x), toward, x)


def to_float32(x: Values) -> Values:
    """Bits of float32, from float64 that is exact or rounded to odd."""
    return x.astype(np.float32).view(np.uint32)


def _odd_float32(x: Values) -> Values:
    f = x.astype(np.float32)
    error = x - f.astype(np.float64)
    even = (f.view(np.uint32) & np.uint32(1)) == 0
    toward = np.nextafter(f, np.where(error > 0, np.inf, -np.inf).astype(np.float32))
    return np.where((error != 0) & even & np.isfinite(f), toward, f)


def to_bfloat16(x: Values) -> Values:
    """The same as bits of bfloat16."""
    bits = _odd_float32(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def to_float16(x: Values) -> Values:
    bits = _odd_float32(x).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), 0x7FFF, bits).astype(np.uint16)


def of_bfloat16(bits: Values) -> Values:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def of_float16(bits: Values) -> Values:
    return bits.view(np.float16).astype(np.float64)


def of_float32(bits: Values) -> Values:
    return bits.view(np.float32).astype(np.float64)


def of_e4m3(bits: Values) -> Values:
    bits = bits.astype(np.int64)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    value = np.where((bits & 0x7F) == 0x7F, np.nan, value)
    return np.where(bits & 0x80, -value, value)


def of_e5m2(bits: Values) -> Values:
    return of_float16(bits.astype(np.uint16) << np.uint16(8))


FLOATS: dict[str, tuple[Callable[[Values], Values], Callable[[Values], Values]]] = {
    "f32": (of_float32, to_float32),
    "f16": (of_float16, to_float16),
    "bf16": (of_bfloat16, to_bfloat16),
    "f64": (lambda bits: bits.view(np.float64), lambda x: x.view(np.uint64)),
}


def pairs(operation: Callable[..., Values], kind: str, *words: Values) -> Values:
    """An operation on both halves of words: f16x2, bf16x2."""
    read, write = FLOATS[kind.removesuffix("x2")]
    halves = []
    for shift in (0, 16):
        parts = [read((w >> np.uint32(shift)).astype(np.uint16)) for w in words]
        halves.append(write(operation(*parts)).astype(np.uint32) << np.uint32(shift))
    return halves[0] | halves[1]


def fused(a: Values, b: Values, c: Values) -> Values:
    """a * b + c in float64 for products that are exact there, rounded to odd."""
    product = a * b
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    return to_odd(total, np.where(np.isfinite(total), error, 0.0))


def signed(x: Values, kind: str) -> Values:
    return x.view(NUMPY[kind])


def _bits(x: Values, kind: str) -> Values:
    size = np.dtype(NUMPY[kind]).itemsize
    return np.ascontiguousarray(x).view(f"u{size}") if size > 1 else x


def integers(i: Instruction, *values: Values) -> Values:
    """add, sub, mul, mad, div, rem, min, max, abs, neg of integers."""
    kind = i.types[-1]
    if kind.endswith("x2"):
        return _of_halves(i, *values)
    a, *rest = (signed(v, kind) for v in values)
    wide = {2: np.int32, 4: np.int64}.get(a.dtype.itemsize)
    if kind.startswith("u"):
        wide = {2: np.uint32, 4: np.uint64}.get(a.dtype.itemsize)
    if i.name in ("mul", "mad"):
        if "wide" in i.modifiers:
            product = a.astype(wide) * rest[0].astype(wide)
            return (product if i.name == "mul" else product + rest[1].view(wide)).view(
                f"u{product.dtype.itemsize}"
            )
        if "hi" in i.modifiers:
            if wide is None:
                exact = np.asarray(a).astype(object) * rest[0].astype(object)
                return (exact >> 64 & (2**64 - 1)).astype(np.uint64)
            shift = np.array(8 * a.dtype.itemsize, dtype=wide)
            product = (a.astype(wide) * rest[0].astype(wide) >> shift).astype(a.dtype)
        else:
            product = a * rest[0]
        return _bits(product if i.name == "mul" else product + rest[1], kind)
    if i.name in ("div", "rem"):
        b = rest[0]
        if np.any(b == 0):
            raise ZeroDivisionError(i.line)
        quotient = np.abs(a) // np.abs(b) if kind.startswith("s") else a // b
        if kind.startswith("s"):
            quotient = np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)
        return _bits(quotient if i.name == "div" else a - quotient * b, kind)
    operation: Any = {
        "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "abs": np.abs,
        "neg": np.negative,
    }[i.name]  # fmt: skip
    return _bits(operation(a, *rest), kind)


def _least(nan: bool, name: str) -> Callable[..., Values]:
    """min or max: of two zeros the one that is -0 is less; a NaN wins where it is asked for."""
    plain: Any = {"min": np.fmin, "max": np.fmax}[name]
    if nan:
        plain = {"min": np.minimum, "max": np.maximum}[name]
    one = np.logical_or if name == "min" else np.logical_and

    def operation(a: Values, b: Values) -> Values:
        zero = np.where(one(np.signbit(a), np.signbit(b)), -0.0, 0.0).astype(a.dtype)
        return np.where((a == 0) & (b == 0), zero, plain(a, b))

    return operation


def floats(i: Instruction, *values: Values) -> Values:
    """The arithmetic of f32, f64 and pairs of 16 bits."""
    kind = i.types[-1]
    x: Any
    operation: Any
    if i.name == "fma" or (i.name == "mad" and kind.startswith("f")):
        operation = fused
    elif i.name in ("min", "max"):
        operation = _least("NaN" in i.modifiers, i.name)
    elif i.name == "ex2":
        operation = np.exp2
    elif i.name == "rcp":
        operation = np.reciprocal
    else:
        operation = {
            "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
            "abs": np.abs, "neg": np.negative, "sqrt": np.sqrt, "tanh": np.tanh, "lg2": np.log2,
        }[i.name]  # fmt: skip
    if kind.endswith("x2"):
        return pairs(operation, kind, *values)
    read, write = FLOATS[kind]
    if kind == "f32" and i.name in ("add", "sub", "mul", "abs", "neg", "div", "sqrt", "rcp"):
        x = operation(*(v.view(np.float32) for v in values))  # rounded once, as IEEE has it
        if i.name == "rcp":
            x = np.float32(1) / values[0].view(np.float32)
        if "sat" in i.modifiers:
            x = np.where(np.isnan(x), np.float32(0), np.clip(x, 0, 1)).astype(np.float32)
        return np.asarray(x).view(np.uint32)
    if kind == "f32" and i.name in ("min", "max"):
        bits = operation(*(v.view(np.float32) for v in values))
        return np.where(np.isnan(bits), _CANONICAL_NAN, bits.view(np.uint32))
    x = operation(*(read(v) for v in values))
    if "sat" in i.modifiers:
        x = np.where(np.isnan(x), 0.0, np.clip(x, 0, 1))
    return write(np.asarray(x))


def bitwise(i: Instruction, *values: Values) -> Values:
    if values[0].dtype == bool:
        operation: Any = {
            "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
            "not": np.logical_not,
        }[i.name]  # fmt: skip
        return operation(*values)
    return {
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    }[i.name](*values)  # fmt: skip


def shift(i: Instruction, a: Values, count: Values) -> Values:
    kind = i.types[-1]
    size = 8 * a.dtype.itemsize
    value = signed(a, kind)
    n = np.minimum(count.astype(np.int64), size)
    whole = n >= size
    n = np.where(whole, 0, n).astype(value.dtype)
    shifted = value << n if i.name == "shl" else value >> n
    gone = (value >> value.dtype.type(size - 1)) if kind.startswith("s") and i.name == "shr" else 0
    return np.where(whole, gone, shifted).astype(value.dtype).view(a.dtype)


def funnel(i: Instruction, low: Values, high: Values, count: Values) -> Values:
    """shf: 32 bits of two words."""
    both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
    n = count & np.uint32(31) if "wrap" in i.modifiers else np.minimum(count, 32)
    n = n.astype(np.uint64)
    if "l" in i.modifiers:
        return (both << n >> np.uint64(32)).astype(np.uint32)
    return (both >> n & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def lop3(_: Instruction, a: Values, b: Values, c: Values, table: Values) -> Values:
    result = a & np.uint32(0) | b & np.uint32(0)
    for k in range(8):
        if int(np.asarray(table).flat[0]) >> k & 1:
            result = result | ((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c))
    return result


def prmt(_: Instruction, a: Values, b: Values, selector: Values) -> Values:
    both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    result = np.uint32(0)
    for k in range(4):
        s = (selector >> np.uint32(4 * k) & np.uint32(15)).astype(np.uint64)
        byte = (both >> (np.uint64(8) * (s & np.uint64(7))) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result = result | np.where(s & np.uint64(8), sign, byte) << np.uint32(8 * k)
    return result.astype(np.uint32)


def bfi(_: Instruction, a: Values, b: Values, start: Values, length: Values) -> Values:
    one, t = b.dtype.type(1), b.dtype.type
    start, length = (np.asarray(v).astype(b.dtype) & t(255) for v in (start, length))
    bits = t(8 * b.dtype.itemsize)
    ones = np.where(length >= bits, ~t(0), (one << np.minimum(length, bits - one)) - one)
    mask = np.where(start >= bits, t(0), ones << np.minimum(start, bits - one))
    return b & ~mask | a << np.minimum(start, bits - one) & mask


def bfe(i: Instruction, a: Values, start: Values, length: Values) -> Values:
    value = signed(a, i.types[-1]).astype(np.int64)
    start, length = (np.asarray(v).astype(np.int64) & 255 for v in (start, length))
    field = value >> start & ((1 << length) - 1)
    if i.types[-1].startswith("s"):
        field = np.where(field >> np.maximum(length - 1, 0) & 1, field - (1 << length), field)
    return field.astype(NUMPY[i.types[-1]]).view(a.dtype)


def compare(i: Instruction, a: Values, b: Values) -> Values:
    how, kind = i.modifiers[0], i.types[-1]
    if kind == "pred" or a.dtype == bool:
        return {"eq": a == b, "ne": a != b}[how]
    x, y = (v.view(NUMPY[kind]) for v in (a, b))
    if kind.startswith("f"):
        nan = np.isnan(x) | np.isnan(y)
        if how in ("num", "nan"):
            return ~nan if how == "num" else nan
        if how.endswith("u") and how != "u":
            return nan | _COMPARE[how[:-1]](x, y)
        return ~nan & _COMPARE[how](x, y)
    return _COMPARE[{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(how, how)](x, y)


_COMPARE: dict[str, Any] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip
_ROUNDS: dict[str, Any] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def convert(i: Instruction, *values: Values) -> Values:
    """cvt: into the first type named from the second."""
    m = i.modifiers
    if "e4m3x2" in m:
        return _of_e4m3x2(*values) if m[-1] == "e4m3x2" else _to_e4m3x2(*values)
    if "bf16x2" in m or "f16x2" in m:  # of two floats, the first in the upper half
        write = FLOATS[(m[-2]).removesuffix("x2")][1]
        high, low = (write(of_float32(v)).astype(np.uint32) for v in values)
        return high << np.uint32(16) | low
    into, source = i.types[-2:]
    (value,) = values
    if into == "bf16":
        return to_bfloat16(FLOATS[source][0](value))
    if source in FLOATS:
        x = FLOATS[source][0](value)
        rounding = next((_ROUNDS[r] for r in m if r in _ROUNDS), None)
        if into in FLOATS:
            if rounding is not None:
                x = rounding(x)
            if "sat" in m:
                x = np.where(np.isnan(x), 0.0, np.clip(x, 0, 1))
            return FLOATS[into][1](np.asarray(x))
        info = np.iinfo(NUMPY[into])
        assert rounding is not None, i.line
        x = np.where(np.isnan(x), 0.0, rounding(x))
        low, high = float(info.min), float(info.max)
        inside = np.clip(x, low, np.nextafter(high, 0) if info.bits == 64 else high)
        whole = np.where(x >= high, info.max, inside.astype(NUMPY[into]))
        return whole.astype(NUMPY[into]).view(f"u{info.bits // 8}")
    size = np.dtype(NUMPY[source]).itemsize
    if value.dtype.itemsize > size:  # the lower bits of a wider register
        value = value.astype(f"u{size}")
    x = value.view(NUMPY[source])
    if into in FLOATS:
        exact = x.astype(np.float64)
        if size == 8:
            exact = to_odd(exact, (x - exact.astype(x.dtype)).astype(np.float64))
        if "rz" in m:
            f = exact.astype(np.float32)
            beyond = np.abs(f.astype(np.float64)) > np.abs(exact)
            return np.where(beyond, np.nextafter(f, np.float32(0)), f).view(np.uint32)
        return FLOATS[into][1](exact)
    if "sat" in m:
        info = np.iinfo(NUMPY[into])
        x = np.clip(x, info.min, info.max)
    return np.asarray(x).astype(NUMPY[into]).view(f"u{np.dtype(NUMPY[into]).itemsize}")


def _of_e4m3x2(value: Values) -> Values:
    low, high = (to_float16(of_e4m3(value >> np.uint16(s) & np.uint16(255))) for s in (0, 8))
    return high.astype(np.uint32) << np.uint32(16) | low


_E4M3 = of_e4m3(np.arange(127, dtype=np.uint8))


def _to_e4m3x2(high: Values, low: Values) -> Values:
    return _to_e4m3(high) << np.uint16(8) | _to_e4m3(low)


def _to_e4m3(value: Values) -> Values:
    x = of_float32(value)
    a = np.minimum(np.abs(x), 448.0)
    above = np.clip(np.searchsorted(_E4M3, a), 0, 126)
    below = np.maximum(above - 1, 0)
    up, down = _E4M3[above] - a, a - _E4M3[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    code = np.where(np.isnan(x), 0x7F, code | np.where(np.signbit(x), 0x80, 0))
    return code.astype(np.uint16)


def popc(_: Instruction, a: Values) -> Values:
    return np.array([int(v).bit_count() for v in np.atleast_1d(a)], np.uint32)


def brev(_: Instruction, a: Values) -> Values:
    return np.array([int(f"{int(v):032b}"[::-1], 2) for v in np.atleast_1d(a)], np.uint32)


def bfind(i: Instruction, a: Values) -> Values:
    """The place of the highest bit, or how far it lies below the top; all ones if there is none."""
    place = np.array([int(v).bit_length() - 1 for v in np.atleast_1d(a)])
    if "shiftamt" in i.modifiers:
        place = np.where(place < 0, place, 31 - place)
    return place.astype(np.int32).view(np.uint32)


def clz(_: Instruction, a: Values) -> Values:
    return np.array([32 - int(v).bit_length() for v in np.atleast_1d(a)], np.uint32)


def _lanes(words: Values, kind: str) -> Values:
    """int64 [..., 4 or 2]: the bytes or half words of words."""
    typed = np.ascontiguousarray(words)[..., None].view(kind)
    return typed.astype(np.int64)


def dp4a(i: Instruction, a: Values, b: Values, c: Values) -> Values:
    kinds = ["i1" if t == "s32" else "u1" for t in i.types]
    a, b = np.broadcast_arrays(a, b)
    products = _lanes(a, kinds[0]) * _lanes(b, kinds[1])
    return (products.sum(-1) + c.astype(np.int64)).astype(np.uint32)


def _of_halves(i: Instruction, a: Values, b: Values) -> Values:
    """min, max and add of u16x2 and s16x2."""
    kind = i.types[-1][0].replace("s", "i") + "2"
    operation: Any = {"max": np.maximum, "min": np.minimum, "add": np.add}[i.name]
    a, b = np.broadcast_arrays(a, b)
    parts = operation(_lanes(a, kind), _lanes(b, kind)).astype("u2")
    return parts.view(np.uint32)[..., 0]


def video(i: Instruction, a: Values, b: Values, c: Values) -> Values:
    """vmax2, vmax4, vsub4, ... of the parts of words; c is added by none that we know."""
    assert not np.any(c), i.line
    size = 4 // int(i.name[-1])
    kind = ("i" if i.types[0].startswith("s") else "u") + str(size)
    a, b = np.broadcast_arrays(a, b)
    operation: Any = {"vmax": np.maximum, "vmin": np.minimum, "vsub": np.subtract,
                      "vadd": np.add}[i.name[:-1]]  # fmt: skip
    parts = operation(_lanes(a, kind), _lanes(b, kind)).astype(f"u{size}")
    return parts.view(np.uint32)[..., 0]


OPERATIONS: dict[str, Callable[..., Values]] = {
    "shl": shift, "shr": shift, "shf": funnel, "lop3": lop3, "prmt": prmt, "bfi": bfi, "bfe": bfe,
    "setp": compare, "cvt": convert, "popc": popc, "brev": brev, "bfind": bfind, "clz": clz,
    "dp4a": dp4a,
    **{f"v{name}{parts}": video for name in ("max", "min", "sub", "add") for parts in (2, 4)},
    **dict.fromkeys(("and", "or", "xor", "not"), bitwise),
}  # fmt: skip
_BOTH = (
    "add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "abs", "neg", "rcp", "sqrt",
    "ex2", "lg2", "tanh",
)  # fmt: skip


def operation_of(i: Instruction) -> Callable[..., Values] | None:
    if i.name in _BOTH and i.types:
        kind = i.types[-1]
        return floats if kind.startswith(("f", "bf")) else integers
    return OPERATIONS.get(i.name)
