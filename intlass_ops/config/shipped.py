"""The configurations that are compiled ahead and by the tests: a covering set of the picks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from .choice import Config, pick
from .fp4 import FP4_X, pick_fp4
from .hopper import Hopper, TokenSums, pick_hopper, why_not_hopper
from .problem import ARCHS, BITS, PAIRS, Shape, device_of, without_wgmma
from .quantize import Before, pick_quantize
from .skinny import SKINNY_MAX_M


def _shipped_hopper(
    types: tuple[str, ...], zero_types: tuple[str, ...]
) -> Iterator[tuple[Hopper | TokenSums, tuple[str, ...]]]:
    h200 = device_of("sm_90a")
    turn = 0
    for x, w in PAIRS:
        for group_size in (4096, 128, 32 + 32 * (turn % 2)):
            for m in ((32, 128, 4096), (64, 512))[turn % 2]:
                turn += 1
                shape = Shape(
                    x_kind=x,
                    w_kind=w,
                    scale_type=types[turn % 3],
                    zero_type=zero_types[turn % 5] if w == "u4" else "float",
                    out_type=types[turn // 2 % 3],
                    has_zeros=w == "u4",
                    has_a_zero=False,
                    aligned=True,
                    m=m,
                    n=(4096, 28672)[turn % 2],
                    k=4096,
                    group_size=group_size,
                )
                if why_not_hopper(h200, shape) is None:
                    yield pick_hopper(h200, shape), ("sm_90a",)
                # weights that take their scales, as 16-bit checkpoints mostly have them
                own = {"bf16": "__nv_bfloat16", "fp16": "__half"}.get(x)
                if own and group_size == 128:
                    shape = replace(shape, scale_type=own, zero_type="unsigned char", out_type=own)
                    yield pick_hopper(h200, shape), ("sm_90a",)
        if x in ("bf16", "fp16", "s8") and w == "u4":
            for span in (128, 64, 32):
                yield TokenSums(x, span), ("sm_90a",)


def shipped_configs() -> Iterator[tuple[Config, tuple[str, ...]]]:
    """A covering set of what the picks can return, each with the architectures it is built for.

    Every pair of kinds meets every block shape and every grouping; groups, scale, zero and output
    types, which change little code, rotate through the combinations rather than multiply them.
    """
    types = ("__nv_bfloat16", "float", "__half")
    zero_types = (*types, "unsigned char", "int")
    turn = 0
    for x, w in PAIRS:
        # From M = 64 on groups share a block shape; one scale a row has another for many tiles.
        cases = [(1, (4096, 128, 64, 32)[turn % 4]), (16, (128, 64, 32, 4096)[turn % 4])]
        cases += [(64, (128, 64, 256)[turn % 3]), (64, 16), (4096, 4096)]
        for m, group_size in cases:
            turn += 1
            shape = Shape(
                x_kind=x,
                w_kind=w,
                scale_type=types[turn % 3],
                zero_type=zero_types[turn % 5] if w == "u4" else "float",
                out_type=types[turn // 2 % 3],
                has_zeros=w == "u4",
                has_a_zero=x == "u4" or (x == "s8" and (group_size == 16 or m * (w == "s4") > 64)),
                aligned=turn % 7 != 0,
                m=m,
                n=4096,
                k=4096,
                group_size=group_size,
            )
            for arch in ARCHS:
                yield pick(without_wgmma(device_of(arch)), shape), (arch,)
                if m <= SKINNY_MAX_M and BITS[x] == 16 and BITS[w] == 4:
                    many_rows = replace(shape, n=32768, aligned=True)
                    yield pick(without_wgmma(device_of(arch)), many_rows), (arch,)
    yield from _shipped_hopper(types, zero_types)
    for turn, (bits, symmetric) in enumerate(((8, True), (4, False), (8, False), (4, True))):
        for x_type, (vector, length) in zip(types, ((8, 4096), (2, 5), (8, 100_000)), strict=True):
            yield pick_quantize(x_type, bits, symmetric, turn > 1, vector, length), ARCHS
            if turn < 2 and vector == 8:
                for before in (Before.RMS_NORM, Before.SILU_MUL):
                    c = pick_quantize(x_type, bits, symmetric, False, vector, length, before)
                    yield c, ARCHS
    for turn, (x, scale_kind) in enumerate(itertools.product(FP4_X, ("e8m0", "e4m3"))):
        for m, blocked, aligned in ((1, turn % 2 == 0, True), (16, turn % 2 == 1, turn != 2)):
            for arch in ARCHS:
                sizes = m, 4096, 4096
                yield (
                    pick_fp4(
                        device_of(arch), x, scale_kind, types[turn % 3], blocked, aligned, *sizes
                    ),
                    (arch,),
                )
