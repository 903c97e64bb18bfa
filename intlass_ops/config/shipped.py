"""The configurations that are compiled ahead and by the tests: a covering set of the picks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from .choice import Config, of_int4, pick, pick_mx_integers
from .epilogue import with_epilogue
from .experts import ExpertTiles, pick_experts
from .fp4 import FP4_UNIT, FP4_X, DecodeFp4, MxCodes, MxRange, pick_fp4
from .hopper import Hopper, TokenSums, why_not_hopper
from .hopper_tiles import hopper_candidates, pick_hopper
from .problem import (
    ARCHS,
    BITS,
    INT4_MMA,
    LUT4,
    PAIRS,
    Shape,
    decoded_fp4,
    device_of,
    widens,
    without_wgmma,
)
from .quantize import Before, pick_quantize
from .rotate_quantize import pick_rotate_quantize
from .skinny import SKINNY_MAX_M
from .skinny_mx import mx_candidates
from .store_rows import pick_store_rows
from .transposed import TRANSPOSED_MAX_M, pick_transposed
from .transposed_wgmma import pick_transposed_wgmma
from .widen import pick_widen

# Kernels of the other tables differ from NF4's in sixteen constants: _shipped_tables
_PAIRS = tuple((x, w) for x, w in PAIRS if w not in LUT4[1:])
_W4A16 = Shape(
    x_kind="bf16",
    w_kind="s4",
    scale_type="__nv_bfloat16",
    zero_type="float",
    out_type="__nv_bfloat16",
    has_zeros=False,
    has_a_zero=False,
    aligned=True,
    m=4096,
    n=4096,
    k=4096,
    group_size=128,
)


def _shipped_hopper(
    types: tuple[str, ...], zero_types: tuple[str, ...]
) -> Iterator[tuple[Hopper | TokenSums, tuple[str, ...]]]:
    h200 = device_of("sm_90a")
    turn = 0
    for x, w in _PAIRS:
        if widens(h200, x):
            continue
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
                    picked = pick_hopper(h200, shape)
                    yield picked, ("sm_90a",)
                    if (x, group_size) == ("s8", 128):
                        many = pick_hopper(h200, replace(shape, m=4096))
                        for c in (many, replace(many, lane_order=True)):
                            yield c, ("sm_90a",)
                        yield replace(picked, lane_order=True), ("sm_90a",)
                # weights that take their scales, as 16-bit checkpoints mostly have them
                own = {"bf16": "__nv_bfloat16", "fp16": "__half"}.get(x)
                if own and group_size == 128:
                    shape = replace(shape, scale_type=own, zero_type="unsigned char", out_type=own)
                    yield pick_hopper(h200, shape), ("sm_90a",)
        if x in ("bf16", "fp16", "s8") and w == "u4":
            for span in (128, 64, 32):
                yield TokenSums(x, span), ("sm_90a",)


def _shipped_rest() -> Iterator[tuple[Hopper, tuple[str, ...]]]:
    """Tiles of hopper.cu by two, three and four consumers whose last one takes rows left over."""
    cases = (
        ("bf16", "s4", 60, 11008, 128),
        ("bf16", "u4", 128, 22016, 128),
        ("fp16", "s4", 32, 28672, 128),
        ("s8", "s4", 64, 18944, 128),
        ("s8", "s4", 64, 37888, 4096),
        ("bf16", "s8", 128, 18944, 4096),
    )
    for x, w, m, n, group_size in cases:
        own = {"bf16": "__nv_bfloat16", "fp16": "__half", "s8": "float"}[x]
        shape = replace(
            _W4A16,
            x_kind=x,
            w_kind=w,
            scale_type=own,
            zero_type="unsigned char",
            out_type="__nv_bfloat16" if x == "s8" else own,
            has_zeros=w == "u4",
            m=m,
            n=n,
            group_size=group_size,
        )
        h200 = device_of("sm_90a")
        tiles = [c for c, _ in hopper_candidates(h200, shape) if c.rest_by_k]
        yield min(tiles, key=lambda c: (-c.consumers, c.block_m)), ("sm_90a",)


def _shipped_stored() -> Iterator[tuple[Config, tuple[str, ...]]]:
    """Weights as GGUF and GPTQ store them, whose scales are not of the activations' type."""
    forms = (
        ("s4", 32, "__half", ""),
        ("u4", 32, "float", "float"),
        ("s8", 32, "__half", ""),
        ("s8", 16, "float", ""),
        ("u4", 128, "__half", "unsigned char"),
    )
    calls = ((1, 28672), (8, 4096), (64, 28672), (2048, 4096))
    for turn, ((w, group_size, scale_type, zero_type), (m, n)) in enumerate(
        itertools.product(forms, calls)
    ):
        shape = replace(
            _W4A16,
            w_kind=w,
            scale_type=scale_type,
            zero_type=zero_type or "float",
            has_zeros=bool(zero_type),
            m=m,
            n=n,
            group_size=group_size,
        )
        for arch in {"sm_90a", ARCHS[turn % len(ARCHS)]}:
            yield pick(device_of(arch), shape), (arch,)
        if m == 2048:
            yield pick(device_of("sm_90a"), replace(shape, m=512)), ("sm_90a",)


