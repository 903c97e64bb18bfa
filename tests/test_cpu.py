"""The CPU kernels: every group, tail, stride and parameter type, and life without a compiler."""

from __future__ import annotations

import platform
import warnings
from pathlib import Path

import oracle
import pytest
import torch
from gemm_case import CODES, stored
from tolerance import assert_close, assert_identical
from torch import Tensor

from intlass_ops import cpu, explain, fp4, packing, reference
from intlass_ops.ops import problem

pytestmark = pytest.mark.skipif(cpu.compiler() is None, reason="needs a C++ compiler")

# Groups of one narrow vector, one, two and four wide ones, any; K odd; per channel.
SHAPES = [
    (1, 16, 16),
    (5, 33, 33),
    (7, 48, 16),
    (3, 31, 31),
    (64, 576, 32),
    (20, 256, 128),
    (9, 320, 64),
    (70, 80, 80),
    (9, 1001, 1001),
    (2100, 512, 32),
]
ROWS = [1, 2, 3, 4, 7, 15, 16, 33]


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seed) & 0xFFFF)


def int4(n: int, k: int, signed: bool, seed: torch.Generator) -> Tensor:
    low = -8 if signed else 0
    return torch.randint(low, low + 16, (n, k), dtype=torch.int8, generator=seed)


def matmul_int4(a: Tensor, w: Tensor, scales: Tensor, zeros: Tensor | None, k: int) -> Tensor:
    """float32 products from the CPU kernels and nothing else."""
    y = planned("matmul_int4_bf16_tn", a, w, scales, zeros, k)
    assert y is not None
    return y


def matmul_nf4(a: Tensor, w: Tensor, scales: Tensor, k: int) -> Tensor:
    y = planned("matmul_nf4_bf16_tn", a, w, scales, None, k)
    assert y is not None
    return y


def matmul_bytes(a: Tensor, w: Tensor, scales: Tensor) -> Tensor:
    """The same of INT8 or FP8."""
    op = "matmul_int8_bf16_tn" if w.dtype == torch.int8 else "matmul_fp8_bf16_tn"
    y = planned(op, a, w, scales, None, w.shape[1])
    assert y is not None
    return y


