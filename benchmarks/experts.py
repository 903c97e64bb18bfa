"""Grouped products of mixtures of experts, beside PyTorch's own of bf16 weights.

    python benchmarks/experts.py --out benchmarks/results/experts-h200

The projections of known models, random numbers; FP4 and FP8 weights are under bf16 activations.
Each token chooses its experts at random; calls of one CUDA graph go round over such choices, so
that they meet other experts' weights. Microseconds; the largest error beside the float64 product of
some rows, in units of eps(bf16) * (|x| @ |w|).
"One by one" is a call of `matmul_int4_bf16_tn` for each expert, from outside, with the wait for how
many tokens each has: what `matmul_experts` did before it had a kernel of its own.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from intlass_ops import dequantize, explain, fp4, matmul_experts, matmul_int4_bf16_tn, provenance
from intlass_ops.bench import parse_numbers, timing

BF16 = torch.bfloat16
TOKENS = "1,8,64,512,4096"
SECONDS = 0.004  # of each measurement
CHOICES = 24
CHECKED = 4  # rows of the result


class Layer(NamedTuple):
    model: str
    experts: int
    top_k: int
    n: int
    k: int


LAYERS = (
    Layer("Qwen3-30B-A3B, gate and up", 128, 8, 1536, 2048),
    Layer("Qwen3-30B-A3B, down", 128, 8, 2048, 768),
    Layer("Mixtral 8x7B, gate and up", 8, 2, 28672, 4096),
    Layer("Mixtral 8x7B, down", 8, 2, 4096, 14336),
    Layer("gpt-oss-20b, gate and up", 32, 4, 5760, 2880),
    Layer("DeepSeek-V3 on 8 GPUs, gate and up", 32, 1, 4096, 7168),
)


def routing(layer: Layer, tokens: int) -> Tensor:
    """Where each expert's tokens end."""
    chosen = torch.rand(tokens, layer.experts, device="cuda").topk(layer.top_k).indices
    counts = torch.bincount(chosen.flatten(), minlength=layer.experts)
    return counts.cumsum(0)


def weight(codes: Tensor, scales: Tensor, zeros: Tensor | None, k: int, expert: int) -> Tensor:
    if scales.dtype == torch.uint8:
        codes, scales = (t[None] for t in fp4.as_int8(codes[expert], scales[expert]))
        expert = 0
    z = None if zeros is None else zeros[expert]
    return dequantize(codes[expert], scales[expert].float(), z, k=k).double()


def error(x: Tensor, y: Tensor, ends: Tensor, dense: Callable[[int], Tensor]) -> float:
    worst = 0.0
    for row in torch.linspace(0, len(x) - 1, CHECKED).long().tolist():
        w = dense(int((ends <= row).sum())).double()
        a = x[row].double()
        allowed = torch.finfo(BF16).eps * (w.abs() @ a.abs())
        worst = max(worst, float(((y[row].double() - w @ a).abs() / allowed).max()))
    return worst


def from_outside(call: Callable[[int], object]) -> float:
    """Microseconds as the caller sees them, the GPU's included."""
    times = []
    for i in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(i)
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def one_by_one(x: Tensor, w: Tensor, scales: Tensor, ends: Tensor, y: Tensor) -> None:
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            y[start:end] = matmul_int4_bf16_tn(x[start:end], w[expert], scales[expert])
        start = end


class Weights(NamedTuple):
    dense: Tensor
    w4: Tensor
    s4: Tensor
    z4: Tensor
    w8: Tensor
    s8: Tensor
    sx: Tensor  # MXFP4's, for the codes w4
    f8: Tensor  # FP8, with the scales sf
    sf: Tensor


