"""`intlass tune`: the search for the fastest configuration of a problem, and how one is measured.

Here: which problems there are, the search, compiling its candidates, running them on a GPU. Not
here: what may be chosen (config.candidates), the tables (config/tuned.py), the command line
(commands/tune.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import config
from ..config import Device, Matmul, Shape, tuned
from ..cuda import compiler, cubin, launch, source
from ..errors import KernelCompileError
from ..ops import (
    matmul_fp8_bf16_tn,
    matmul_int4_bf16_tn,
    matmul_int8_bf16_tn,
    matmul_lut4_bf16_tn,
)
from . import timing

# So much longer than the best so far, and a candidate is not timed again.
_HOPELESS = 1.1
# Between times this close the predicted configuration stays: they differ by chance.
_CHANCE = 0.99
_FINALISTS = 3
_MOST_CALLS_US = 3000.0  # of one CUDA graph
_DIFFERENCE = 2.0**-6  # of the largest output: two orders of summation differ by less


@dataclass(frozen=True)
class Scheme:
    """Kinds of both operands, as the ops are most often called with them."""

    x_kind: str
    w_kind: str
    group_size: int | None  # None: one scale a row
    scale_type: str = "__nv_bfloat16"

    def shape(self, m: int, n: int, k: int) -> Shape:
        return Shape(
            x_kind=self.x_kind,
            w_kind=self.w_kind,
            scale_type=self.scale_type,
            zero_type="unsigned char" if self.w_kind == "u4" else "float",
            out_type="__nv_bfloat16",
            has_zeros=self.w_kind == "u4",
            has_a_zero=False,
            aligned=True,
            m=m,
            n=n,
            k=k,
            group_size=self.group_size or k,
        )


SCHEMES = {
    "w4a16": Scheme("bf16", "s4", 128),
    "w4a16z": Scheme("bf16", "u4", 128),
    "w8a16": Scheme("bf16", "s8", None, "float"),
    "fp8a16": Scheme("bf16", "e4m3", None, "float"),
    "fp8a16g": Scheme("bf16", "e4m3", 128, "float"),
    "nf4a16": Scheme("bf16", "nf4", 64, "float"),
    "w8a8": Scheme("s8", "s8", None, "float"),
    "w4a8": Scheme("s8", "s4", 128),
    "w4a8c": Scheme("s8", "s4", None, "float"),
    "w4a4": Scheme("s4", "s4", 128),
}


class Timed(NamedTuple):
    us: float
    config: Matmul


Measure = Callable[[Matmul, float, float], float]  # candidate, give up at, for so many seconds


def search(candidates: Iterable[Matmul], measure: Measure, seconds: float) -> list[Timed]:
    """All candidates with their times, the fastest first; the first candidate is the one to beat.

    Each is timed shortly, then the fastest for ``seconds``. A time of infinity is a refusal.
    """
    found: list[Timed] = []
    best = math.inf
    for c in candidates:
        us = measure(c, _HOPELESS * best, 0.0)
        best = min(best, us)
        found.append(Timed(us, c))
    if not found:
        return []
    first = found[0].config
    found = sorted((t for t in found if t.us < math.inf), key=lambda t: t.us)
    again = [t for i, t in enumerate(found) if i < _FINALISTS or t.config == first]
    finalists = [Timed(measure(t.config, math.inf, seconds), t.config) for t in again]
    finalists.sort(key=lambda t: t.us * (_CHANCE if t.config == first else 1.0))
    return finalists + [t for t in found if t not in again]


def compile_all(configs: Iterable[Matmul], arch: str) -> dict[Matmul, str]:
    """Compile in parallel, into the kernel cache. Returns what must not be chosen, and why."""

    def problem(c: Matmul) -> str | None:
        try:
            image = compiler.compile_cubin(c, arch)
        except KernelCompileError as error:
            return str(error)
        spilled = cubin.stack_bytes(image)
        return f"{spilled} bytes of local memory a thread" if spilled else None

    unique = list(dict.fromkeys(configs))
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        problems = pool.map(problem, unique)
        return {c: why for c, why in zip(unique, problems, strict=True) if why is not None}


class Layer:
    """Random operands of one layer on a GPU, in copies of weights and scales that are cold."""

    def __init__(self, scheme: Scheme, n: int, k: int, device: torch.device) -> None:
        self.scheme, self.n, self.k, self.device = scheme, n, k, device
        self.bits = config.BITS[scheme.w_kind]
        weights = self._codes(n, k, self.bits)
        if scheme.w_kind == "e4m3":  # of numbers of one sign and from one to two
            weights = (weights & 7 | 56).view(torch.float8_e4m3fn)
        self.copies = timing.copies_of(weights.numel())
        groups = k // scheme.group_size if scheme.group_size else 1
        dtype = torch.float32 if scheme.scale_type == "float" else torch.bfloat16
        scales = self._positive(n, groups).to(dtype)
        zeros = None
        if scheme.w_kind == "u4":
            zeros = torch.randint(0, 16, (n, groups), dtype=torch.uint8, device=device)
        self.weights = [(weights, scales, zeros)]
        for _ in range(self.copies - 1):
            copy = None if zeros is None else zeros.clone()
            self.weights.append((weights.clone(), scales.clone(), copy))

    def _codes(self, rows: int, columns: int, bits: int) -> Tensor:
        if bits == 8:
            return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=self.device)
        size = rows, columns // 2
        return torch.randint(0, 256, size, dtype=torch.uint8, device=self.device)

    def _positive(self, *shape: int) -> Tensor:
        return 1e-3 * (0.5 + torch.rand(*shape, device=self.device))

    def measure(self, m: int) -> Measure:
        """Times candidates at M = m, having compared their results with the first one's."""
        if self.scheme.x_kind == "bf16":
            x, x_scale = torch.randn(m, self.k, device=self.device).to(torch.bfloat16), None
        else:
            x = self._codes(m, self.k, config.BITS[self.scheme.x_kind])
            x_scale = self._positive(m, 1)
        about = 3 + 1e-8 * m * self.n * self.k  # microseconds, at 200 TOPS
        calls = max(2, min(max(20, self.copies), int(_MOST_CALLS_US / about)))
        expected: list[Tensor] = []

        def call(i: int) -> Tensor:
            w, scales, zeros = self.weights[i]
            if self.scheme.w_kind == "e4m3":
                return matmul_fp8_bf16_tn(x, w, scales, out_dtype=torch.bfloat16)
            if self.scheme.w_kind == "nf4":
                return matmul_lut4_bf16_tn(x, w, scales, out_dtype=torch.bfloat16)
            if self.bits == 8:
                return matmul_int8_bf16_tn(x, w, x_scale, scales, out_dtype=torch.bfloat16)
            return matmul_int4_bf16_tn(
                x, w, scales, zeros, a_scale=x_scale, out_dtype=torch.bfloat16
            )

        def measure(c: Matmul, give_up: float, seconds: float) -> float:
            with launch.forced(c):
                y = call(0).float()
                if not expected:
                    expected.append(y)
                limit = _DIFFERENCE * expected[0].abs().max()
                if not bool((y - expected[0]).abs().max() <= limit):
                    return math.inf
                return timing.microseconds(
                    call, self.copies, "cuda", seconds, calls=calls, give_up=give_up
                )

        return measure


def entry(device: Device, shape: Shape, timed: Iterable[Timed]) -> tuned.Entry | None:
    """What a table keeps: the first of the timed configurations that ``device`` may choose."""
    of, legal = tuned.class_of(device, shape), set(config.candidates(device, shape))
    found = [t for t in timed if t.config in legal]
    if of is None or not found:
        return None
    best, before = found[0], config.predicted(device, shape)
    predicted_us = next((t.us for t in found if t.config == before), best.us)
    return tuned.Entry(
        of=of,
        m=shape.m,
        kernel=best.config.entry,
        source=source.digest(best.config.source),
        tile=tuned.tile_of(best.config),
        us=round(best.us, 3),
        predicted_us=round(predicted_us, 3),
    )
