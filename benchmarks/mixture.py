"""A mixture of experts from transformers under torch.compile: bf16 and quantised.

    python benchmarks/mixture.py --json benchmarks/results/h200-mixture.json

Layers of the shapes of Qwen3-30B-A3B and gpt-oss-20b with random weights, CUDA graphs
(`mode="reduce-overhead"`): milliseconds a forward pass, without a cache of keys. bf16 runs by each
of transformers' own implementations of experts that torch.compile takes; quantised models by ours,
gpt-oss with MXFP4 experts and all else in bf16, as it is published.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn

from intlass_ops import (
    Fp4ExpertLinear,
    Int4WeightOnly,
    Int8DynamicActivationInt4Weight,
    Int8DynamicActivationInt8Weight,
    Scheme,
    lowering,
    provenance,
    quantize_,
)
from intlass_ops.integrations import experts

SCHEMES: dict[str, Scheme] = {
    "w4a16": Int4WeightOnly(128),
    "w4a8": Int8DynamicActivationInt4Weight(128),
    "w8a8": Int8DynamicActivationInt8Weight(),
}
MODELS = "Qwen3-30B-A3B", "gpt-oss-20b"
SHAPES = {
    "1 sequence": (1, 1),
    "16 sequences": (16, 1),
    "1024 tokens": (1, 1024),
}


def make(name: str, layers: int, device: str, tiny: bool) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        model = (_qwen3 if name == MODELS[0] else _gpt_oss)(layers, tiny)
    return model.eval()


def _gpt_oss(layers: int, tiny: bool) -> Any:
    from transformers import GptOssConfig, GptOssModel

    width, experts = (256, 8) if tiny else (2880, 32)
    config = GptOssConfig(
        hidden_size=width, intermediate_size=width, num_local_experts=experts,
        num_experts_per_tok=4, num_hidden_layers=layers, num_attention_heads=64,
        num_key_value_heads=8, head_dim=64, vocab_size=256, use_cache=False, pad_token_id=0,
    )  # fmt: skip
    return GptOssModel._from_config(config, dtype=torch.bfloat16)


def with_mxfp4_experts(model: nn.Module) -> None:
    """Random codes, which take as long as others; scales about 2^-7."""
    for _, module in list(experts.mixtures_of(model)):
        for name in experts.projections(module):
            e, n, k = experts.weights_of(module, name).shape
            like = {"dtype": torch.uint8, "device": getattr(module, name).device}
            codes = torch.randint(0, 256, (e, n, k // 2), **like)
            scales = torch.randint(118, 122, (e, n, k // 32), **like)
            experts.put(module, name, Fp4ExpertLinear(codes, scales))


def _qwen3(layers: int, tiny: bool) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeModel

    width, inner, count = (256, 128, 8) if tiny else (2048, 768, 128)
    config = Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=inner, intermediate_size=inner,
        num_experts=count, num_experts_per_tok=min(8, count), num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=4, head_dim=128, vocab_size=256,
        norm_topk_prob=True, use_cache=False,
    )  # fmt: skip
    return Qwen3MoeModel._from_config(config, dtype=torch.bfloat16)


def milliseconds(call: Callable[[], object], device: str, seconds: float) -> float:
    times: list[float] = []
    for _ in range(3):
        call()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 5:
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def rows(model: nn.Module, name: str, backend: Any, options: Any) -> list[dict[str, Any]]:
    found = []
    width = model.config.hidden_size
    compiled = torch.compile(model, backend=backend, mode=options.mode, dynamic=False)
    for case, (batch, length) in SHAPES.items():
        if "batched_mm" in name and batch * length > 1:
            continue  # it gathers a weight for each token and expert
        x = torch.randn(batch, length, width, dtype=torch.bfloat16, device=options.device)

        def call(x: Tensor = x) -> Tensor:
            y: Tensor = compiled(inputs_embeds=x, use_cache=False).last_hidden_state
            return y

        ms = milliseconds(call, options.device, options.seconds)
        found.append({"model": name, "case": case, "ms": round(ms, 4)})
        print(found[-1], flush=True)
    torch.compiler.reset()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--mode", default="reduce-overhead")
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="of Qwen3")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    about = {**provenance.environment(torch.device(options.device)), "layers": options.layers}
    found: list[dict[str, Any]] = []

    def measure(model: nn.Module, name: str, backend: Any) -> None:
        found.extend(rows(model, name, backend, options))
        if options.json:
            provenance.write_json(str(options.json), {**about, "rows": found})

    with torch.inference_mode():
        for name in options.models.split(","):

            def fresh(name: str = name) -> Any:
                return make(name, options.layers, options.device, options.tiny)

            for implementation in ("grouped_mm", "batched_mm"):
                model = fresh()
                model.set_experts_implementation(implementation)
                measure(model, f"{name}, bf16, {implementation}", "inductor")
            for scheme in options.schemes.split(",") if name == MODELS[0] else ["mxfp4"]:
                model = fresh()
                if scheme == "mxfp4":
                    with_mxfp4_experts(model)
                else:
                    quantize_(model, SCHEMES[scheme])
                measure(model, f"{name}, {scheme}", lowering.backend)


if __name__ == "__main__":
    main()