def draw(layer: Layer) -> Weights:
    e, n, k = layer.experts, layer.n, layer.k
    w8 = torch.randint(-128, 128, (e, n, k), device="cuda", dtype=torch.int8)
    groups = k // (128 if k % 128 == 0 else 64)
    s4 = torch.rand(e, n, groups, device="cuda") * 0.01 + 0.01
    return Weights(
        dense=torch.randn(e, n, k, device="cuda", dtype=BF16),
        w4=w8[..., : k // 2].contiguous().view(torch.uint8),
        s4=s4.to(BF16),
        z4=torch.randint(0, 16, (e, n, groups), device="cuda", dtype=torch.uint8),
        w8=w8,
        s8=torch.rand(e, n, 1, device="cuda") * 1e-3 + 1e-3,
        sx=torch.randint(118, 122, (e, n, k // 32), device="cuda", dtype=torch.uint8),
        f8=(w8 & -2).view(torch.float8_e4m3fn),  # no NaN among them
        sf=s4,
    )


def measure(layer: Layer, of: Weights, m: int) -> Iterator[dict[str, Any]]:
    """One row a scheme."""
    rows = m * layer.top_k
    x = torch.randn(rows, layer.k, device="cuda", dtype=BF16)
    xs = x.abs().amax(1, keepdim=True).float() / 127
    xq = (x / xs).round().to(torch.int8)
    ends = [routing(layer, m) for _ in range(CHOICES)]
    offsets = [end.int() for end in ends]
    calls: dict[str, Callable[[int], Tensor]] = {
        "bf16": lambda i: torch._grouped_mm(x, of.dense.transpose(1, 2), offs=offsets[i]),
        "w4a16": lambda i: matmul_experts(x, of.w4, of.s4, ends=ends[i]),
        "w4a16, zero points": lambda i: matmul_experts(x, of.w4, of.s4, of.z4, ends=ends[i]),
        "mxfp4": lambda i: matmul_experts(x, of.w4, of.sx, ends=ends[i]),
        "fp8, groups": lambda i: matmul_experts(x, of.f8, of.sf, ends=ends[i]),
        "w8a16": lambda i: matmul_experts(x, of.w8, of.s8, ends=ends[i]),
        "w8a8": lambda i: matmul_experts(xq, of.w8, of.s8, ends=ends[i], a_scale=xs),
        "w4a8": lambda i: matmul_experts(xq, of.w4, of.s4, ends=ends[i], a_scale=xs),
    }
    case = {**layer._asdict(), "m": m}
    for scheme, call in calls.items():
        row = {**case, "scheme": scheme}
        ran = explain(call, 0)
        if scheme != "bf16":
            codes, scales = (of.w8, of.s8) if scheme[1] == "8" else (of.w4, of.s4)
            scales = of.sx if scheme == "mxfp4" else scales
            codes, scales = (of.f8, of.sf) if scheme.startswith("fp8") else (codes, scales)
            given = xq * xs if scheme.endswith("a8") else x
            zeros = of.z4 if "zero" in scheme else None
            dense = functools.partial(weight, codes, scales, zeros, layer.k)
            row["error"] = round(error(given, ran.result, ends[0], dense), 3)
            row["kernel"] = ran.dispatches[0].kernel
        row["us"] = round(timing.microseconds(call, CHOICES, "cuda", SECONDS), 2)
        yield row
    y = x.new_empty(rows, layer.n)
    us = from_outside(lambda i: one_by_one(x, of.w4, of.s4, ends[i], y))
    yield {**case, "scheme": "w4a16, one by one", "us": round(us, 2)}


def table(rows: list[dict[str, Any]], tokens: list[int]) -> str:
    us = {(r["model"], r["scheme"], r["m"]): r["us"] for r in rows}
    head = "| layer | scheme | " + " | ".join(f"{m} tokens" for m in tokens) + " |"
    lines = [head, "|---|---|" + "---|" * len(tokens)]
    for layer, scheme in dict.fromkeys(key[:2] for key in us):
        times = [us[layer, scheme, m] for m in tokens]
        if scheme == "bf16":
            cells = [f"{t:.1f} us" for t in times]
        else:
            cells = [f"{us[layer, 'bf16', m] / t:.2f}" for m, t in zip(tokens, times, strict=True)]
        lines.append(f"| {layer} | {scheme} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--layers", type=int, default=len(LAYERS), help="so many of them")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    options = parser.parse_args()
    tokens = parse_numbers(options.tokens)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for layer in LAYERS[: options.layers]:
            of = draw(layer)
            of_layer = [row for m in tokens for row in measure(layer, of, m)]
            print(table(of_layer, tokens), flush=True)
            rows += of_layer
    about = provenance.environment(torch.device("cuda"))
    largest = max(r.get("error", 0) for r in rows)
    provenance.write_json(str(options.out.with_suffix(".json")), {**about, "rows": rows})
    title = (
        "# Mixtures of experts: how many times as fast as PyTorch's grouped product of bf16\n\n"
        f"{about['device']}, CUDA graphs, each call with other experts; largest error {largest} "
        "eps(bf16) * (|x| @ |w|). `python benchmarks/experts.py`\n\n"
    )
    options.out.with_suffix(".md").write_text(title + table(rows, tokens))


if __name__ == "__main__":
    main()
