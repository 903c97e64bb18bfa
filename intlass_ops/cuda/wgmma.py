"""The wgmma instructions of one Config, as CUDA C++.

PTX wants every accumulator register named, and how many there are depends on the tile: inline
assembly that no C++ template can write. hopper.cu calls what this file generates.
"""

from __future__ import annotations

_PTX_TYPES = {
    "bf16": "f32.bf16.bf16",
    "fp16": "f32.f16.f16",
    "e4m3": "f32.e4m3.e5m2",  # weights have the precision, activations the range
    "s8": "s32.s8.s8",
}


def wrappers(kind: str, n: int) -> str:
    """``wgmma(d, a, b, accumulate)`` for 64 rows by ``n`` columns: d = a @ b, plus d if accumulate.

    ``kind`` is that of the operands. ``a`` is a descriptor of shared memory or four registers,
    ``b`` a descriptor; 32 bytes of k of each.
    """
    return "typedef unsigned long long u64;\ntypedef unsigned int u32;\n" + "".join(
        _wrapper(kind, n, from_registers) for from_registers in (False, True)
    )


def _wrapper(kind: str, n: int, from_registers: bool) -> str:
    count = n // 2
    integers = kind == "s8"
    registers = ", ".join(f"%{i}" for i in range(count))
    num_a = 4 if from_registers else 1
    a = ", ".join(f"%{count + i}" for i in range(num_a))
    a = f"{{{a}}}" if from_registers else a
    b, predicate = f"%{count + num_a}", f"%{count + num_a + 1}"
    # scale-a, scale-b, then whether 16-bit operands in shared memory are transposed
    flags = "" if integers else ", 1, 1"
    k = 32
    if kind in ("bf16", "fp16"):
        flags += ", 0" if from_registers else ", 0, 0"
        k = 16
    constraint, scalar = ("r", "int") if integers else ("f", "float")
    outputs = ", ".join(f'"+{constraint}"(d[{i}])' for i in range(count))
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4)) if from_registers else '"l"(a)'
    parameter = "const u32 (&a)[4]" if from_registers else "u64 a"
    return f"""\
__device__ __forceinline__ void wgmma({scalar} (&d)[{count}], {parameter}, u64 b,
                                      bool accumulate) {{
  asm volatile("{{.reg .pred p; setp.ne.b32 p, {predicate}, 0; "
    "wgmma.mma_async.sync.aligned.m64n{n}k{k}.{_PTX_TYPES[kind]} "
    "{{{registers}}}, {a}, {b}, p{flags};}}"
    : {outputs} : {inputs}, "l"(b), "r"(int(accumulate)) : "memory");
}}
"""