def _shipped_tables() -> Iterator[tuple[Config, tuple[str, ...]]]:
    """Of each table but NF4's: one kernel a way to look codes up, in shared memory and by PRMT."""
    for turn, w in enumerate(LUT4[1:]):
        x = ("fp16", "bf16")[turn % 2]
        shape = replace(_W4A16, x_kind=x, w_kind=w, scale_type="float", group_size=32)
        yield pick(device_of("sm_90a"), replace(shape, m=2048)), ("sm_90a",)
        yield pick(device_of(ARCHS[turn]), shape), (ARCHS[turn],)
        yield pick(device_of(ARCHS[turn]), replace(shape, m=(1, 8, 16)[turn])), (ARCHS[turn],)


def _shipped_takers() -> Iterator[tuple[Config, tuple[str, ...]]]:
    """Kernels of few tokens whose codes take their scales, of few rows and of many."""
    cases = (
        ("bf16", "u4", "__nv_bfloat16", 32),
        ("bf16", "s4", "", 64),
        ("bf16", "u4", "__nv_bfloat16", 128),
        ("fp16", "u4", "__half", 64),
    )
    for (x, w, zero_type, group_size), (m, n) in itertools.product(cases, ((16, 4096), (1, 32768))):
        own = {"bf16": "__nv_bfloat16", "fp16": "__half"}[x]
        shape = replace(
            _W4A16,
            x_kind=x,
            w_kind=w,
            scale_type=own,
            zero_type=zero_type or "float",
            out_type=own,
            has_zeros=bool(zero_type),
            m=m,
            n=n,
            group_size=group_size,
        )
        for arch in ARCHS:
            yield pick(without_wgmma(device_of(arch)), shape), (arch,)


def _shipped_epilogues() -> Iterator[tuple[Config, tuple[str, ...]]]:
    """One of each kernel that does something to its sums; the largest tiles, short of registers."""
    cases = (
        ("bf16", 1, 4096, 128, "silu", True),
        ("bf16", 4, 32768, 128, "relu", True),
        ("bf16", 300, 4096, 128, "gelu", True),
        ("s8", 4096, 4096, 4096, "gelu_tanh", True),
        ("s8", 4096, 4096, 128, "silu", True),
    )
    for x, m, n, group_size, activation, residual in cases:
        shape = replace(_W4A16, x_kind=x, m=m, n=n, group_size=group_size)
        for arch in ("sm_80", "sm_90a"):
            picked = pick(device_of(arch), shape)
            yield with_epilogue(picked, activation, residual), (arch,)


def _shipped_scaled() -> Iterator[tuple[Config, tuple[str, ...]]]:
    """gemm.cu's weights that take their scales, with and without zero points."""
    cases = (
        ("bf16", "s4", "__nv_bfloat16", "float", 128, ("sm_80", "sm_90a")),
        ("fp16", "u4", "__half", "unsigned char", 64, ("sm_86",)),
    )
    for x, w, scale_type, zero_type, group_size, archs in cases:
        shape = replace(
            _W4A16,
            x_kind=x,
            w_kind=w,
            scale_type=scale_type,
            zero_type=zero_type,
            out_type=scale_type,
            has_zeros=w == "u4",
            group_size=group_size,
        )
        for arch in archs:
            yield pick(without_wgmma(device_of(arch)), shape), (arch,)


