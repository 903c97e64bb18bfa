"""What a kernel is picked for: the GPU (`Device`) and the problem (`Shape`).

Lives here too: what kinds of operands there are, and the instructions that multiply them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol

SPAN_K = 32  # k of one span, operands.cuh
# Weights whose codes index a table (lut4.py); kernels differ in its numbers alone (lut4.cuh)
LUT4 = ("nf4", "iq4nl", "fp4", "bnbfp4")
BITS = {
    "bf16": 16,
    "fp16": 16,
    "s8": 8,
    "s4": 4,
    "u4": 4,
    "e2m1": 4,
    "e4m3": 8,
    **dict.fromkeys(LUT4, 4),
}
TYPE_BYTES = {
    "float": 4,
    "int": 4,
    "__nv_bfloat16": 2,
    "__half": 2,
    "signed char": 1,
    "unsigned char": 1,
}
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
INT4_MMA = ("sm_80", "sm_86", "sm_89")  # have tensor cores for INT4
# Activation and weight kinds that have a kernel; FP4 weights (e2m1) have two more, config/fp4.py.
PAIRS = (
    *((x, w) for x in ("bf16", "fp16") for w in ("s4", "u4", "s8", "e4m3")),
    *(("s8", w) for w in ("s4", "u4", "s8")),
    *((x, w) for x in ("s4", "u4") for w in ("s4", "u4")),
    *((x, w) for x in ("bf16", "fp16") for w in LUT4),
)


def lut4_pairs_bytes(w_kind: str) -> int:
    """Static shared memory of kernels that look codes up there: lut4_pairs.cuh."""
    return 1 << 15 if w_kind in LUT4 else 0


class Grouping(IntEnum):
    """How the scale groups of a row lie in the spans of the main loop (gemm.cu)."""

    CHANNEL = 0  # one group: scaled once, after all of K
    TILE = 1  # groups of block_k
    SPAN = 2  # groups of whole spans
    STRADDLING = 3  # a group may end inside a span: group_size 16, 48, ...
    SCALED_WEIGHTS = 4  # each weight takes its scale before it is multiplied
    COLUMNS = 5  # groups of a chunk in columns of their own (skinny.cuh)
    SCALED_SPANS = 6  # the same in groups of one span (gemm.cu)


class _Types(Protocol):
    """The operands' of a Shape, and of each configuration."""

    @property
    def x_kind(self) -> str: ...
    @property
    def w_kind(self) -> str: ...
    @property
    def scale_type(self) -> str: ...
    @property
    def zero_type(self) -> str: ...
    @property
    def has_zeros(self) -> bool: ...


@dataclass(frozen=True)
class Device:
    """What a GPU offers a kernel."""

    arch: str
    sm_count: int
    smem_per_block: int  # bytes, opt-in maximum
    smem_per_sm: int
    name: str = ""  # as its driver gives it: tables of measured configurations go by it


# Shared memory by architecture, CUDA C++ Programming Guide, "Compute Capabilities".
_SMEM_KIB = {
    "sm_80": (163, 164),
    "sm_86": (99, 100),
    "sm_89": (99, 100),
    "sm_90a": (227, 228),
    "sm_100": (227, 228),
    "sm_120": (99, 100),
}
_REFERENCE_SMS = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 128,
    "sm_90a": 132,
    "sm_100": 148,
    "sm_120": 170,
}


def device_of(arch: str, sm_count: int | None = None) -> Device:
    """The Device of an architecture, with the SM count of its best known card by default."""
    block, sm = _SMEM_KIB.get(arch, (99, 100))
    count = sm_count if sm_count is not None else _REFERENCE_SMS.get(arch, 84)
    return Device(arch, count, block * 1024, sm * 1024)


def without_wgmma(device: Device) -> Device:
    """The same GPU, on which `pick` takes the portable kernels."""
    return replace(device, arch="sm_90") if device.arch == "sm_90a" else device


def widens(device: Device, x_kind: str) -> bool:
    """Whether INT4 activations become INT8 first: no tensor core of this GPU takes them."""
    return x_kind in ("s4", "u4") and device.arch not in INT4_MMA


@dataclass(frozen=True)
class Shape:
    """What `pick` may know of a problem: kinds, types and sizes."""

    x_kind: str
    w_kind: str
    scale_type: str
    zero_type: str
    out_type: str
    has_zeros: bool
    has_a_zero: bool
    aligned: bool
    m: int
    n: int
    k: int
    group_size: int
    apart: bool = True  # no two rows share memory
    batch_invariant: bool = False  # the kernel must not depend on m
    blocked: bool = False  # FP4: scales in the order of fp4.to_blocked

    @property
    def zeros_in_sums(self) -> bool:
        """Whether zero points multiply sums of x, for few tokens: bytes leave INT4 codes as these
        become floats, and so do all where codes take their scales."""
        in_codes = BITS[self.x_kind] == 16 and BITS[self.w_kind] == 4
        free = in_codes and (TYPE_BYTES[self.zero_type] == 1 or codes_take_scales(self))
        return self.has_zeros and not free

    def on(self, device: Device) -> Shape:
        """The problem as the kernels of this GPU meet it."""
        return replace(self, x_kind="s8") if widens(device, self.x_kind) else self


