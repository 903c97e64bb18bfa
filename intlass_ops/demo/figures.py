"""What the demo measures: speed, memory, logits, perplexity, and whether two texts agree.

Lives here: numbers only. Not here: models and compiling (integrations/), the course
(__init__.py), the output (show.py).
"""

from __future__ import annotations

import math
import pydoc_data.topics
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..explain import Dispatch
from ..integrations.static_decoding import Chosen, Decoder
from ..nn import IntLinear


@dataclass(frozen=True)
class Speed:
    """Tokens a second; medians over several calls."""

    prefill: float = math.nan
    decode: float = math.nan


def speeds(decoders: list[Decoder], tokens: list[int], seconds: float) -> list[Speed]:
    """Prefill and decode speed of each decoder, measured in turns so that all see the same machine.

    A prefill is one full chunk, a decode step includes the choice of its token on the host.
    """
    chunk = decoders[0].chunk
    prompt = (tokens * (1 + chunk // len(tokens)))[:chunk]
    prefill: list[list[float]] = [[] for _ in decoders]
    decode: list[list[float]] = [[] for _ in decoders]
    start = time.perf_counter()
    while time.perf_counter() - start < seconds * len(decoders) or len(prefill[0]) < 3:
        for i, decoder in enumerate(decoders):
            _synchronize(decoder.device)
            begin = time.perf_counter()
            token = int(decoder.prefill(prompt)[-1].argmax())
            prefill[i].append(time.perf_counter() - begin)
            for position in range(chunk, min(chunk + 16, decoder.step.length)):
                begin = time.perf_counter()
                token = int(decoder.next(token, position).argmax())
                decode[i].append(time.perf_counter() - begin)
    return [
        Speed(chunk / statistics.median(p), 1 / statistics.median(d))
        for p, d in zip(prefill, decode, strict=True)
    ]


def english(tokenizer: Any, windows: int, length: int) -> list[list[int]]:
    """Real English in windows of ``length`` tokens: the language reference that Python carries."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[key] for key in sorted(topics, key=lambda k: -len(topics[k])))
    # A token is at least one character, and text costs time to tokenise.
    tokens = tokenizer(text[: 8 * windows * length])["input_ids"]
    return [tokens[i * length : (i + 1) * length] for i in range(windows)]


@dataclass
class Quality:
    """Perplexity on the windows seen, and the largest distance of a logit from the reference."""

    tokens: int = 0
    loss: float = 0.0
    difference: float = 0.0

    def see(self, logits: Tensor, tokens: list[int], reference: Tensor) -> None:
        targets = torch.tensor(tokens[1:], device=logits.device)
        loss = nn.functional.cross_entropy(logits[:-1], targets, reduction="sum")
        self.loss += float(loss)
        self.tokens += len(targets)
        self.difference = max(self.difference, float((logits - reference).abs().max()))

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.tokens)


@dataclass(frozen=True)
class Agreement:
    """How two greedy texts compare. ``gap``: how far apart the reference rates the two tokens."""

    same: int  # tokens before the first difference
    total: int
    gap: float | None = None

    def holds(self, tolerance: float) -> bool:
        return self.gap is None or self.gap <= tolerance


def agreement(ours: list[Chosen], reference: list[Chosen]) -> Agreement:
    """Compare up to the first difference: after it the two continue different texts."""
    for i, (a, b) in enumerate(zip(ours, reference, strict=False)):
        if a.token != b.token:
            gap = float(b.logits[b.token] - b.logits[a.token])
            return Agreement(i, len(reference), gap)
    return Agreement(len(reference), len(reference))


def weight_bytes(model: nn.Module) -> int:
    """Memory of parameters and buffers, each storage once; the KV cache is not part of a model."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def linears(model: nn.Module) -> tuple[int, int]:
    """(quantised linears, all linears)."""
    found = _multiplied(model)
    return sum(isinstance(each, IntLinear) for each in found), len(found)


def _multiplied(model: nn.Module) -> list[IntLinear | nn.Linear]:
    """The linears; a table counts where it multiplies, not where it embeds."""
    found = {
        id(module): module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (IntLinear, nn.Linear)) and "embed_tokens" not in path.split(".")
    }
    return list(found.values())


def weights(model: nn.Module) -> int:
    """Elements of all weights that a call of the model multiplies as integers."""
    found = [each for each in _multiplied(model) if isinstance(each, IntLinear)]
    return sum(each.out_features * each.in_features for each in found)


def kernels(dispatches: Sequence[Dispatch], weights: int) -> tuple[dict[str, int], bool]:
    """How many products each kernel ran, from the dispatches of a call (CUDA graphs: of a few), and
    whether these multiplied every weight: one product may be that of several linears."""
    counts = Counter(f"{d.op} ({d.scheme}): {d.kernel}" for d in dispatches)
    calls, rest = divmod(sum(d.n * d.k for d in dispatches), weights)
    each = {name: count // max(1, calls) for name, count in sorted(counts.items())}
    return each, calls > 0 and rest == 0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
