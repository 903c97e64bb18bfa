"""Triton's decoding kernels (mixed_mm transposed, block-scaled FP4 and FP8) under its interpreter.

On a GPU test_mixed_mm.py and test_block_scaled.py run them as the ops do. The interpreter is chosen
when Triton is imported, hence a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_block_scaled import exact
from test_mixed_mm import SHAPES, weight

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
@pytest.mark.parametrize("stripes", [1, 4])
@pytest.mark.parametrize("signed", [True, False])
def test_sums_over_rows(signed: bool, stripes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from intlass_ops.triton import mixed_mm

    monkeypatch.setattr(mixed_mm, "_stripes", lambda *_: stripes)
    for m, n, k, g in SHAPES:
        packed, s, z, w = weight(n, k, g, signed, torch.float16, exact=True)
        a = torch.randint(-1, 2, (m, n)).half()
        alpha = torch.tensor(2.0) if m % 2 else None
        zeros = None if z is None else z.T
        y = mixed_mm.matmul_nn(a, packed, s.T, zeros, k, alpha, torch.float16)
        assert torch.equal(y.double(), a.double() @ w.T * (2 if m % 2 else 1)), (m, n, k, g)
