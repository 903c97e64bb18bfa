"""Linears as checkpoints store them, under bf16 activations, beside PyTorch's own of bf16 weights.

    python benchmarks/stored_weights.py --out benchmarks/results/stored-weights-h200

A form is what a file holds: codes, groups, the types of scales and zero points. Random numbers of
that form, in CUDA graphs over cold copies; microseconds, the kernel that ran, and the largest error
beside the float64 product of the stored numbers, in units of eps(bf16) * (|x| @ |w|).
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from intlass_ops import (
    explain,
    lut4,
    matmul_fp8_bf16_tn,
    matmul_int4_bf16_tn,
    matmul_int8_bf16_tn,
    matmul_lut4_bf16_tn,
    provenance,
)
from intlass_ops.bench import parse_numbers, parse_shapes, timing

SHAPES = "4096x4096,28672x4096,4096x14336"
TOKENS = "1,8,16,32,64,256,512,2048"
SECONDS = 0.003  # of each measurement
CHECKED = 16  # rows and tokens
BF16, FP16, FP32, BYTE = torch.bfloat16, torch.float16, torch.float32, torch.uint8
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Form:
    bits: int
    group_size: int | None  # None: one scale a row
    scales: torch.dtype
    zeros: torch.dtype | None = None
    codes: torch.dtype = torch.int8  # of 8 bits
    nf4: bool = False

    def draw(self, n: int, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
        codes = torch.randint(0, 256, (n, k * self.bits // 8), dtype=BYTE, device="cuda")
        groups = (n, k // self.group_size) if self.group_size else (n,)
        scales = (torch.rand(groups, device="cuda") * 0.01 + 0.01).to(self.scales)
        zeros = None
        if self.zeros == BYTE:
            zeros = torch.randint(0, 16, groups, dtype=BYTE, device="cuda")
        elif self.zeros:
            zeros = (torch.rand(groups, device="cuda") * 15).to(self.zeros)
        if self.codes == FP8:
            codes[(codes & 127) == 127] = 0  # are no numbers
        return codes if self.bits == 4 else codes.view(self.codes), scales, zeros


FORMS = {
    "GGUF Q4_0": Form(4, 32, FP16),
    "GGUF Q4_K": Form(4, 32, FP32, FP32),
    "GGUF Q8_0": Form(8, 32, FP16),
    "GGUF Q6_K": Form(8, 16, FP32),
    "GPTQ, AWQ, fp16 scales": Form(4, 128, FP16, BYTE),
    "compressed-tensors": Form(4, 128, BF16),
    "HQQ": Form(4, 64, BF16, BF16),
    "torchao INT4": Form(4, 32, BF16, BF16),
    "INT8 by rows": Form(8, None, FP32),
    "FP8 by rows": Form(8, None, FP32, codes=FP8),
    "FP8 in blocks of 128": Form(8, 128, FP32, codes=FP8),
    "NF4, groups of 64": Form(4, 64, FP32, nf4=True),
}


def product(form: Form, x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    if form.nf4:
        return matmul_lut4_bf16_tn(x, codes, scales)
    if form.bits == 4:
        return matmul_int4_bf16_tn(x, codes, scales, zeros)
    if form.codes == FP8:
        return matmul_fp8_bf16_tn(x, codes, scales)
    return matmul_int8_bf16_tn(x, codes, None, scales)


def error(form: Form, x: Tensor, weight: tuple[Tensor, Tensor, Tensor | None], y: Tensor) -> float:
    """Of some rows and tokens, in units of eps(bf16) * (|x| @ |w|)."""
    codes, scales, zeros = weight[0][:CHECKED], weight[1][:CHECKED], weight[2]
    if form.nf4:
        q = lut4.decode(codes, x.shape[-1], "nf4", x.dtype).double()
    elif form.bits == 4:
        q = torch.stack((codes & 15, codes >> 4), -1).flatten(1).double()
        q = q if zeros is not None else torch.where(q > 7, q - 16, q)
    else:
        q = codes.double()
    groups = (len(q), 1, -1) if scales.dim() == 1 else (len(q), scales.shape[1], -1)
    q = q.view(groups)
    if zeros is not None:
        q = q - zeros[:CHECKED].double().unsqueeze(-1)
    w = (q * scales.double().view(*groups[:2], 1)).flatten(1)
    a = x[:CHECKED].double()
    allowed = torch.finfo(BF16).eps * (a.abs() @ w.abs().T)
    return float(((y[:CHECKED, :CHECKED].double() - a @ w.T).abs() / allowed).max())


def rounds(call: Callable[..., Tensor], x: Tensor, weights: list[tuple[Any, ...]]) -> float:
    """Microseconds of a call, with one weight after the other."""
    return timing.microseconds(lambda i: call(x, *weights[i]), len(weights), "cuda", SECONDS)


def measure(n: int, k: int, tokens: list[int]) -> Iterator[dict[str, Any]]:
    xs = [torch.randn(m, k, device="cuda", dtype=BF16) for m in tokens]
    copies = range(timing.copies_of(2 * n * k))
    dense: list[tuple[Any, ...]] = [(torch.randn(n, k, device="cuda", dtype=BF16),) for _ in copies]
    for x in xs:
        us = rounds(torch.nn.functional.linear, x, dense)
        yield {"form": "bf16", "n": n, "k": k, "m": len(x), "us": round(us, 2)}
    dense.clear()
    for name, form in FORMS.items():
        call = functools.partial(product, form)
        weights = [form.draw(n, k) for _ in range(timing.copies_of(n * k * form.bits // 8))]
        for x in xs:
            ran = explain(call, x, *weights[0])
            yield {
                "form": name,
                "n": n,
                "k": k,
                "m": len(x),
                "us": round(rounds(call, x, weights), 2),
                "kernel": ran.dispatches[0].kernel,
                "error": round(error(form, x, weights[0], ran.result), 3),
            }


def table(rows: list[dict[str, Any]], tokens: list[int]) -> str:
    """How many times as fast as bf16, by layer, form and tokens."""
    us = {(r["form"], r["n"], r["k"], r["m"]): r["us"] for r in rows}
    head = "| N x K | form | " + " | ".join(f"M={m}" for m in tokens) + " |"
    lines = [head, "|---|---|" + "---|" * len(tokens)]
    for form, n, k in dict.fromkeys(key[:3] for key in us):
        times = [us[form, n, k, m] for m in tokens]
        if form == "bf16":
            cells = [f"{t:.1f} us" for t in times]
        else:
            cells = [f"{us['bf16', n, k, m] / t:.2f}" for m, t in zip(tokens, times, strict=True)]
        lines.append(f"| {n}x{k} | {form} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="NxK, by commas")
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    options = parser.parse_args()
    tokens = parse_numbers(options.tokens)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for n, k in parse_shapes(options.shapes, 128):
            of_layer = list(measure(n, k, tokens))
            print(table(of_layer, tokens), flush=True)
            rows += of_layer
    about = provenance.environment(torch.device("cuda"))
    largest = max(r.get("error", 0) for r in rows)
    provenance.write_json(str(options.out.with_suffix(".json")), {**about, "rows": rows})
    title = (
        "# Linears as checkpoints store them: how many times as fast as PyTorch's of bf16\n\n"
        f"{about['device']}, activations in bf16, CUDA graphs over cold weights; largest error "
        f"{largest} eps(bf16) * (|x| @ |w|). `python benchmarks/stored_weights.py`\n\n"
    )
    options.out.with_suffix(".md").write_text(title + table(rows, tokens))


if __name__ == "__main__":
    main()
