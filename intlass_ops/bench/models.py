"""Who takes part in `intlass bench model`: one Llama with random weights in several schemes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers

from ..demo.course import intlass_backend
from ..demo.figures import Speed, speeds, weight_bytes
from ..integrations.static_decoding import Decoder
from ..quantize import (
    Int4WeightOnly,
    Int8DynamicActivationInt4Weight,
    Int8DynamicActivationInt8Weight,
    Scheme,
    quantize_,
)

SCHEMES: dict[str, Scheme | None] = {
    "dense": None,
    "w4a16": Int4WeightOnly(group_size=128, symmetric=True),
    "w8a8": Int8DynamicActivationInt8Weight(),
    "w4a8": Int8DynamicActivationInt4Weight(group_size=128),
}
CHUNK, LENGTH = 1024, 2048
CPU_CHUNK, CPU_LENGTH = 64, 128


def measure(
    names: list[str], layers: int, hidden: int, device: str, dtype: torch.dtype, seconds: float
) -> Iterator[tuple[str, Speed, int]]:
    """(scheme, tokens a second, bytes of weights), one scheme after another."""
    on_cpu = device == "cpu"
    chunk, length = (CPU_CHUNK, CPU_LENGTH) if on_cpu else (CHUNK, LENGTH)
    config = transformers.LlamaConfig(
        vocab_size=32768,
        hidden_size=hidden,
        intermediate_size=7 * hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=length,
    )
    for name in names:
        torch.manual_seed(0)
        with torch.device(device):
            model: Any = transformers.LlamaForCausalLM(config).to(dtype).eval()
        scheme = SCHEMES[name]
        if scheme is not None:
            quantize_(model.model, scheme)
        backend = "inductor" if scheme is None else intlass_backend()

        def compiled(step: Any, backend: Any = backend) -> Any:
            mode = None if on_cpu else "reduce-overhead"
            return torch.compile(step, backend=backend, mode=mode, fullgraph=True, dynamic=False)

        torch._dynamo.reset()
        decoder = Decoder.of(model, compiled, chunk=chunk, length=length, regions=on_cpu)
        for _ in range(3):  # compiled, recorded, replayed
            decoder.prefill([0] * chunk)
            decoder.next(0, chunk)
        (speed,) = speeds([decoder], [1, 2, 3], seconds)
        yield name, speed, weight_bytes(model)
        del model, decoder
