# ruff: noqa: B023 (what is timed runs before the loop goes on)
"""Times of the quantisers, FP4 products and training steps against their bars: one command.

    python benchmarks/quantisers.py --out benchmarks/results/quantisers-h200

Every row is a ratio of two times on this machine in this run, with the bar that it should reach.
Device times are medians of a CUDA graph's replays with a cold L2; searches, GPTQ and training steps
are timed from outside. On a CPU, and with --quick, shapes are tiny: that shows that everything
runs, not how fast. Writes --out.json and --out.md after each section.
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from llama_block import Block, pseudo_quantised
from torch import Tensor

import intlass_ops as ia
from intlass_ops import block_quantize, packing, provenance
from intlass_ops.calibrate import InputStatistics

BF16 = torch.bfloat16
Method = Callable[[], object]


class Bench:
    """Timing on one device, and the rows found so far."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.cuda = device.type == "cuda"
        self.rows: list[dict[str, Any]] = []
        self._flush = torch.empty(1 << 28 if self.cuda else 0, dtype=torch.uint8, device=device)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=BF16)

    def size(self, n: int, step: int = 128) -> int:
        """n, or a small multiple of ``step`` in a tiny run."""
        return n if not self.tiny else min(n, step * (1 + n // step % 3))

    def ms(self, run: Method, repeats: int = 20) -> float:
        """Median device time of ``run``."""
        if not self.cuda:
            return self.wall_ms(run, 1)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        times = []
        for _ in range(repeats):
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize()
        return float(statistics.median(start.elapsed_time(end) for start, end in times))

    def wall_ms(self, run: Method, repeats: int = 3) -> float:
        """Median time of ``run`` as its caller sees it, after one call to warm up."""
        times = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            run()
            if self.cuda:
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times[1:])

    def add(self, what: str, case: str, ours: float, other: float, bar: float) -> None:
        """``other`` over ``ours``, in whatever unit, should be ``bar`` or more."""
        ratio = other / ours
        row = {"what": what, "case": case, "ours": ours, "other": other, "ratio": ratio, "bar": bar}
        self.rows.append(row)
        verdict = "  " if ratio >= bar else "<<"
        print(f"{ratio:8.2f} {verdict} {bar:4.2f}  {what}: {case}", flush=True)


def rotate_and_quantise(b: Bench) -> None:
    m, k = b.size(8192), b.size(8192, 256)
    x = b.randn(m, k)
    copied = torch.empty_like(x)
    per_byte = b.ms(lambda: copied.copy_(x)) / (2 * x.nbytes)
    calls: dict[str, Callable[..., tuple[Tensor, ...]]] = {
        "int8": ia.fused_quantize_int8,
        "int4": ia.fused_quantize_int4,
        "mx": ia.fused_quantize_mx,
        "nv": ia.fused_quantize_nv,
    }
    for r in (32, 64, 128):
        h = ia.hadamard_matrix(r, dtype=BF16, device=b.device)

        def unfused(x: Tensor) -> tuple[Tensor, Tensor]:
            xh = (x.view(-1, r) @ h).view(x.shape)
            scale = xh.abs().amax(-1, keepdim=True).float() / 127
            return (xh / scale).round().clamp(-127, 127).to(torch.int8), scale

        for name, call in calls.items():
            out = call(x, h)
            moved = x.nbytes + sum(t.nbytes for t in out)
            ours = b.ms(lambda: call(x, h))
            b.add(
                "rotate + quantise, speed of a copy", f"{name} R={r}", ours, moved * per_byte, 0.8
            )
            if name == "int8":
                compiled = torch.compile(unfused, backend="inductor" if b.cuda else "eager")
                other = b.ms(lambda: compiled(x))
                b.add("rotate + quantise, torch.compile", f"{name} R={r}", ours, other, 3.0)


def pipelines(b: Bench) -> None:
    """Rotation, quantisation and product against the product alone."""
    h = ia.hadamard_matrix(64, dtype=BF16, device=b.device)
    for n, k in ((5120, 5120), (51200, 5120), (5120, 25600), (28672, 8192)):
        n, k = b.size(n), b.size(k)
        w8 = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=b.device)
        w4 = packing.pack(w8.clamp(-7, 7))
        s = torch.rand(n, device=b.device)
        for m in (b.size(2048), b.size(4096)):
            x = b.randn(m, k)

            def int8(operands: tuple[Tensor, ...]) -> Tensor:
                return ia.matmul_int8_bf16_tn(operands[0], w8, operands[1], s)

            def int4(operands: tuple[Tensor, ...]) -> Tensor:
                return ia.matmul_int4_bf16_tn(operands[0], w4, s, k=k, a_scale=operands[1])

            case = f"M={m} N={n} K={k}"
            for name, product, quantise in (
                ("w8a8", int8, ia.fused_quantize_int8),
                ("w4a4", int4, ia.fused_quantize_int4),
            ):
                operands = quantise(x, h)
                alone = b.ms(lambda: product(operands))
                whole = b.ms(lambda: product(quantise(x, h)))
                b.add("pipeline over product alone", f"{name} {case}", whole, alone, 0.9)