def planned(
    op: str, a: Tensor, w: Tensor, scales: Tensor, zeros: Tensor | None, k: int
) -> Tensor | None:
    p = problem.check(op, a, w, scales, zeros, k, None, None, None, None, torch.float32)
    plan = cpu.make("a test's", p, a, w, scales, zeros)
    return None if plan is None else plan.run(a, w, scales, zeros)


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("signed", [True, False])
def test_int4_is_within_tolerance(n: int, k: int, group: int, m: int, signed: bool) -> None:
    seed = generator(n, k, m)
    q, a = int4(n, k, signed, seed), torch.randn(m, k, generator=seed)
    scales = torch.randn(n, k // group, generator=seed)
    zeros = None if signed else 15 * torch.rand(n, k // group, generator=seed)
    y = matmul_int4(a, packing.pack(q), scales, zeros, k)
    w = reference.dequantize(q, scales, zeros)
    assert_close(y, a.double() @ w.T, a.double().abs() @ w.abs().T)


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("kind", ["s8", "e4m3"])
def test_bytes_are_within_tolerance(n: int, k: int, group: int, m: int, kind: str) -> None:
    seed = generator(n, k, m)
    low, high = CODES[kind]
    q = stored(kind, torch.randint(low, high + 1, (n, k), generator=seed))
    a, scales = torch.randn(m, k, generator=seed), torch.randn(n, k // group, generator=seed)
    y = matmul_bytes(a, q, scales)
    w = reference.dequantize(q, scales, None)
    assert_close(y, a.double() @ w.T, a.double().abs() @ w.abs().T)


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_is_within_tolerance(n: int, k: int, group: int, m: int, dtype: torch.dtype) -> None:
    """The numbers as the type of the activations has them."""
    seed = generator(n, k, m)
    w = packing.pack(torch.randint(0, 16, (n, k), generator=seed))
    a = torch.randn(m, k, generator=seed).to(dtype)
    scales = torch.randn(n, k // group, generator=seed)
    y = matmul_nf4(a, w, scales, k)
    dense = oracle.weight(w, scales, None, k, "nf4", dtype)
    assert_close(y, a.double() @ dense.T, a.double().abs() @ dense.abs().T)


@pytest.mark.parametrize(("k", "group"), [(16, 16), (64, 64), (96, 48), (8, 8), (31, 31)])
@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_nf4_number_is_exact(m: int, k: int, group: int, dtype: torch.dtype) -> None:
    """In vectors of either width, in both nibbles and in what is left over."""
    codes = (torch.arange(48)[:, None] + 7 * torch.arange(k)) % 16
    w, scales = packing.pack(codes), torch.ones(48, k // group)
    expected = oracle.numbers("nf4", codes, dtype).T.float()
    for first in range(k):
        rows = (torch.arange(m) + first) % k
        y = matmul_nf4(torch.eye(k, dtype=dtype)[rows], w, scales, k)
        assert_identical(y, expected[rows])


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize(("k", "group"), [(16, 16), (64, 64), (96, 48), (8, 8), (31, 31)])
@pytest.mark.parametrize("m", [1, 3, 40])
def test_every_fp8_number_is_exact(m: int, k: int, group: int, flush: bool) -> None:
    """In vectors of either width and in what is left over; flags for subnormal numbers are others'
    business."""
    w = stored("e4m3", (torch.arange(254)[:, None] + 7 * torch.arange(k)) % 254)
    scales, expected = torch.ones(254, k // group), oracle.e4m3(w).T.float()
    torch.set_flush_denormal(flush)
    try:
        for first in range(k):
            y = matmul_bytes(torch.eye(k).roll(-first, 0)[torch.arange(m) % k], w, scales)
            assert_identical(y, expected.roll(-first, 0)[torch.arange(m) % k])
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("k", [16, 31])
def test_an_fp8_nan_is_a_nan_or_480_and_stays_in_its_row(k: int) -> None:
    w = torch.ones(48, k).to(torch.float8_e4m3fn)
    w.view(torch.uint8)[5], w.view(torch.uint8)[7] = 0x7F, 0xFF
    y = matmul_bytes(torch.eye(k), w, torch.ones(()))
    others = ~torch.isin(torch.arange(48), torch.tensor([5, 7]))
    assert (y[:, others] == 1).all()
    assert (y[:, 5].isnan() | (y[:, 5] == 480)).all()
    assert (y[:, 7].isnan() | (y[:, 7] == -480)).all()


@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identity_activations_give_the_weight_exactly(m: int, dtype: torch.dtype) -> None:
    """One column at a time: (q - zero) * scale with powers of two, each in its place."""
    n, k, group = 40, 64, 16
    seed = generator(m)
    q = int4(n, k, False, seed)
    scales = 2.0 ** torch.randint(-3, 4, (n, k // group), generator=seed)
    zeros = torch.randint(0, 16, (n, k // group), generator=seed)
    a = torch.eye(k)[:m].to(dtype)
    expected = reference.dequantize(q, scales, zeros)[:, :m].T.float()
    for kind in (torch.uint8, torch.int32, torch.float32, torch.bfloat16):
        y = matmul_int4(a, packing.pack(q), scales.to(dtype), zeros.to(kind), k)
        assert_identical(y, expected)


FP4_SHAPES = [(1, 16, 16), (5, 96, 32), (7, 48, 16), (64, 576, 32), (20, 272, 16), (2100, 512, 32)]


def fp4_product(a: Tensor, w: Tensor, scales: Tensor, group: int) -> Tensor:
    """By the op, which must have taken the CPU kernels."""
    format_ = "mxf4" if group == 32 else "nvf4"
    ran = explain(
        lambda x: torch.ops.intlass.matmul_block_scaled(
            x, w, None, scales, format_, False, False, None, torch.float32
        ),
        a,
    )
    assert not ran.fallbacks
    y: Tensor = ran.result
    return y


@pytest.mark.parametrize(("n", "k", "group"), FP4_SHAPES)
@pytest.mark.parametrize("m", ROWS)
def test_fp4_is_within_tolerance(n: int, k: int, group: int, m: int) -> None:
    seed = generator(n, k, m)
    codes = torch.randint(0, 16, (n, k), generator=seed)
    low, high = (118, 134) if group == 32 else (1, 120)
    scales = torch.randint(low, high, (n, k // group), dtype=torch.uint8, generator=seed)
    a = torch.randn(m, k, generator=seed)
    y = fp4_product(a, packing.pack(codes), scales, group)
    w = fp4_dense(codes, scales, group)
    assert_close(y, a.double() @ w.T, a.double().abs() @ w.abs().T)


def fp4_dense(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    factors = fp4.e8m0_values(scales) if group == 32 else scales.view(torch.float8_e4m3fn).double()
    return fp4.decode_e2m1(codes).double() * factors.repeat_interleave(group, 1)


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("m", [1, 40])
def test_every_fp4_number_is_exact(m: int, group: int) -> None:
    """One code a column under each scale there is, the largest and the subnormal ones too."""
    scales = torch.arange(255 if group == 32 else 127, dtype=torch.uint8)[:, None]
    codes = (torch.arange(group) % 16).repeat(len(scales), 1)
    w = fp4_dense(codes, scales, group)
    a = torch.eye(group).repeat(3, 1)[:m]
    y = fp4_product(a, packing.pack(codes), scales, group)
    assert_identical(y, reference.round_once(a.double() @ w.T, torch.float32))


def test_codes_equal_to_their_zero_vanish() -> None:
    """No sum of q apart from a sum of zeros: where w is 0 the product is 0, not nearly."""
    q, a = torch.full((24, 96), 11, dtype=torch.int8), 1e6 * torch.randn(2, 96)
    zeros = torch.full((24, 3), 11.0)
    y = matmul_int4(a, packing.pack(q), torch.rand(24, 3), zeros, 96)
    assert (y == 0).all()


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("value", [2.0**-24, 2.0**-14, 65504.0, -0.0, torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_are_read_exactly(value: float, dtype: torch.dtype, flush: bool) -> None:
    scales = torch.full((3, 2), value, dtype=dtype)
    q = torch.ones(3, 32, dtype=torch.int8)
    # The scale times the zeros of the other columns: NaN if it is not finite.
    expected = torch.full((1, 3), value).to(dtype).float() + (0 * scales[:, 1].float())
    torch.set_flush_denormal(flush)
    try:
        y = matmul_bytes(torch.eye(32)[:1], q, scales)
    finally:
        torch.set_flush_denormal(False)
    assert_identical(y, expected)


@pytest.mark.parametrize("m", [2, 40])
def test_broadcast_and_strided_parameters(m: int) -> None:
    n, k, group = 48, 128, 32
    seed = generator(m)
    q, a = int4(n, k, False, seed), torch.randn(k, m, generator=seed).T
    table = torch.rand(k // group, 2 * n, generator=seed)
    many = table[:, ::2].T  # [N, G], neither stride 1
    one, column = torch.rand(1, 1, generator=seed), torch.rand(n, 1, generator=seed)
    for scales in (many, one, column, one[0, 0], column[:, 0]):
        for zeros in (many, (15 * many).long(), one, column, (15 * many)[:, 1].short(), None):
            codes = q if zeros is not None else q - 8
            strided = torch.stack((packing.pack(codes), packing.pack(codes)), 2)[..., 1]
            y = matmul_int4(a, strided, scales, zeros, k)
            z = None if zeros is None else problem.rows_groups(zeros)
            w = reference.dequantize(codes, problem.rows_groups(scales), z)
            assert_close(y, a.double() @ w.T, a.double().abs() @ w.abs().T)


def test_leading_dimensions_are_kept() -> None:
    q, scales = torch.randint(-128, 128, (10, 64), dtype=torch.int8), torch.rand(10, 1)
    w = reference.dequantize(q, scales, None)
    for lead in ((), (3,), (2, 1, 9)):
        a = torch.randn(*lead, 64)
        y = matmul_bytes(a, q, scales)
        assert_close(y, a.double() @ w.T, a.double().abs() @ w.abs().T)


def test_nothing_to_point_at_is_left_to_the_reference() -> None:
    scales, q = torch.ones(4, 1), torch.ones(4, 32, dtype=torch.int8)
    op = "matmul_int8_bf16_tn"
    assert planned(op, torch.ones(0, 32), q, scales, None, 32) is None
    assert planned(op, torch.ones(2, 32), q[:0], scales[:0], None, 32) is None
    with torch._subclasses.FakeTensorMode() as mode:
        assert planned(op, torch.ones(2, 32), mode.from_tensor(q), scales, None, 32) is None


def test_a_plan_serves_calls_of_its_signature_alone() -> None:
    """Other tensors of the signature, then each thing that a signature tells apart."""
    op = torch.ops.intlass.matmul_int4_bf16_tn
    seed = generator(7)

    def check(
        m: int = 3, n: int = 24, group: int = 32, dtype: torch.dtype = torch.float32, **change: bool
    ) -> None:
        q = int4(n, 64, "signed" in change, seed)
        a = torch.randn(m, 64, generator=seed).to(dtype)
        scales = torch.rand(64 // group, n, generator=seed)
        scales = scales.T if "strided" in change else scales.T.contiguous()
        zeros = None if "signed" in change else 15 * torch.rand(n, 64 // group, generator=seed)
        bias = torch.randn(n, generator=seed) if "bias" in change else None
        y = op(a, packing.pack(q), scales, zeros, bias=bias, out_dtype=torch.float32)
        w = reference.dequantize(q, scales, zeros)
        expected = a.double() @ w.T + (0 if bias is None else bias)
        assert_close(y, expected, a.double().abs() @ w.abs().T + (bias is not None))

    for _ in range(2):
        check()
        check(m=1)
        check(m=9)
        check(n=8)
        check(group=64)
        check(dtype=torch.bfloat16)
        for change in ("signed", "strided", "bias"):
            check(**{change: True})
    with pytest.raises(ValueError, match="bytes a row"):
        op(torch.ones(3, 62), torch.ones(24, 32, dtype=torch.uint8), torch.ones(24, 2))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, empty_kernel_cache: Path) -> Path:
    """As in a process that has not used the kernels yet, with an empty cache. Builds in a hurry."""
    hurried = tuple("-O1" if flag == "-O3" else flag for flag in cpu._FLAGS)
    monkeypatch.setattr(cpu, "_FLAGS", hurried)
    monkeypatch.setattr(cpu, "_loaded", None)
    monkeypatch.setattr(cpu, "_load_tried", False)
    return empty_kernel_cache


def product() -> Tensor | None:
    q = torch.ones(2, 32, dtype=torch.int8)
    return planned("matmul_int8_bf16_tn", torch.ones(1, 32), q, torch.ones(2, 1), None, 32)


def test_library_is_built_once_for_all_processes(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert product() is not None
    (entry,) = fresh.glob("*.cubin")
    monkeypatch.setattr(cpu, "_loaded", None)
    monkeypatch.setattr(cpu, "_load_tried", False)
    monkeypatch.setattr(cpu, "_build", lambda _: pytest.fail("built a second time"))
    assert product() is not None
    assert entry.exists()


@pytest.mark.usefixtures("fresh")
def test_no_compiler_is_one_warning_and_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "compiler", lambda: None)
    with pytest.warns(
        RuntimeWarning, match=r"slow reference: no C\+\+ compiler .* apt-get install"
    ):
        assert product() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert product() is None
    x = torch.randn(3, 32)
    q = torch.randint(-128, 128, (2, 32), dtype=torch.int8)
    y = torch.ops.intlass.matmul_int8_bf16_tn(x, q, None, torch.ones(2))
    assert_close(y, x.double() @ q.double().T, x.double().abs() @ q.double().abs().T)


@pytest.mark.usefixtures("fresh")
def test_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'out of ideas' >&2; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(cpu, "compiler", lambda: str(broken))
    with pytest.warns(RuntimeWarning, match=r"(?s)returned 3.*out of ideas"):
        assert product() is None


def test_key_depends_on_the_compiler(tmp_path: Path) -> None:
    keys = set()
    for version in ("12.2", "13.1"):
        fake = tmp_path / version
        fake.write_text(f"#!/bin/sh\necho {version}\n")
        fake.chmod(0o755)
        keys.add(cpu._cache_key(str(fake)))
    assert len(keys) == 2


@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64"])
@pytest.mark.usefixtures("fresh")
def test_lesser_processors_compute_the_same(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 lanes with and without AVX2, on whatever x86 machine this runs."""
    if platform.machine() != "x86_64":
        pytest.skip("x86 only")
    flags = [f"-march={target}" if f.startswith("-march") else f for f in cpu._FLAGS]
    monkeypatch.setattr(cpu, "_FLAGS", tuple(flags))
    for n, k, group in SHAPES[:6]:
        test_int4_is_within_tolerance(n, k, group, 3, signed=False)
        test_int4_is_within_tolerance(n, k, group, 16, signed=True)
        test_nf4_is_within_tolerance(n, k, group, 3, torch.bfloat16)
        test_nf4_is_within_tolerance(n, k, group, 16, torch.float32)
        for kind in ("s8", "e4m3"):
            test_bytes_are_within_tolerance(n, k, group, 3, kind)
            test_bytes_are_within_tolerance(n, k, group, 16, kind)
    for k, group in ((8, 8), (16, 16), (31, 31)):
        test_every_fp8_number_is_exact(3, k, group, True)
        test_every_nf4_number_is_exact(3, k, group, torch.float16)
    for n, k, group in FP4_SHAPES[:5]:
        test_fp4_is_within_tolerance(n, k, group, 3)
        test_fp4_is_within_tolerance(n, k, group, 16)
