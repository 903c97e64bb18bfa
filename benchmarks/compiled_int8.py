"""A linear with int8 weights and activations quantised per token, under torch.compile: plain
Inductor beside our backend, as JSON and a table.

    python benchmarks/compiled_int8.py [--out benchmarks/results/compiled-int8-h200]

The same module is compiled both ways: torchao's (Int8DynamicActivationInt8WeightConfig) and a
hand-written one of a dozen operations. Inductor runs as it is by default and with its GEMMs tuned
(`max_autotune`). One CUDA graph holds the calls, which go round over copies of the weights, so
neither launches nor caches count. `error` is the largest difference from the module's own eager
output, in float32 on codes that are its own, over the largest value.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from intlass_ops import lowering, provenance
from intlass_ops.bench import timing

# torch._int_mm takes more rows than this on a GPU.
FEWEST_ROWS = 17


class HandWritten(nn.Module):
    """y = (round(x / s) @ codes.T) * s * scales, s the largest |x| of a row over 127."""

    def __init__(self, n: int, k: int, device: str) -> None:
        super().__init__()
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.rand(n, device=device) * 1e-4 + 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = (wide.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-9)
        q = (wide / scale).round().clamp(-127, 127).to(torch.int8)
        missing = max(0, FEWEST_ROWS - len(q))
        sums = torch._int_mm(nn.functional.pad(q, (0, 0, 0, missing)), self.codes.t())[: len(q)]
        return (sums.float() * scale * self.scales).to(x.dtype)


def torchao(n: int, k: int, device: str) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    linear = nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16)
    model = nn.Sequential(linear).requires_grad_(False)
    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return model[0]


FORMS: dict[str, Callable[[int, int, str], nn.Module]] = {
    "torchao": torchao,
    "hand-written": HandWritten,
}
WAYS: dict[str, dict[str, Any]] = {
    "intlass": {"backend": lowering.backend},
    "inductor": {},
    "inductor, tuned": {"options": {"max_autotune": True}},
}


def measure(form: str, way: str, m: int, size: int, device: str) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    count = timing.copies_of(size * size) if device == "cuda" else 1
    linears = [FORMS[form](size, size, device) for _ in range(count)]
    x = torch.randn(m, size, device=device, dtype=torch.bfloat16)

    def run(linear: nn.Module, x: Tensor) -> Tensor:
        return linear(x)

    call = torch.compile(run, fullgraph=True, dynamic=False, **WAYS[way])
    with torch.no_grad():
        # Torchao's eager product falls back to one in float32 where a GPU has none of few rows.
        expected = copy.deepcopy(linears[0])(x).float()
        error = (call(linears[0], x).float() - expected).abs().max() / expected.abs().max()
        us = timing.microseconds(lambda i: call(linears[i], x), count, device, 0.1)
    return {"form": form, "way": way, "M": m, "us": round(us, 2), "error": float(error)}


def table(rows: list[dict[str, Any]]) -> str:
    found = {(row["form"], row["M"], row["way"]): row for row in rows}
    keys = dict.fromkeys((row["form"], row["M"]) for row in rows)
    others = [way for way in WAYS if way != "intlass" and any(row["way"] == way for row in rows)]
    lines = [f"| linear | M | intlass, us | {', us | '.join(others)}, us | fastest other : ours |"]
    lines.append("|---" * (len(others) + 4) + "|")
    for form, m in keys:
        each = [found.get((form, m, way), {}) for way in ("intlass", *others)]
        us = [row["us"] for row in each[1:] if "us" in row]
        ratio = f"{min(us) / each[0]['us']:.2f}" if us and "us" in each[0] else ""
        cells = " | ".join(f"{row.get('us', 'failed')}" if row else "" for row in each)
        lines.append(f"| {form} | {m} | {cells} | {ratio} |")
    return "\n".join(lines)


def write(out: str, environment: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """After every row: tuning takes minutes, and may be cut short."""
    provenance.write_json(f"{out}.json", {**environment, "rows": rows})
    head = f"{environment['device']}, torch {environment['torch']}, "
    head += f"N=K={environment['size']}, commit {environment['commit']}: "
    Path(f"{out}.md").write_text(f"{head}`{environment['command']}`\n\n{table(rows)}\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2048, 8192])
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=FORMS)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--out", help="path without .json and .md")
    args = parser.parse_args()
    environment = {**provenance.environment(torch.device(args.device)), "size": args.size}
    rows: list[dict[str, Any]] = []
    for way in args.ways:
        for form in args.forms:
            for m in args.rows:
                try:
                    row = measure(form, way, m, args.size, args.device)
                except Exception as problem:
                    said = next(iter(str(problem).splitlines()), "")
                    failed = f"{type(problem).__name__}: {said[:200]}"
                    row = {"form": form, "way": way, "M": m, "failed": failed}
                rows.append(row)
                print(row, flush=True)
                if args.out:
                    write(args.out, environment, rows)
    print(table(rows))
    # Others may have no way for a form: torch._int_mm refuses few rows.
    return int(any("failed" in row for row in rows if row["way"] == "intlass"))


if __name__ == "__main__":
    sys.exit(main())
