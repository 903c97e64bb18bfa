"""Triton's kernels that decode weights or stand between QAT's products, and GPTQ's columns.

On a GPU the tests of the ops run them as the ops do; here they run under Triton's interpreter. It
is chosen when Triton is imported, hence a process of its own.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from fp4_case import exact

from intlass_ops import fp4, packing

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter")


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="runs below, or on the GPU")
def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, str(Path(__file__))], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@interpreted
@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float8_e4m3fn])
def test_every_code_under_every_scale(dtype: torch.dtype, blocked: bool) -> None:
    from intlass_ops.triton import decode_blocks

    g, numbers = (32, 255) if dtype == torch.float8_e8m0fnu else (16, 127)
    bits = torch.arange(numbers, dtype=torch.uint8)
    scales = bits.view(dtype)[:, None].expand(-1, 5).contiguous()
    codes = packing.pack(torch.arange(16, dtype=torch.uint8).repeat(numbers, 5 * g // 16))
    factor = 0.25 if g == 32 else 1.0
    stored = fp4.to_blocked(scales) if blocked else scales
    decoded = decode_blocks.decode(codes, stored, blocked, torch.float32, factor)
    assert torch.equal(decoded.double() / factor, exact(codes, scales))
    assert torch.equal(decoded.bfloat16().float(), decoded)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("signed", [True, False])
def test_dequantised_weights(signed: bool, dtype: torch.dtype) -> None:
    from intlass_ops.triton import dequantize as kernels

    rng = torch.Generator().manual_seed(0)
    for n, k, groups in ((33, 301, 1), (17, 336, 7), (20, 512, 4), (3, 2048, 2)):
        q = torch.randint(-8, 8, (n, k), generator=rng) + (0 if signed else 8)
        s = torch.rand(n, groups, generator=rng)
        z = None if signed else 15 * torch.rand(n, groups, generator=rng)
        fp8 = (torch.arange(n * k).view(n, k) % 256).to(torch.uint8)
        fp8[fp8 % 128 == 127] = 0  # not the two NaNs
        fp8 = fp8.view(torch.float8_e4m3fn)
        one_scale = (q.to(torch.int8), s[:, :1]), (fp8.T.contiguous().T, s[:, :1])
        for codes, scales in ((packing.pack(q), s), (fp8, s), *one_scale):
            found = kernels.dequantize(codes, scales, z, k, dtype)
            expected = torch.ops.intlass.dequantize(codes, scales, z, k, dtype)
            assert torch.equal(found, expected), (n, k, groups, codes.dtype)


@interpreted
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dequantised_nf4(dtype: torch.dtype, scale: torch.dtype) -> None:
    """Codes in bytes and in words, each in every place."""
    from intlass_ops.triton import dequantize as kernels

    rng = torch.Generator().manual_seed(0)
    for n, k, groups in ((33, 301, 1), (17, 336, 7), (20, 512, 8), (3, 1300, 1)):
        codes = (torch.arange(n)[:, None] + 7 * torch.arange(k)) % 16
        packed, s = packing.pack(codes), torch.rand(n, groups, generator=rng).to(scale)
        expected = oracle.numbers("nf4", codes).float() * s.float().repeat_interleave(
            k // groups, 1
        )
        for w in (packed, packed.T.contiguous().T, torch.nn.functional.pad(packed, (0, 3))):
            found = kernels.dequantize(w[:, : packed.shape[1]], s, None, k, dtype, "nf4")
            assert torch.equal(found, expected.to(dtype)), (n, k, groups)


@interpreted
@pytest.mark.parametrize("shape", [(70, 300), (5, 16), (130, 257)])
def test_codes_of_gradients(shape: tuple[int, int]) -> None:
    from intlass_ops.triton import training

    rng = torch.Generator().manual_seed(0)
    dy = torch.randn(shape, generator=rng)
    dy[3], dy[4, 2], dy[2, 1] = 0, torch.nan, torch.inf
    rows, columns = (torch.rand(size, 1, generator=rng) for size in shape)
    seed = torch.randint(2**62, (1,), generator=rng)
    wide = [-(-size // 16) * 16 for size in shape]
    found = training.quantise_gradient(dy, rows, columns, seed, *wide)
    expected = torch.ops.intlass.quantize_gradient(dy, rows, columns, seed)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@interpreted
def test_transposed_codes_and_rotated_gradients() -> None:
    from intlass_ops.triton import training

    q = torch.randint(-8, 8, (70, 301))
    for codes in (q.to(torch.int8), packing.pack(q)):
        found = training.transpose_codes(codes, 301, 80)
        assert torch.equal(found[:, :70], q.T.to(torch.int8))
        assert not found[:, 70:].any()
    for r in (16, 32, 256):
        g = torch.randint(-8, 8, (7, 3 * r)).half()
        mask = torch.randint(0, 256, (7, 3 * r // 8), dtype=torch.uint8)
        h = torch.randint(-1, 2, (r, r)).half()
        expected = torch.ops.intlass.rotate_back(g, mask, h)
        assert torch.equal(training.rotate_back(g, mask, h), expected)


@interpreted
@pytest.mark.parametrize(("symmetric", "act_order"), [(True, True), (False, False)])
def test_columns_of_gptq(symmetric: bool, act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from intlass_ops.triton import gptq as kernels

    module = importlib.import_module("intlass_ops.gptq")  # the package's name is the function's

    rng = torch.Generator().manual_seed(0)
    w, x = torch.randn(11, 80, generator=rng), torch.randn(160, 80, generator=rng)
    how = {"group_size": 16, "symmetric": symmetric, "act_order": act_order, "block_size": 32}
    expected = module.gptq(w, x.T @ x, **how)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "_pass_over", lambda *_: kernels.columns)
    found = module.gptq(w, x.T @ x, **how)  # type: ignore[arg-type]
    # Sums in another order: a code that falls on the other side moves those after it.
    assert (found.codes != expected.codes).float().mean() < 0.01
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-2, atol=0)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("arch", [80, 90])
def test_columns_of_gptq_compile_without_a_gpu(arch: int) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from intlass_ops.triton.gptq import _kernel

    zeros = arch == 90
    types = {"zeros_ptr": "*i32", "place_ptr": "*i64", "codes_ptr": "*i8"}
    types |= dict.fromkeys(("work_ptr", "factor_ptr", "scales_ptr", "errors_ptr"), "*fp32")
    types |= dict.fromkeys(("n", "k", "groups", "group_size", "start"), "i32")
    types |= dict.fromkeys(("first", "last", "width"), "i32") | {"low": "fp32", "high": "fp32"}
    signature = {name: types.get(name, "constexpr") for name in _kernel.arg_names}
    constants = {"HAS_ZEROS": zeros, "ROWS": 8, "W": 128}
    source = triton.compiler.ASTSource(_kernel, signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["cubin"]