def fp4_products(b: Bench) -> None:
    h = ia.hadamard_matrix(32, dtype=BF16, device=b.device)
    for n, k in ((4096, 4096), (28672, 4096), (8192, 28672)):
        n, k = b.size(n), b.size(k)
        w = b.randn(n, k)
        mx_w, mx_s = ia.fused_quantize_mx(w, h)
        nv_w, nv_s = ia.fused_quantize_nv(w, h)
        mx_blocked, nv_blocked = ia.to_blocked(mx_s), ia.to_blocked(nv_s)
        for m in (1, 16, b.size(2048), b.size(4096)):
            x = b.randn(m, k)
            (mx_x, mx_t), (nv_x, nv_t) = ia.fused_quantize_mx(x, h), ia.fused_quantize_nv(x, h)
            mx_u, nv_u = ia.to_blocked(mx_t), ia.to_blocked(nv_t)
            dense = b.ms(lambda: x @ w.T)
            case, bar = f"M={m} N={n} K={k}", 2.5 if m <= 16 else 1.0
            ours = b.ms(lambda: ia.matmul_mxf4_bf16_tn(mx_x, mx_w, mx_u, mx_blocked))
            b.add("FP4 product over bf16", f"mxf4 {case}", ours, dense, bar)
            ours = b.ms(lambda: ia.matmul_nvf4_bf16_tn(nv_x, nv_w, nv_u, nv_blocked))
            b.add("FP4 product over bf16", f"nvf4 {case}", ours, dense, bar)
            if m <= 16:
                ours = b.ms(lambda: ia.matmul_ada_mxf4_bf16_tn(mx_x, mx_w, mx_t, mx_s))
                b.add("FP4 product over bf16", f"ada mxf4 {case}", ours, dense, bar)