def _shipped_experts() -> Iterator[tuple[Config, tuple[str, ...]]]:
    """Grouped GEMMs of few tokens and of many, for half of the architectures in turn."""
    cases = (
        ("bf16", "s4", "__nv_bfloat16", "float", 128),
        ("fp16", "u4", "__half", "unsigned char", 128),
        ("bf16", "u4", "__nv_bfloat16", "__nv_bfloat16", 32),
        ("bf16", "s8", "float", "float", 4096),
        ("s8", "s8", "float", "float", 4096),
        ("s8", "s4", "float", "float", 128),
        ("s8", "u4", "float", "unsigned char", 64),
        ("bf16", "e2m1", "e8m0", "float", 32),
        ("bf16", "e2m1", "e4m3", "float", 16),
    )
    for turn, (x, w, scale_type, zero_type, group_size) in enumerate(cases):
        shape = replace(
            _W4A16,
            x_kind=x,
            w_kind=w,
            scale_type=scale_type,
            zero_type=zero_type,
            out_type="__half" if x == "fp16" else "__nv_bfloat16",
            has_zeros=w == "u4",
            k=4160 if w == "e2m1" else 4096,  # which ends in the middle of a tile
            group_size=group_size,
        )
        for arch, m in itertools.product({"sm_90a", *ARCHS[turn % 2 :: 2]}, (8, 1024, 4096, 65536)):
            yield pick_experts(device_of(arch), replace(shape, m=m), 128)[0], (arch,)
    yield ExpertTiles(), ("sm_90a",)


def _shipped_rotations() -> Iterator[tuple[Config, tuple[str, ...]]]:
    """Each rotation, format and scope; the half of the architectures changes from one to the next.

    Scopes differ between architectures, which have more or less shared memory.
    """
    bf16, half, single = "__nv_bfloat16", "__half", "float"
    cases = (
        (bf16, 32, "int8", 8192),
        (bf16, 32, "mx", 32),
        (bf16, 64, "int4", 25600),
        (half, 64, "nv", 16),
        (half, 128, "int8", 128),
        (bf16, 128, "int4", 1 << 18),
        (bf16, 256, "mx", 32),
        (half, 16, "nv", 16),
        (bf16, 16, "int8", 5120),
        (single, 64, "int8", 4096),
    )
    for turn, (x_type, rotation, format_, group_size) in enumerate(cases):
        quest, mask = turn % 4 in (1, 2), turn % 4 >= 2
        for arch in ARCHS[turn % 2 :: 2]:
            device = device_of(arch)
            yield (
                pick_rotate_quantize(device, x_type, rotation, format_, quest, mask, group_size),
                (arch,),
            )
    row = bf16, 64, "int4", True, False, 5120
    yield pick_rotate_quantize(device_of("sm_90a"), *row, layout="lanes"), ("sm_90a",)


def _shipped_quantisers(types: tuple[str, ...]) -> Iterator[tuple[Config, tuple[str, ...]]]:
    """Rows that are short, long and too long, few and many; few long ones meet silu_mul."""
    kinds = (8, True), (4, False), (8, False), (4, True)
    for turn, (bits, symmetric) in enumerate(kinds):
        for x_type, (vector, segments, length) in zip(
            types, ((8, 1 << turn * 6, 4096), (2, 4, 5), (8, 4, 100_000)), strict=True
        ):
            kind = x_type, bits, symmetric, turn > 1, vector, segments, length
            befores = tuple(Before) if turn < 2 and vector == 8 else (Before.NONE,)
            for arch, before in itertools.product(ARCHS, befores):
                yield pick_quantize(device_of(arch), *kind, before), (arch,)
    many = (
        ("sm_80", 4096, 4096),
        ("sm_90a", 4096, 5120),
        ("sm_90a", 4096, 14336),
        ("sm_90a", 1, 14336),
        ("sm_120", 4096, 4096),
    )
    for before, (arch, segments, length), full_range in itertools.product(
        Before, many, (False, True)
    ):
        kind = "__nv_bfloat16", 8, True, False, 8, segments, length
        yield pick_quantize(device_of(arch), *kind, before, full_range), (arch,)
    for turn, before in enumerate(Before):
        for segments, length in ((4096, 14336), (64, 4096), (4, 320_000)):
            kind = "__nv_bfloat16", 8, True, False, 8, segments, length
            c = pick_quantize(device_of("sm_90a"), *kind, before, turn % 2 == 0, lanes=True)
            yield c, ("sm_90a",)
    for arch, x_type in itertools.product(ARCHS, types):
        kind = x_type, 8, True, False, 2, 4, 4096
        yield pick_quantize(device_of(arch), *kind, full_range=True), (arch,)


def _shipped_fp4(arch: str, shape: Shape) -> Iterator[tuple[Config, tuple[str, ...]]]:
    picked = pick_fp4(device_of(arch), shape)
    if isinstance(picked, Hopper) and shape.x_kind == "e2m1":
        unit = FP4_UNIT[picked.x_kind, shape.scale_type]
        picked = replace(picked, lane_order=True, x_unit=unit)
    if picked is not None:
        yield picked, (arch,)


