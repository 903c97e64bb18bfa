"""Greedy generation with a static KV cache: two graphs, one for chunks of the prompt, one per token.

Lives here: the cache, the step that is compiled, the loops around it. Not here: the model
(gguf_llama.py), what is compiled with which backend (the caller).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Compile = Callable[[nn.Module], Callable[..., Any]]


class _Slots:
    """What transformers' attention asks of a cache, for the positions of one call."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], positions: Tensor) -> None:
        self.keys, self.values, self.positions = keys, values, positions

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return (
            self.keys[layer].index_copy_(2, self.positions, keys),
            self.values[layer].index_copy_(2, self.positions, values),
        )


class Step(nn.Module):
    """Logits of tokens at given positions, whose keys and values it puts into its cache."""

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        super().__init__()
        self.model = model
        self.length = length
        config = model.config
        like = next(model.parameters())
        shape = (1, config.num_key_value_heads, length, config.head_dim)
        for i in range(config.num_hidden_layers):
            for kind in ("keys", "values"):
                self.register_buffer(f"{kind}_{i}", like.new_zeros(shape), persistent=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids [1, P], positions [P] -> float32 logits [P, vocabulary]."""
        layers = range(self.model.config.num_hidden_layers)
        cache = _Slots(
            [getattr(self, f"keys_{i}") for i in layers],
            [getattr(self, f"values_{i}") for i in layers],
            positions,
        )
        slots = torch.arange(self.length, device=ids.device)
        visible = slots <= positions[:, None]  # [P, length]
        out = self.model(
            input_ids=ids,
            position_ids=positions[None],
            attention_mask=visible[None, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits: Tensor = out.logits[0].to(torch.float32)
        return logits


@dataclass
class Decoder:
    """A model with its cache and its two compiled graphs.

    Prompts are cut into chunks of ``chunk`` tokens, the last one padded: padding lies after every
    real token, so none of them sees it, and generated tokens overwrite it.
    """

    step: Step
    run: Callable[..., Tensor]
    chunk: int

    @classmethod
    def of(
        cls, model: PreTrainedModel, compile_: Compile, *, chunk: int, length: int
    ) -> Decoder:
        step = Step(model, length)
        return cls(step, compile_(step), chunk)

    @property
    def device(self) -> torch.device:
        return next(self.step.parameters()).device

    def _call(self, ids: Tensor, positions: Tensor) -> Tensor:
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        return self.run(ids, positions)

    def prefill(self, tokens: list[int]) -> Tensor:
        """Logits [len(tokens), vocabulary] from an empty cache."""
        count = len(tokens)
        padded = -(-count // self.chunk) * self.chunk
        if not 0 < padded <= self.step.length:
            raise ValueError(
                f"{count} tokens do not fit: the cache holds {self.step.length} in chunks "
                f"of {self.chunk}"
            )
        ids = torch.tensor([tokens + [0] * (padded - count)], device=self.device)
        at = torch.arange(padded, device=self.device)
        chunks = zip(ids.split(self.chunk, 1), at.split(self.chunk), strict=True)
        # A captured graph writes its output to the same place each time.
        return torch.cat([self._call(i.contiguous(), p).clone() for i, p in chunks])[:count]

    def generate(self, tokens: list[int], count: int, stop: set[int]) -> Iterator[tuple[int, Tensor]]:
        """Greedy continuation: pairs of a token and the logits [vocabulary] it was chosen from."""
        count = min(count, self.step.length - len(tokens))
        logits = self.prefill(tokens)[-1]
        position = torch.tensor([len(tokens)], device=self.device)
        for _ in range(count):
            token = int(logits.argmax())
            yield token, logits
            if token in stop:
                return
            ids = torch.tensor([[token]], device=self.device)
            logits = self._call(ids, position)[-1].clone()
            position = position + 1
