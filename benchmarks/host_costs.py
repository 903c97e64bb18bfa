"""What calls cost the host: the first of a process, the first of each kernel, every one after.

    python benchmarks/host_costs.py --out benchmarks/results/host-costs-h200

Each process starts with an empty kernel cache (`cold`), then the same once more with what the
first left on disk (`warm`); NVRTC's own cache is off. Seconds from the call until the GPU has
finished; the first call of a process imports CuPy and opens NVRTC. `eager`: microseconds of host
work a call of one token at 4096x4096, the median of many runs of calls that nothing waits for,
beside PyTorch's own. `compiled`: the same of a transformer's seven linears of one token, without
attention, under torch.compile without CUDA graphs, so narrow (1024) that the GPU waits.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

WIDTH, GROUP = 4096, 128
NARROW, INNER, BLOCKS = 1024, 2816, 8
RUNS, CALLS = 60, 100
Call = Callable[[], object]


def _ours(tokens: int) -> dict[str, Call]:
    from intlass_ops import matmul_int4_bf16_tn, matmul_int8_bf16_tn

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")

    x = torch.randn(tokens, WIDTH, dtype=torch.bfloat16, device="cuda")
    x8, x_scale = codes(tokens, WIDTH), torch.rand(tokens, 1, device="cuda")
    w4, w8 = codes(WIDTH, WIDTH // 2).view(torch.uint8), codes(WIDTH, WIDTH)
    of_groups = torch.rand(WIDTH, WIDTH // GROUP, dtype=torch.bfloat16, device="cuda")
    of_rows = torch.rand(WIDTH, device="cuda")
    return {
        "W4A16": lambda: matmul_int4_bf16_tn(x, w4, of_groups),
        "W8A8": lambda: matmul_int8_bf16_tn(x8, w8, x_scale, of_rows),
        "W4A8": lambda: matmul_int4_bf16_tn(x8, w4, of_groups, a_scale=x_scale),
    }


def _pytorchs() -> dict[str, Call]:
    x = torch.randn(1, WIDTH, dtype=torch.bfloat16, device="cuda")
    w = torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16, device="cuda")
    codes = torch.randint(0, 256, (WIDTH, WIDTH // 2), dtype=torch.uint8, device="cuda")
    tiles = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(WIDTH // GROUP, WIDTH, 2, dtype=torch.bfloat16, device="cuda")
    return {
        "torch.add": lambda: torch.add(x, x),
        "bf16, F.linear": lambda: torch.nn.functional.linear(x, w),
        "W4A16, _weight_int4pack_mm": lambda: torch.ops.aten._weight_int4pack_mm(
            x, tiles, GROUP, scales
        ),
    }


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = dict.fromkeys("qkvo", (NARROW, NARROW))
        sizes |= {"gate": (NARROW, INNER), "up": (NARROW, INNER), "down": (INNER, NARROW)}
        for name, (k, n) in sizes.items():
            setattr(self, name, torch.nn.Linear(k, n, bias=False))
        self.norms = torch.nn.ModuleList([torch.nn.RMSNorm(NARROW) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norms[0](x)
        x = x + self.o(self.q(h) * torch.sigmoid(self.k(h)) + self.v(h))
        h = self.norms[1](x)
        return x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))


class _HandWritten(torch.nn.Module):
    """A linear that dequantises its weight, as anyone would write it."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        groups = linear.weight.detach().float().unflatten(1, (-1, GROUP))
        scales = groups.abs().amax(-1, keepdim=True).div(7).bfloat16()
        codes = groups.div(scales).round().clamp(-8, 7).to(torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.codes.to(x.dtype) * self.scales).flatten(1)
        return torch.nn.functional.linear(x, weight)