def mixed(b: Bench) -> None:
    n = k = b.size(4096)
    g = 128
    q = torch.randint(0, 16, (n, k), device=b.device, dtype=torch.int32)
    packed = ia.pack_int4(q)
    s = torch.rand(k // g, n, device=b.device).to(BF16) + 0.5
    z = torch.full_like(s, 8)
    tiny_w = tiny_s = None
    if b.cuda:
        bytes_ = (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8)
        tiny_w = torch.ops.aten._convert_weight_to_int4pack(bytes_, 8)
        tiny_s = torch.stack((s, (8 - z) * s), -1).contiguous()
    for m in (16, 32, 128, 512, 1024):
        x = b.randn(m, k)

        def dequantised() -> Tensor:
            w: Tensor = torch.ops.intlass.dequantize(packed, s.T, z.T, k, BF16)
            return w

        forward = b.ms(lambda: ia.mixed_mm(x, packed.T, s, z, g))
        back = b.ms(lambda: ia.mixed_mm(x, packed.T, s, z, g, transposed=True))
        case = f"M={m} N={n} K={k}"
        other = b.ms(lambda: x @ dequantised().T)
        b.add("mixed_mm over dequantise + matmul", f"forward {case}", forward, other, 1.0)
        other = b.ms(lambda: x @ dequantised())
        b.add("mixed_mm over dequantise + matmul", f"transposed {case}", back, other, 1.0)
        b.add("mixed_mm, transposed within 1.25x of forward", case, back, forward, 0.8)
        if tiny_w is not None:
            other = b.ms(lambda: torch.ops.aten._weight_int4pack_mm(x, tiny_w, g, tiny_s))
            b.add("mixed_mm over tinygemm", case, forward, other, 1.0)


def searches(b: Bench) -> None:
    """Triton's search against the vectorised one in PyTorch, on an eighth of the weight."""
    w = torch.randn(b.size(4096), b.size(14336), device=b.device)
    whole = b.wall_ms(lambda: ia.int4_optimal(w, group_size=128))
    b.add("int4_optimal g128 within 1 s", f"{tuple(w.shape)}", whole, 1e3, 1.0)
    if not b.cuda:
        return
    part = w[: w.shape[0] // 8]
    by_triton = block_quantize._by_triton
    finds: dict[str, Method] = {
        "int4 g128": lambda: ia.int4_optimal(part, group_size=128),
        "int8 g128": lambda: ia.int8_optimal(part, group_size=128),
        "uint4 g128": lambda: ia.uint4_optimal(part, group_size=128),
        "nvfp4": lambda: ia.nvfp4_optimal(part),
        "mxfp4": lambda: ia.mxfp4_optimal(part),
    }
    for name, find in finds.items():
        ours = b.wall_ms(find)
        block_quantize._by_triton = lambda *_: False
        try:
            other = b.wall_ms(find, 1)
        finally:
            block_quantize._by_triton = by_triton
        b.add("scale search over torch", f"{name} {tuple(part.shape)}", ours, other, 10.0)


def gptq(b: Bench) -> None:
    """The seven weights of a Llama-8B layer."""
    wide, inner = b.size(4096), b.size(14336)
    statistics_of = {}
    for k in {wide, inner}:
        statistics_of[k] = InputStatistics(k, device=b.device)
        statistics_of[k].update(torch.randn(2 * k, k, device=b.device))
    shapes = [(wide, wide)] * 2 + [(wide // 4, wide)] * 2 + [(inner, wide)] * 2 + [(wide, inner)]
    weights = [torch.randn(*shape, device=b.device) for shape in shapes]

    def layer() -> None:
        for w in weights:
            ia.gptq(w, statistics_of[w.shape[1]].hessian, group_size=128, act_order=True)

    b.add("GPTQ of a layer's seven weights within 60 s", "", b.wall_ms(layer, 1), 60e3, 1.0)


def training(b: Bench) -> None:
    """Forward and backward of one Llama-8B block."""
    width, inner, tokens = b.size(4096), b.size(14336), b.size(4096, 64)
    x = b.randn(1, tokens, width).requires_grad_()
    backend = "inductor" if b.cuda else "eager"

    def step(prepare: Callable[[Block], None]) -> float:
        with torch.device(b.device):
            block = Block(width, inner, 128 if not b.tiny else 32).to(BF16)
        prepare(block)
        run = torch.compile(block, backend=backend)

        def once() -> None:
            block.zero_grad()
            run(x).float().square().mean().backward()

        once()
        return b.wall_ms(once, 10 if b.cuda else 1)

    dense = step(lambda _: None)
    simulated = step(lambda block: pseudo_quantised(block, 8, 8, rotation=32))
    schemes: tuple[Literal["w8a8", "w4a4"], ...] = ("w8a8", "w4a4")
    for scheme in schemes:
        ours = step(lambda block: ia.quantize_(block, ia.QATConfig(scheme, 32, "quest", "int8")))
        b.add("training step over pseudo-quantised", scheme, ours, simulated, 1.3)
        b.add("training step over bf16", scheme, ours, dense, 1.0)


SECTIONS = (rotate_and_quantise, pipelines, fp4_products, mixed, searches, gptq, training)


def table(report: dict[str, Any]) -> str:
    where = report["environment"]
    lines = [
        f"{where['device']}, torch {where['torch']}, triton {where['triton']}, commit "
        f"{where['commit']}: `{where['command']}`",
        "",
        "| what | case | ours | other | ratio | bar |",
        "|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        times = f"{r['ours']:.4g} | {r['other']:.4g}"
        lines.append(f"| {r['what']} | {r['case']} | {times} | {r['ratio']:.2f} | {r['bar']} |")
    lines += [f"\n{name} failed:\n\n    {error}" for name, error in report["failed"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--only", nargs="*", choices=[s.__name__ for s in SECTIONS])
    parser.add_argument("--out", default="quantisers", help="path without .json and .md")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    bench = Bench(device, args.quick or device.type != "cuda")
    report: dict[str, Any] = {
        "environment": provenance.environment(device),
        "rows": bench.rows,
        "seconds": {},
        "failed": {},
    }
    for section in SECTIONS:
        name = section.__name__
        if args.only and name not in args.only:
            continue
        start = time.perf_counter()
        try:
            section(bench)
        except Exception:  # the other sections still count
            report["failed"][name] = traceback.format_exc().strip().splitlines()[-1]
            traceback.print_exc()
        report["seconds"][name] = round(time.perf_counter() - start, 1)
        provenance.write_json(f"{args.out}.json", report)
        Path(f"{args.out}.md").write_text(table(report))


if __name__ == "__main__":
    main()