def weights_take_scales(shape: Shape) -> bool:
    """Whether scales of groups multiply the weights, which are rounded to the activations' type.

    So does a dequantised model. Under bf16, whatever float types scales and zero points have: a
    weight is within 2^-8 of itself, and 2^-12 scale where zero points are no integers
    (split_scales.cuh). Under fp16 scales of its own type, which say that the model was one; a
    weight that fp16 has no number for is as infinite, or as small, as it is there. An output of 16
    bits hides the rounding; one of float32 is summed group by group and rounded once.
    """
    if shape.x_kind == "bf16" and shape.group_size < shape.k:
        return shape.out_type != "float" or shape.w_kind == "e2m1"
    return shape.w_kind == "e2m1" or _types_allow(shape, ())


def scales_are_split(types: _Types) -> bool:
    """Whether weights that take scales under bf16 have them as two numbers of it: they, or the zero
    points, have bits that bf16 has not."""
    floats = types.has_zeros and types.zero_type in ("float", "__half")
    return (
        types.x_kind == "bf16"
        and types.w_kind != "e2m1"
        and (types.scale_type != "__nv_bfloat16" or floats)
    )


def _types_allow(shape: Shape, float_zeros: tuple[str, ...]) -> bool:
    """Whether rounded weights are as good as scaled sums: groups in the activations' own type."""
    own = {"bf16": "__nv_bfloat16", "fp16": "__half"}.get(shape.x_kind)
    zeros = ("int", "signed char", "unsigned char", *float_zeros)
    return (
        shape.group_size < shape.k
        and shape.scale_type == own
        and shape.out_type != "float"
        and (not shape.has_zeros or shape.zero_type in zeros)
    )


def codes_take_scales(shape: Shape) -> bool:
    """Whether INT4 weights of few tokens take their scales, instead of the sums of their groups.

    Groups of 32 and 64, of which a chunk has several, where these are not in columns; and larger
    ones for the sake of zero points that are no bytes, which would multiply sums of x. Types as in
    `_types_allow`; fp16 has a way of its own for fractions.
    """
    floats = ("__nv_bfloat16", *(["__half"] if shape.x_kind == "fp16" else []))
    if BITS[shape.w_kind] != 4 or not _types_allow(shape, floats) or groups_in_columns(shape):
        return False
    in_sums = shape.has_zeros and TYPE_BYTES[shape.zero_type] > 1
    return shape.group_size in (32, 64) or (in_sums and shape.group_size % 128 == 0)


def groups_of_chunk(shape: Shape) -> int:
    """Groups that a chunk of k holds, at least one; blocks of FP4 are not counted."""
    if shape.w_kind == "e2m1":
        return 1
    chunk_k = 512 // BITS[shape.w_kind]
    return max(1, chunk_k // shape.group_size) if shape.group_size < shape.k else 1


def groups_in_columns(shape: Shape) -> bool:
    """Whether the eight columns of an MMA, which few tokens leave free, part a chunk's groups.

    Two of them at most: with four a chunk would be multiplied as often as once for each group.
    """
    groups = groups_of_chunk(shape)
    if BITS[shape.w_kind] == 8:
        return groups > 1
    # long rows: skinny_held.cu has no tile for the sums of such zero points
    zeros = shape.has_zeros and TYPE_BYTES[shape.zero_type] > 1
    return groups > 1 and shape.m * groups <= 8 and not (zeros and shape.k > 8192)


def bytes_in_groups(shape: Shape) -> bool:
    """Eight bits under 16-bit activations, in groups of whole chunks."""
    kinds = BITS[shape.x_kind], BITS[shape.w_kind]
    return kinds == (16, 8) and shape.group_size < shape.k and groups_of_chunk(shape) == 1


def groups_spread(shape: Shape) -> bool:
    """Whether a chunk's groups lie in spans of their own, which the lanes of a quad share."""
    apart = codes_take_scales(shape) or groups_in_columns(shape)
    return groups_of_chunk(shape) > 1 and not apart


def columns_of(shape: Shape) -> int:
    """Of the activations' operand: tokens, each once for every group that has a column."""
    return shape.m * (groups_of_chunk(shape) if groups_in_columns(shape) else 1)


def decoded_fp4(scale_type: str) -> str:
    """What FP4 activations become, to be multiplied (fp4.cuh)."""
    return "fp16" if scale_type == "e4m3" else "bf16"


def mma_sass(x_kind: str, int4_k: int = 32) -> tuple[str, ...]:
    """Regular expressions of the tensor-core instruction for activations of this kind."""
    if x_kind in ("bf16", "fp16"):
        return (r"HMMA\.16816\.F32" + (r"\b" if x_kind == "fp16" else r"\.BF16"),)
    int4 = x_kind in ("s4", "u4")
    return (rf"IMMA\.168{int4_k}\.S4\.S4" if int4 else r"IMMA\.16832\.S8\.S8",)
