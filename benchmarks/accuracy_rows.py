"""Rows of benchmarks/accuracy.py: what is done to weights and activations, and in which order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from intlass_ops import calibrate, fused_quantize, packing, scales
from intlass_ops.calibrate import InputStatistics
from intlass_ops.gptq import gptq
from intlass_ops.rotation import hadamard_matrix

R = 64  # of the rotations by blocks: it divides every K of the model
BLOCKS, ROWS = f"rotated by {R}", "rows rotated"
OTHER_GROUPS = (32, 128)
# "mse of outputs" weighs the errors by the mean squares of the inputs.
METHODS = ("rtn", "mse", "mse of outputs", "gptq", "hqq", "awq")
Weight = Callable[[Tensor, InputStatistics], Tensor]  # weight, statistics -> its approximation
Activation = Callable[[Tensor], Tensor]


def integer(method: str, group: int | None, bits: int = 4, symmetric: bool = True) -> Weight:
    """Where groups do not divide K (128 and 576), zeros that no input reaches fill the last one."""
    how: dict[str, Any] = {"bits": bits, "group_size": group, "symmetric": symmetric}

    def quantise(w: Tensor, seen: InputStatistics) -> Tensor:
        k = w.shape[1]
        more = -k % group if group else 0
        w, mean_abs = (nn.functional.pad(t, (0, more)) for t in (w, seen.mean_abs))
        h = nn.functional.pad(seen.hessian, (0, more, 0, more))
        if method == "awq":
            found, c = calibrate.awq(w, h, mean_abs=mean_abs, steps=10, **how)
            return (found.dequantize() / c)[:, :k]
        if method == "hqq":
            found = calibrate.hqq(w, group_size=group)
        elif method == "gptq":
            found = gptq(w, h, act_order=True, **how)
        elif method == "mse of outputs":
            found = calibrate.mse(w, weights=h.diagonal(), **how)
        else:
            found = (calibrate.rtn if method == "rtn" else calibrate.mse)(w, **how)
        return found.dequantize()[:, :k]

    return quantise


def better_for_the_outputs(*methods: str) -> Weight:
    """Of each linear, the method that leaves its outputs the smaller error."""

    def quantise(w: Tensor, seen: InputStatistics) -> Tensor:
        found = [integer(method, 64)(w, seen) for method in methods]
        return min(found, key=lambda q: float(calibrate.output_error(w - q, seen.hessian)))

    return quantise


def fp4(format_: str, search: str) -> Weight:
    def quantise(w: Tensor, seen: InputStatistics) -> Tensor:
        options: dict[str, Any] = {"return_dequant": True}
        if format_ == "nvfp4":
            options["global_scale"] = scales.nvfp4_global_scale(w)
        if search == "optimal_hessian":
            g = 16 if format_ == "nvfp4" else 32
            blocks = torch.arange(w.shape[1], device=w.device).view(-1, g)
            options["hessian"] = seen.hessian[blocks[:, :, None], blocks[:, None, :]]
        approximation: Tensor = getattr(scales, f"{format_}_{search}")(w, **options)[-1]
        return approximation

    return quantise


def frame(rotation: str, like: Tensor) -> Tensor | None:
    """The matrix that turns the columns of ``like``: blocks of R, or all as one."""
    if not rotation:
        return None
    return _hadamard(R if rotation == BLOCKS else like.shape[-1], like.dtype, like.device)


@functools.cache
def _hadamard(r: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return hadamard_matrix(r, dtype=dtype, device=device)


def activation(bits: int, method: str = "abs_max") -> Activation:
    """Per token, x ~ codes·scale, of x in the frame of the weights."""

    def quantise(x: Tensor) -> Tensor:
        h = torch.eye(R, device=x.device, dtype=x.dtype)
        op = fused_quantize.fused_quantize_int8 if bits == 8 else fused_quantize.fused_quantize_int4
        codes, s = op(x, h, method=method)
        q = codes if bits == 8 else packing.unpack(codes, x.shape[-1], signed=True)
        return (q.float() * s).to(x.dtype)

    return quantise


def fp4_activation(format_: str, method: str) -> Activation:
    def quantise(x: Tensor) -> Tensor:
        h = torch.eye(R, device=x.device, dtype=x.dtype)
        if format_ == "mxfp4":
            codes, s = fused_quantize.fused_quantize_mx(x, h, method=method)
            codes = packing.unpack(codes, x.shape[-1], signed=False)
            y = scales.mxfp4_dequantize(s, codes)
            return (y if method == "quest" else y / 3).to(x.dtype)
        codes, s = fused_quantize.fused_quantize_nv(x, h, method=method)
        codes = packing.unpack(codes, x.shape[-1], signed=False)
        return scales.nvfp4_dequantize(s, codes).to(x.dtype)

    return quantise


class Row(NamedTuple):
    """``weights`` names what ``weight`` does: rows of equal names that follow each other share it.

    rotation: the frame in which weights, and activations where there is an ``activation``, are
    quantised.
    """

    weights: str
    activations: str = "A16"
    weight: Weight | None = None
    activation: Activation | None = None
    rotation: str = ""

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.weights, self.activations, self.rotation)))


def rows() -> Iterator[Row]:
    """What matters most first: all at g64, then rotations, FP4, and the other group sizes."""
    yield Row("float", "float")
    yield Row("W8 rtn", "A8", integer("rtn", None, 8), activation(8))
    for method in METHODS:
        name, weight = f"W4 g64 {method}", integer(method, 64)
        yield Row(name, weight=weight)
        if method == "mse":
            yield Row(name, "A4", weight, activation(4))
            yield Row("W4 g64 rtn or mse", weight=better_for_the_outputs("rtn", "mse"))
        if method == "gptq":
            yield Row(name, "A8", weight, activation(8))
    yield Row("W4 g64 rtn with zeros", weight=integer("rtn", 64, symmetric=False))
    for method in ("mse", "gptq"):
        name, weight = f"W4 g64 {method}", integer(method, 64)
        if method == "mse":
            yield Row(name, weight=weight, rotation=BLOCKS)
            yield Row(name, "A4", weight, activation(4), BLOCKS)
        yield Row(name, "A4 quest", weight, activation(4, "quest"), BLOCKS)
    for method in ("rtn", "gptq"):
        name, weight = f"W4 g64 {method}", integer(method, 64)
        yield Row(name, "A4", weight, activation(4), ROWS)
        yield Row(name, "A4 quest", weight, activation(4, "quest"), ROWS)
    for format_, method in (("mxfp4", "quest"), ("nvfp4", "abs_max")):
        for search in ("naive", "optimal", "optimal_hessian"):
            weight = fp4(format_, search)
            yield Row(f"{format_} {search}", weight=weight)
            if search == "naive":
                act = fp4_activation(format_, method)
                yield Row(f"{format_} {search}", f"{format_} {method}", weight, act)
        act = fp4_activation(format_, method)
        yield Row(f"{format_} naive", f"{format_} {method}", fp4(format_, "naive"), act, BLOCKS)
    for g in OTHER_GROUPS:
        for method in METHODS:
            yield Row(f"W4 g{g} {method}", weight=integer(method, g))