def _compiled() -> dict[str, Call]:
    import intlass_ops
    from intlass_ops.lowering import backend as intlass

    def blocks() -> torch.nn.Module:
        layers = torch.nn.Sequential(*[_Block() for _ in range(BLOCKS)])
        return layers.to("cuda", torch.bfloat16).requires_grad_(False)

    by_hand, w4a16, w8a8 = blocks(), blocks(), blocks()
    for block in by_hand:
        for name, layer in list(block.named_children()):
            if isinstance(layer, torch.nn.Linear):
                setattr(block, name, _HandWritten(layer))
    intlass_ops.quantize_(w4a16, intlass_ops.Int4WeightOnly(GROUP))
    intlass_ops.quantize_(w8a8, intlass_ops.Int8DynamicActivationInt8Weight())
    models: dict[str, Any] = {"bf16, Inductor": (blocks(), "inductor")}
    ours = {"W4A16, hand-written": by_hand, "W4A16, quantize_": w4a16, "W8A8, quantize_": w8a8}
    models |= {name: (model, intlass) for name, model in ours.items()}
    x = torch.randn(1, NARROW, dtype=torch.bfloat16, device="cuda")
    calls: dict[str, Call] = {}
    for name, (model, backend) in models.items():
        call = torch.compile(model, backend=backend)
        calls[name] = functools.partial(call, x)
    return calls


def _seconds(call: Call) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _host_microseconds(call: Call, calls: int = CALLS) -> float:
    for _ in range(2):  # compiled, and planned
        call()
    runs = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        runs.append((time.perf_counter() - begin) / calls * 1e6)
    return statistics.median(runs)


def _measure() -> dict[str, Any]:
    """In a process of its own: a kernel of few tokens first, then others, then calls over again."""
    torch.ones(1, device="cuda")  # PyTorch's own start
    begin = time.perf_counter()
    import intlass_ops  # noqa: F401

    figures: dict[str, Any] = {"import": time.perf_counter() - begin}
    with torch.inference_mode():
        few, many = _ours(1), _ours(64)
        figures["first call of the process, W4A16 M=1"] = _seconds(few["W4A16"])
        for name in ("W8A8", "W4A8"):
            figures[f"first call, {name} M=1"] = _seconds(few[name])
        for name, call in many.items():
            figures[f"first call, {name} M=64"] = _seconds(call)
        eager = {**few, **_pytorchs()}
        figures["eager"] = {name: _host_microseconds(call) for name, call in eager.items()}
        figures["compiled"] = {
            name: _host_microseconds(call, CALLS // BLOCKS) / BLOCKS
            for name, call in _compiled().items()
        }
    return figures


def _in_a_process(cache: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--measure"],
        # NVRTC 13 keeps programs in the driver's cache: another compilation of one takes 50 ms.
        env={**os.environ, "INTLASS_CACHE_DIR": cache, "CUDA_CACHE_DISABLE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _table(cold: dict[str, Any], warm: dict[str, Any]) -> str:
    lines = ["| | cold, s | warm, s |", "|---|---|---|"]
    seconds = [key for key in cold if isinstance(cold[key], float)]
    lines += [f"| {key} | {cold[key]:.3f} | {warm[key]:.3f} |" for key in seconds]
    heads = {
        "eager": "eager call, 4096x4096, M=1",
        "compiled": "seven linears of one token, compiled, no CUDA graph",
    }
    for kind, head in heads.items():
        lines += ["", f"| {head} | host, us |", "|---|---|"]
        best = {key: min(cold[kind][key], warm[kind][key]) for key in cold[kind]}
        lines += [f"| {key} | {us:.1f} |" for key, us in best.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="path without .json and .md")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measure()))
        return
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = _in_a_process(cache), _in_a_process(cache)
    from intlass_ops import provenance

    table = _table(cold, warm)
    print(table)
    if options.out:
        environment = provenance.environment(torch.device("cuda"))
        provenance.write_json(f"{options.out}.json", {**environment, "cold": cold, "warm": warm})
        head = f"{environment['device']}, torch {environment['torch']}, commit "
        head += f"{environment['commit']}: `{environment['command']}`"
        Path(f"{options.out}.md").write_text(f"{head}\n\n{table}\n")


if __name__ == "__main__":
    main()