def shipped_configs() -> Iterator[tuple[Config, tuple[str, ...]]]:
    """A covering set of what the picks can return, each with the architectures it is built for.

    Every pair of kinds meets every block shape and every grouping; groups, scale, zero and output
    types, which change little code, rotate through the combinations rather than multiply them.
    """
    types = ("__nv_bfloat16", "float", "__half")
    zero_types = (*types, "unsigned char", "int")
    turn = 0
    for x, w in _PAIRS:
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
                device = without_wgmma(device_of(arch))
                c = pick(device, shape)
                if x == "s4" and widens(device, x):
                    c = of_int4(c, shape.k) or c
                yield c, (arch,)
                if m <= SKINNY_MAX_M and BITS[x] == 16 and BITS[w] == 4:
                    many_rows = replace(shape, n=32768, aligned=True)
                    yield pick(device, many_rows), (arch,)
    yield from _shipped_hopper(types, zero_types)
    yield from _shipped_rest()
    yield from _shipped_scaled()
    yield from _shipped_tables()
    yield from _shipped_takers()
    yield from _shipped_stored()
    yield from _shipped_epilogues()
    yield from _shipped_experts()
    yield from _shipped_rotations()
    for arch in ARCHS:
        yield pick_transposed(device_of(arch), "bf16", True, True, 16, 4096, 4096), (arch,)
    for arch in ("sm_80", "sm_90a", "sm_120"):
        of_few = TRANSPOSED_MAX_M, 1024, 1024
        yield pick_transposed(device_of(arch), "bf16", False, False, *of_few), (arch,)
    few = ("bf16", 16, 128), ("fp16", 32, 64)
    for x, m, group_size in (*few, ("bf16", 64, 128), ("fp16", 128, 32), ("bf16", 1024, 1024)):
        problem = group_size != 32, m, 4096, 4096, group_size
        yield pick_transposed_wgmma(device_of("sm_90a"), x, *problem), ("sm_90a",)
    yield from _shipped_quantisers(types)
    formats = ("e8m0", 32), ("e4m3", 16)
    for turn, (x, (scale_type, group_size), m) in enumerate(
        itertools.product(FP4_X, formats, (1, 16, 4096))
    ):
        shape = Shape(
            x_kind=x,
            w_kind="e2m1",
            scale_type=scale_type,
            zero_type="float",
            out_type=types[turn % 3],
            has_zeros=False,
            has_a_zero=False,
            aligned=True,
            m=m,
            n=(4096, 32768)[turn // 2 % 2],
            k=4096 + 32 * (turn % 2 and m <= SKINNY_MAX_M),
            group_size=group_size,
            blocked=turn % 4 == 0,
        )
        for arch in ARCHS:
            yield from _shipped_fp4(arch, shape)
    two = replace(_W4A16, x_kind="e2m1", w_kind="e2m1", n=8192, k=8192)
    nv = replace(two, scale_type="e4m3", group_size=16, blocked=True)
    for m, n, k in ((16, 8192, 28672), (32, 28672, 4096), (64, 8192, 28672)):
        yield from _shipped_fp4("sm_90a", replace(nv, m=m, n=n, k=k))
    for turn, m in enumerate((1024, 4096)):
        many = replace(two, scale_type="e8m0", group_size=32, m=m, blocked=turn == 1)
        integers, floats = pick_mx_integers(device_of("sm_90a"), many), _shipped_fp4("sm_90a", many)
        assert integers is not None
        yield integers, ("sm_90a",)
        yield from ((c(many.blocked), ("sm_90a",)) for c in (MxRange, MxCodes))
        yield from ((replace(c, only_if=1), archs) for c, archs in floats if isinstance(c, Hopper))
    for turn, m in enumerate((1, 16)):
        mx = replace(two, scale_type="e8m0", group_size=32)
        shape = replace(mx, out_type=types[turn], m=m, blocked=turn == 1)
        for c in mx_candidates(device_of("sm_90a"), shape):
            yield c, ("sm_90a",)
    for x in ("s4", "u4"):
        for aligned, m in ((True, 16), (True, 4096), (False, 16)):
            for arch in ARCHS:
                if arch not in INT4_MMA:
                    hopper = arch == "sm_90a" and aligned
                    yield pick_widen(device_of(arch), x, aligned, m, 2048, hopper), (arch,)
    yield pick_store_rows("__nv_bfloat16"), ARCHS
    for turn, (scale_type, _) in enumerate(formats):
        yield DecodeFp4("bf16", scale_type, blocked=turn == 0, lane_order=False), ARCHS
        x = decoded_fp4(scale_type)
        only_if = 1 if scale_type == "e8m0" else -1
        yield DecodeFp4(x, scale_type, turn == 1, lane_order=True, only_if=only_if), ("sm_90a",)
