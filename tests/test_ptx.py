"""tests/ptx itself: what its instructions compute, and that it finds faults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from ptx import arithmetic, machine, memory, text
from torch import Tensor

from intlass_ops.cuda import source
from intlass_ops.cuda.compiler import compile_cubin


@dataclasses.dataclass(frozen=True)
class Toy:
    source: ClassVar[str] = "toy.cu"
    entry: ClassVar[str] = "toy"


Run = Callable[..., None]


@pytest.fixture
def cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """cuda(body, tensors...): a kernel of one block, `body` the inside of its function."""
    monkeypatch.setattr(source, "SOURCE_DIR", tmp_path)
    monkeypatch.setenv("INTLASS_CACHE_DIR", str(tmp_path / "cache"))

    def run(body: str, *tensors: Tensor, threads: int = 32, blocks: int = 1) -> None:
        names = {torch.int32: "unsigned", torch.float32: "float", torch.int64: "long long"}
        parameters = ", ".join(f"{names[t.dtype]}* {n}" for t, n in zip(tensors, "abcd"))  # noqa: B905
        text_of_kernel = "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n"
        text_of_kernel += f'extern "C" __global__ void toy({parameters}) {{ {body} }}'
        (tmp_path / "toy.cu").write_text(text_of_kernel)
        program = text.parse(compile_cubin(Toy(), "compute_80").decode())
        pointers = np.array([t.data_ptr() for t in tensors], np.uint64).tobytes()
        tensors_of = memory.Memory([t.view(torch.uint8).numpy() for t in tensors])
        machine.Machine(program, (blocks, 1, 1), threads, 0, pointers, tensors_of).run()

    return run


def words(count: int = 256, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=draw).to(torch.int32)


def signed(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def bytes_of(x: int, size: int = 1) -> list[int]:
    return [x >> 8 * i & (1 << 8 * size) - 1 for i in range(0, 4, size)]


def permuted(x: int, y: int, selector: int) -> int:
    every = bytes_of(x) + bytes_of(y)
    return sum(every[selector >> 4 * i & 7] << 8 * i for i in range(4))


EACH = "int i = threadIdx.x; for (; i < 256; i += 32) c[i] = {};"
INTEGERS: dict[str, Callable[[int, int], int]] = {
    "__byte_perm(a[i], b[i], b[i])": lambda x, y: permuted(x, y, y),
    "__funnelshift_r(a[i], b[i], b[i])": lambda x, y: (y << 32 | x) >> y % 32,
    "__brev(a[i])": lambda x, y: int(f"{x:032b}"[::-1], 2),
    "__popc(a[i]) + __clz(b[i])": lambda x, y: x.bit_count() + 32 - y.bit_length(),
    "__umulhi(a[i], b[i])": lambda x, y: x * y >> 32,
    "__mulhi(int(a[i]), int(b[i]))": lambda x, y: signed(x) * signed(y) >> 32,
    "int(a[i]) / (int(b[i]) >> 9 | 1)": lambda x, y: int(signed(x) / (signed(y) >> 9 | 1)),
    "a[i] % (b[i] | 1)": lambda x, y: x % (y | 1),
    "int(a[i]) >> (b[i] & 31)": lambda x, y: signed(x) >> y % 32,
    "a[i] << (b[i] & 63)": lambda x, y: x << y % 64 if y % 64 < 32 else 0,
    "(a[i] & b[i]) ^ (a[i] >> 3)": lambda x, y: x & y ^ x >> 3,
    "__vmaxu4(a[i], b[i])": lambda x, y: sum(
        max(p) << 8 * i for i, p in enumerate(zip(bytes_of(x), bytes_of(y), strict=True))
    ),
    "min(int(a[i]), int(b[i]))": lambda x, y: min(signed(x), signed(y)),
}


@pytest.mark.parametrize("expression", INTEGERS)
def test_integers(expression: str, cuda: Run) -> None:
    a, b, c = words(seed=1), words(seed=2), torch.zeros(256, dtype=torch.int32)
    cuda(EACH.format(expression), a, b, c)
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    exact = [INTEGERS[expression](x % 2**32, y % 2**32) % 2**32 for x, y in pairs]
    assert [x % 2**32 for x in c.tolist()] == exact


@pytest.mark.parametrize(
    ("expression", "exact"),
    [
        ("__uint_as_float(__bfloat16_as_ushort(__float2bfloat16_rn(a[i])) << 16)", "bfloat16"),
        ("__half2float(__float2half_rn(a[i]))", "half"),
        ("__fadd_rn(a[i], b[i])", "sum"),
        ("__fmul_rn(a[i], b[i])", "product"),
        ("__fdiv_rn(a[i], b[i])", "quotient"),
        ("rintf(a[i])", "rint"),
    ],
)
def test_floats(expression: str, exact: str, cuda: Run) -> None:
    draw = torch.Generator().manual_seed(4)
    a, b = (
        torch.randn(256, generator=draw) * 2.0 ** torch.randint(-30, 20, (256,), generator=draw)
        for _ in range(2)
    )
    a[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 2.0**-140, -0.0])  # ties, a subnormal number
    c = torch.zeros(256)
    cuda(EACH.format(expression), a, b, c)
    expected = {
        "bfloat16": a.bfloat16().float(), "half": a.half().float(), "sum": a + b,
        "product": a * b, "quotient": a / b, "rint": a.round(),
    }[exact]  # fmt: skip
    assert torch.equal(c, expected)


def test_a_fused_product_is_rounded_once(cuda: Run) -> None:
    """To odd, then to the type: what float64 alone would round twice."""
    a, b = torch.tensor([1 + 2.0**-12] * 256), torch.zeros(256)
    b[:] = 1 + 2.0**-12
    c = torch.full((256,), 2.0**-60)
    cuda(EACH.format("fmaf(a[i], b[i], c[i])"), a, b, c)
    # (1 + 2^-12)² = 1 + 2^-11 + 2^-24, half way between two floats; the addend decides
    assert c.tolist() == [1 + 2.0**-11 + 2.0**-23] * 256


def test_signs_of_zeros_and_nan(cuda: Run) -> None:
    a, b = (
        torch.tensor([0.0, -0.0, torch.nan, 1.0] * 64),
        torch.tensor([-0.0, 0.0, 2.0, torch.nan] * 64),
    )
    c = torch.zeros(256)
    cuda(EACH.format("fmaxf(a[i], b[i])"), a, b, c)
    assert c[:4].tolist() == [0.0, 0.0, 2.0, 1.0]
    assert not c[:2].signbit().any()


def test_e4m3_is_torchs() -> None:
    codes = torch.arange(256).to(torch.uint8)
    exact = codes.view(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(arithmetic.of_e4m3(codes.numpy()), exact)
    x = torch.randn(4000, generator=torch.Generator().manual_seed(5)) * 100
    rounded = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    np.testing.assert_array_equal(arithmetic._to_e4m3(x.numpy().view(np.uint32)), rounded.numpy())


def test_threads_go_different_ways_and_meet(cuda: Run) -> None:
    """Each as often round the loop as it is told, then across the warp."""
    a, b = torch.arange(64, dtype=torch.int32) % 7, torch.zeros(64, dtype=torch.int32)
    cuda(
        "int i = threadIdx.x; unsigned s = 0;"
        "for (unsigned k = 0; k < a[i]; ++k) { if (k % 2) continue; s += k + 1; }"
        "__syncwarp(); b[i] = s + 100 * __shfl_xor_sync(~0u, s, 1);",
        a, b, threads=64,
    )  # fmt: skip
    sums = [sum(range(1, n + 1, 2)) for n in a.tolist()]
    assert b.tolist() == [s + 100 * sums[i ^ 1] for i, s in enumerate(sums)]


SHARE = (
    "__shared__ alignas(16) unsigned s[128]; int i = threadIdx.x;"
    'asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" '
    ':: "r"(unsigned(__cvta_generic_to_shared(s + i))), "l"(a + i) : "memory");'
    'asm volatile("cp.async.commit_group;"); {} b[i] = s[i ^ 1];'
)


def test_a_copy_that_nobody_waits_for_has_not_arrived(cuda: Run) -> None:
    a = words(32)
    b, c = torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    cuda(SHARE.replace("{}", 'asm volatile("cp.async.wait_group 0;"); __syncthreads();'), a, b)
    cuda(SHARE.replace("{}", "__syncthreads();"), a, c)
    assert torch.equal(b.view(-1, 2).flip(1).view(-1), a)
    assert not c.any()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("b[threadIdx.x] = a[threadIdx.x + 1];", "ld.global.u32"),
        ("b[(int)threadIdx.x - 1] = 0;", "st.global.u32"),
        ("b[0] = *(unsigned*)((char*)a + 2);", "not aligned to 4 bytes"),
        ("__shared__ unsigned s[8]; s[threadIdx.x + a[0] * 4] = 1; b[0] = s[0];", "shared bytes"),
    ],
)
def test_accesses_that_no_tensor_has_are_errors(body: str, message: str, cuda: Run) -> None:
    # Apart from each other, so that what lies beside one is no other.
    room = torch.zeros(4096, dtype=torch.int32)
    a, b = torch.full((32,), 1 << 20, dtype=torch.int32), room[1024:1056].clone()
    with pytest.raises(memory.OutOfBounds, match=message):
        cuda(body, a, b)


def test_waiting_for_ever_is_an_error(cuda: Run) -> None:
    with pytest.raises(RuntimeError, match=r"all threads wait, at \['bar.sync"):
        cuda('if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;");', words(1), threads=64)
