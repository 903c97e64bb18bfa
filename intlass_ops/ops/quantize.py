"""Ops `intlass::quantize_dynamic` and `intlass::quantize_static` and their Python functions.

A tensor is quantised row by row after it is viewed as segments [S, L]: one segment per token, per
channel, per group, or one in all. The formulas are in reference.py, the CUDA kernel in
cuda/quantize.cu.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .. import packing, reference
from ..cuda import launch_quantize, plans
from ._library import FLOATS, INTEGERS, define, require_device, require_dtype

Granularity = Literal["token", "tensor", "group", "channel"]
# Elements that are quantised at a time on a CPU: what PyTorch computes on the way stays in a cache.
_CACHED = 1 << 17


def _name(bits: int) -> str:
    if bits not in (4, 8):
        raise ValueError(f"quantize: bits={bits}; expected 4 or 8")
    return f"quantize_int{bits}"


def _segments(
    op: str, x: Tensor, granularity: str, group_size: int | None
) -> tuple[Any, Any, tuple[Any, ...]]:
    """(number, length, scale shape) of the segments of ``x`` that share one scale."""
    require_dtype(op, "x", x.dtype, FLOATS)
    if x.dim() == 0:
        raise ValueError(f"{op}: x is a scalar; expected [..., K]")
    if (granularity == "group") != (group_size is not None):
        raise ValueError(
            f"{op}: granularity={granularity!r} with group_size={group_size}; "
            "a group_size goes with granularity='group' and only with it"
        )
    *lead, k = x.shape
    if granularity == "token":
        return _product(lead), k, (*lead, 1)
    if granularity == "channel":
        return x.shape[0], _product(x.shape[1:]), (x.shape[0], *([1] * (x.dim() - 1)))
    if granularity == "tensor":
        return 1, x.numel(), ()
    if granularity != "group":
        raise ValueError(
            f"{op}: granularity={granularity!r}; expected 'token', 'tensor', 'group' or 'channel'"
        )
    assert group_size is not None
    if group_size < 1 or k % group_size:
        raise ValueError(f"{op}: K={k} is not a multiple of group_size={group_size}")
    return _product(lead) * (k // group_size), group_size, (*lead, k // group_size)


def _product(sizes: Any) -> Any:
    total = 1
    for size in sizes:
        total = total * size
    return total


def stored(x: Tensor, bits: int, lanes: bool = False) -> tuple[tuple[Any, ...], torch.dtype]:
    """Shape and dtype of the codes of ``x``."""
    *lead, k = x.shape
    if bits == 4:
        return (*lead, packing.packed_size(k)), torch.uint8
    return ((*lead, k // 4), torch.int32) if lanes else ((*lead, k), torch.int8)


def empty_outputs(
    x: Tensor, bits: int, scale_shape: tuple[Any, ...], symmetric: bool, lanes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros of ``x``, to be filled; no zeros where they are all 0."""
    shape, dtype = stored(x, bits, lanes)
    return (
        x.new_empty(shape, dtype=dtype),
        x.new_empty(scale_shape, dtype=torch.float32),
        x.new_empty((0,) if symmetric else scale_shape, dtype=torch.int32),
    )


def _codes(x: Tensor, q: Tensor, bits: int, lanes: bool = False) -> Tensor:
    q = q.view(x.shape)
    if lanes:
        return packing.to_lanes(q)
    return packing.pack(q) if bits == 4 else q


def require_options(
    op: str,
    x: Tensor,
    bits: int,
    symmetric: bool,
    full_range: bool,
    lanes: bool,
    seed: int | None = None,
) -> None:
    """Raise unless ``full_range`` and ``lanes`` are False or go with the other options."""
    if full_range and (bits, symmetric, seed) != (8, True, None):
        raise ValueError(
            f"{op}: full_range=True with bits={bits}, symmetric={symmetric}, seed={seed}; "
            "it has 8 bits, is symmetric and rounds to nearest"
        )
    if lanes and bits != 8:
        raise ValueError(f"{op}: lanes=True with bits={bits}; lanes are of INT8 codes")
    if lanes and x.shape[-1] % 32:
        raise ValueError(f"{op}: K={x.shape[-1]} is not a multiple of 32, as lanes need")


def _check_dynamic(
    x: Tensor,
    bits: int,
    granularity: str,
    group_size: int | None,
    symmetric: bool,
    seed: int | None,
    full_range: bool,
    lanes: bool,
) -> tuple[Any, Any, tuple[Any, ...]]:
    op = _name(bits)
    segments = _segments(op, x, granularity, group_size)
    require_options(op, x, bits, symmetric, full_range, lanes, seed)
    return segments


