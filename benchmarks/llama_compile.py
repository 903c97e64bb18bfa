"""What our backend adds to the compilation of a Llama, and what packing one takes, as JSON.

    python benchmarks/llama_compile.py [--device cpu|cuda] [--layers 8] [--width 1024] [--json FILE]

`compile`: the first call of a model of `--layers` layers under plain Inductor and under ours, each
in a process of its own with empty caches, `--repeat` times in turn; then calls with other numbers
of rows, which must not compile again. `pack`: `prepare_` on the linears of a whole Llama 3.1 8B
(`--pack-scale` divides its width), with the most memory in use over that of the quantised weights.
Weights are hand-written INT4 in groups of 128, or with `--library` those of torchao or our own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from llama_block import Block

from intlass_ops import Int4WeightOnly, lowering, prepare_, quantize_
from intlass_ops.cuda import compiler
from intlass_ops.lowering import graph_pass, runtime

GROUP = 128


class Int4Linear(nn.Module):
    """Two codes to a byte, the even column in the low nibble; w = (q - 8) * s."""

    def __init__(self, n: int, k: int, device: str) -> None:
        super().__init__()
        self.in_features, self.out_features = k, n
        weight = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
        scales = (torch.rand(n, k // GROUP, 1, device=device) * 0.004 + 0.002).bfloat16()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        n, k = self.out_features, self.in_features
        q = torch.stack([self.weight & 15, self.weight >> 4], -1).view(n, -1, GROUP).to(x.dtype)
        return nn.functional.linear(x, ((q - 8) * self.scales).view(n, k))


def hand_written(model: nn.Module, device: str) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                n, k = child.weight.shape
                setattr(parent, name, Int4Linear(n, k, device))


def torchao_int4(model: nn.Module, device: str) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    bits: Any = torch.int4  # type: ignore[attr-defined]
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=bits, granularity=PerGroup(GROUP)))


def torchao_int8(model: nn.Module, device: str) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))


def torchao_int8_prepared(model: nn.Module, device: str) -> None:
    torchao_int8(model, device)
    prepare_(model)


def our_w4a16(model: nn.Module, device: str) -> None:
    quantize_(model, Int4WeightOnly(group_size=GROUP))


LIBRARIES = {
    "hand-written": hand_written,
    "intlass-w4a16": our_w4a16,
    "torchao-int4": torchao_int4,
    "torchao-int8": torchao_int8,
    "torchao-int8-prepared": torchao_int8_prepared,
}


def compiled(args: argparse.Namespace) -> dict[str, Any]:
    """One process: the first call, and whether other numbers of rows compile again."""
    torch.manual_seed(0)
    with torch.device(args.device):
        layers = [Block(args.width, args.width * 7 // 2, 128) for _ in range(args.layers)]
    model = nn.Sequential(*layers).bfloat16().eval().requires_grad_(False)
    LIBRARIES[args.library](model, args.device)
    spent = {"rewrite": 0.0, "pack": 0.0, "kernels": 0.0}
    _timed(graph_pass, "rewrite", spent, "rewrite")
    _timed(runtime, "pack_all", spent, "pack")
    _timed(compiler, "compile_or_load", spent, "kernels")
    backend: Any = lowering.backend if args.backend == "intlass" else "inductor"
    call = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    inputs = [torch.randn(2, m, args.width, device=args.device).bfloat16() for m in (8, *args.rows)]
    with torch.no_grad():
        started = time.perf_counter(), _processor()
        call(inputs[0])
        _synchronize(args.device)
        ended = time.perf_counter(), _processor()
        first, swapped = dict(spent), lowering.counters().get("swapped", 0)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for x in inputs[1:]:
            call(x)
        _synchronize(args.device)
    after = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {
        "backend": args.backend,
        "first_call_s": round(ended[0] - started[0], 2),
        "processor_s": round(ended[1] - started[1], 2),
        "of_it_rewriting_s": round(first["rewrite"], 2),
        "of_it_packing_s": round(first["pack"], 2),
        "of_it_our_kernels_s": round(first["kernels"], 2),
        "graphs": before,
        "recompiles": after - before,
        "swapped": swapped,
        "dense": lowering.counters().get("run.dense", 0),
    }


def _processor() -> float:
    """Processor time of this process and of the compilers it waited for."""
    return sum(os.times()[:4])


def _timed(module: Any, name: str, spent: dict[str, float], key: str) -> None:
    original = getattr(module, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent[key] += time.perf_counter() - start

    setattr(module, name, timed)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def packed(args: argparse.Namespace) -> dict[str, Any]:
    """`prepare_` on every linear of the model, the head too."""
    d, kv, inner, vocabulary = (size // args.pack_scale for size in (4096, 1024, 14336, 128256))
    shapes = [(d, d), (kv, d), (kv, d), (d, d), (inner, d), (inner, d), (d, inner)]
    every = [*(shapes * 32), (vocabulary, d)]
    model = nn.ModuleList(Int4Linear(n, k, args.device) for n, k in every)
    model.requires_grad_(False)
    size = sum(t.nbytes for t in model.buffers())
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _synchronize(args.device)
    start = time.perf_counter()
    decisions = prepare_(model)
    _synchronize(args.device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / size if args.device == "cuda" else None
    return {
        "linears": len(every),
        "swapped": sum(each.outcome == "swapped" for each in decisions),
        "parameters": sum(n * k for n, k in every),
        "seconds": round(seconds, 2),
        "peak_over_weights": None if peak is None else round(peak, 3),
    }


def _fresh(arguments: list[str]) -> dict[str, Any]:
    """The last line of this script run again, in another process and with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "INTLASS_CACHE_DIR": f"{folder}/kernels"}
        environment = {**os.environ, **caches}
        if "cuda" not in sys.argv:
            # Threads that wait for one another count as work.
            environment |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, __file__, *sys.argv[1:], *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--library", default="hand-written", choices=LIBRARIES)
    parser.add_argument(
        "--rows", type=int, nargs="*", default=(1, 5, 64, 257), help="of later calls"
    )
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--pack-scale", type=int, default=1, help="0: do not pack")
    parser.add_argument("--json", default="")
    parser.add_argument("--backend", default="", help="run one measurement in this process")
    args = parser.parse_args()
    if args.backend:
        print(json.dumps(packed(args) if args.backend == "pack" else compiled(args)))
        return
    rows = []
    for _ in range(args.repeat):
        for name in ("inductor", "intlass"):
            rows.append(_fresh(["--backend", name]))
            print(rows[-1], flush=True)
    key = "first_call_s" if args.device == "cuda" else "processor_s"
    plain, ours = (
        statistics.median(row[key] for row in rows if row["backend"] == name)
        for name in ("inductor", "intlass")
    )
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "layers": args.layers,
        "width": args.width,
        "library": args.library,
        "compile": rows,
        "over_inductor": round(ours / plain - 1, 3),
    }
    if args.pack_scale:
        result["pack"] = _fresh(["--backend", "pack"])
        print(result["pack"], flush=True)
    print("over plain Inductor:", result["over_inductor"])
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