def _dynamic_fake(
    x: Tensor,
    bits: int,
    granularity: str,
    group_size: int | None,
    symmetric: bool,
    seed: int | None,
    full_range: bool = False,
    lanes: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, shape = _check_dynamic(
        x, bits, granularity, group_size, symmetric, seed, full_range, lanes
    )
    return empty_outputs(x, bits, shape, symmetric, lanes)


def _quantize_rows(
    rows: Tensor, bits: int, symmetric: bool, seed: int | None, full_range: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [S, L], scales [S, 1] and zeros, [S, 1] or empty, of rows [S, L]."""
    no_zero = rows.new_empty(0, dtype=torch.int32)
    if full_range:
        return *reference.quantize_full_range(rows), no_zero
    scale, zero = reference.quantization_parameters(rows, bits, symmetric)
    q = reference.quantize(rows, scale, zero, bits, seed)
    return q, scale, no_zero if zero is None else zero


def _dynamic_cpu(
    x: Tensor,
    bits: int,
    granularity: str,
    group_size: int | None,
    symmetric: bool,
    seed: int | None,
    full_range: bool = False,
    lanes: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    number, length, shape = _check_dynamic(
        x, bits, granularity, group_size, symmetric, seed, full_range, lanes
    )
    rows = x.reshape(number, length).contiguous()
    # A stochastic code depends on its place in the tensor.
    at_once = number if seed is not None else _CACHED // max(length, 1)
    parts = [
        _quantize_rows(part, bits, symmetric, seed, full_range)
        for part in rows.split(max(at_once, 1))
    ]
    q, scale, zero = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return _codes(x, q, bits, lanes), scale.view(shape), zero if symmetric else zero.view(shape)


def quantize_tokens(
    x: Tensor, bits: int, symmetric: bool, full_range: bool, lanes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What `quantize_dynamic` returns for one scale per token, computed in PyTorch."""
    return _dynamic_cpu(x, bits, "token", None, symmetric, None, full_range, lanes)


def _dynamic_cuda(
    x: Tensor,
    bits: int,
    granularity: str,
    group_size: int | None,
    symmetric: bool,
    seed: int | None,
    full_range: bool = False,
    lanes: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    key = (
        plans.signature(x),
        bits,
        granularity,
        group_size,
        symmetric,
        seed is None,
        full_range,
        lanes,
        x.data_ptr() % 16,
    )
    plan = launch_quantize.find(key)
    if plan is None:
        number, length, shape = _check_dynamic(
            x, bits, granularity, group_size, symmetric, seed, full_range, lanes
        )
        # The kernel packs within a segment, so INT4 segments must not share or straddle a byte; one
        # scale for the whole tensor is a reduction over all blocks, which PyTorch does well.
        bytewise = bits == 8 or granularity == "token" or (length % 2 == 0 and x.shape[-1] % 2 == 0)
        if granularity == "tensor" or not bytewise:
            return _dynamic_cpu(
                x, bits, granularity, group_size, symmetric, seed, full_range, lanes
            )
        plan = launch_quantize.make(
            key,
            x,
            number,
            length,
            stored(x, bits, lanes),
            shape,
            bits,
            symmetric,
            seed is not None,
            full_range=full_range,
            lanes=lanes,
        )
    return plan.run(x, seed)


def _per_segment(op: str, name: str, t: Tensor, number: Any, shape: tuple[Any, ...]) -> Tensor:
    """View a given scale or zero as [S, 1] or [1, 1]."""
    if t.dim() == 0 or t.shape == (1,):
        return t.reshape(1, 1)
    flat = tuple(shape[:-1]) if shape[-1:] == (1,) else tuple(shape)
    if tuple(t.shape) in (tuple(shape), flat):
        return t.reshape(number, 1)
    raise ValueError(
        f"{op}: {name} has shape {tuple(t.shape)}; expected {tuple(shape)} or a scalar"
    )


def _check_static(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    granularity: str,
    group_size: int | None,
) -> tuple[Any, Any, Tensor, Tensor | None]:
    op = _name(bits)
    number, length, shape = _segments(op, x, granularity, group_size)
    require_device(op, x, scale=scale, zero=zero)
    require_dtype(op, "scale", scale.dtype, FLOATS)
    if zero is not None:
        require_dtype(op, "zero", zero.dtype, (*FLOATS, *INTEGERS))
    rows_scale = _per_segment(op, "scale", scale, number, shape)
    rows_zero = None if zero is None else _per_segment(op, "zero", zero, number, shape)
    return number, length, rows_scale, rows_zero


def _static_fake(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    granularity: str,
    group_size: int | None,
    seed: int | None,
) -> Tensor:
    _check_static(x, scale, zero, bits, granularity, group_size)
    shape, dtype = stored(x, bits)
    return x.new_empty(shape, dtype=dtype)


def _static(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    granularity: str,
    group_size: int | None,
    seed: int | None,
) -> Tensor:
    number, length, scale, zero = _check_static(x, scale, zero, bits, granularity, group_size)
    rows = x.reshape(number, length).contiguous()
    q = reference.quantize(rows, scale, zero, bits, seed)
    return _codes(x, q, bits)


def no_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def no_gradient(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(
        "quantize_int8, quantize_int4: rounding has no gradient to pass on; detach x"
    )


define(
    "quantize_dynamic(Tensor x, int bits, str granularity, int? group_size, bool symmetric, "
    "SymInt? seed, bool full_range=False, bool lanes=False) -> (Tensor, Tensor, Tensor)",
    fake=_dynamic_fake,
    cpu=_dynamic_cpu,
    cuda=_dynamic_cuda,
    setup_context=no_setup,
    backward=no_gradient,
)
define(
    "quantize_static(Tensor x, Tensor scale, Tensor? zero, int bits, str granularity, "
    "int? group_size, SymInt? seed) -> Tensor",
    fake=_static_fake,
    cpu=_static,
    cuda=_static,
    setup_context=no_setup,
    backward=no_gradient,
)


def _quantize(
    bits: int,
    x: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    granularity: str,
    group_size: int | None,
    symmetric: bool,
    rounding: str,
    seed: int | None,
    full_range: bool = False,
    lanes: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    op = f"quantize_int{bits}"
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"{op}: rounding={rounding!r}; expected 'nearest' or 'stochastic'")
    if rounding == "nearest":
        if seed is not None:
            raise ValueError(f"{op}: seed={seed} has no meaning with rounding='nearest'")
    elif seed is None:
        seed = int(torch.randint(2**62, ()))
    elif not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: seed={seed} does not fit into 64 bits")
    if scale is not None:
        if full_range:
            raise ValueError(f"{op}: full_range=True computes the scale, and one is given")
        if lanes:
            raise ValueError(f"{op}: lanes=True computes the scale, and one is given")
        q: Tensor = torch.ops.intlass.quantize_static(
            x, scale, zero, bits, granularity, group_size, seed
        )
        return q
    if zero is not None:
        raise ValueError(f"{op}: zero is given without a scale")
    q, scale, zero = torch.ops.intlass.quantize_dynamic(
        x, bits, granularity, group_size, symmetric, seed, full_range, lanes
    )
    return q, scale, None if symmetric else zero


def quantize_int8(
    x: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    *,
    granularity: Granularity = "token",
    group_size: int | None = None,
    symmetric: bool = True,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int | None = None,
    full_range: bool = False,
    lanes: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    """Quantise to INT8 so that x ~ (q - zero) * scale.

        symmetric    scale = amax / 127,  q = round(x / scale) in [-127, 127],  zero None
        asymmetric   scale = (max(x,0) - min(x,0)) / 255,  zero = round(-128 - min(x,0) / scale),
                     q = round(x / scale) + zero in [-128, 127]
        full_range   scale = max(amax / 127.5, 2^-23), rounded to the dtype of x,
                     q = round(x * (1 / scale)) in [-128, 127],  zero None: torchao's arithmetic

    ``x``: fp32, bf16 or fp16 [..., K], any strides. One scale (fp32) and zero (int32) per
    ``granularity``: "token" [..., 1]; "group" of ``group_size`` along K [..., K/group_size];
    "channel" (index of the first dimension) [N, 1, ...]; "tensor" []. Computed in fp32.
    ``rounding``: "nearest" ties to even; "stochastic" is unbiased, drawn from (seed, index) alone.
    ``lanes``: q is int32 [..., K/4], the same codes in the order that a product with INT4 weights
    takes fastest on a Hopper GPU where there are many tokens (`intlass_ops.packing`).

    Returns (q, scale, zero or None); with ``scale`` given, only q int8 [..., K] (``zero`` None
    saturates to [-127, 127]; a floating zero is added before rounding, an integer one after).
    Zeros give scale 1 (``full_range``: 2^-23). NaN quantises to 0, but its scale is NaN, and so is
    whatever is made of it.

    Raises TypeError for other dtypes, ValueError for shapes or options that do not fit.

    >>> import torch
    >>> q, scale, zero = quantize_int8(torch.tensor([[-1.0, 0.5, 127.0]]))
    >>> q, scale
    (tensor([[ -1,   0, 127]], dtype=torch.int8), tensor([[1.]]))
    """
    return _quantize(
        8, x, scale, zero, granularity, group_size, symmetric, rounding, seed, full_range, lanes
    )


def quantize_int4(
    x: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    *,
    granularity: Granularity = "token",
    group_size: int | None = None,
    symmetric: bool = True,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    """Quantise to INT4, packed: as :func:`quantize_int8` with other ranges.

        symmetric    scale = amax / 7,  q in [-7, 7]  (s4)
        asymmetric   scale = (max(x,0) - min(x,0)) / 15,  zero = round(-min(x,0) / scale),
                     q in [0, 15]  (u4)

    q is uint8 [..., ceil(K/2)] in the layout of :func:`pack_int4`; the rest is as for INT8.

    >>> import torch
    >>> q, scale, zero = quantize_int4(torch.tensor([[-7.0, 1.0, 2.0]]))
    >>> q, scale
    (tensor([[25,  2]], dtype=torch.uint8), tensor([[1.]]))
    """
    return _quantize(4, x, scale, zero, granularity, group_size, symmetric, rounding, seed)
