"""Greedy generation with a static KV cache: one graph for chunks of the prompt, one for a token.

Lives here: the cache, the step that is compiled, the loops around it. Not here: the model
(gguf_models.py), what is compiled with which backend (the caller).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Chosen(NamedTuple):
    """A generated token and the logits [vocabulary] it is the largest of."""

    token: int
    logits: Tensor


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
        window = getattr(config, "sliding_window", None)
        if window is not None and window < length:
            raise ValueError(
                f"Decoder: a cache of {length} tokens is longer than the window of {window} that "
                f"some layers of {type(model).__name__} see; here every layer sees all of it"
            )
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


class _Region(nn.Module):
    """A layer that torch.compile traces, lowers and compiles once for all layers like it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @torch.compiler.nested_compile_region
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


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
        cls, model: PreTrainedModel, compile_: Compile, *, chunk: int, length: int, regions: bool
    ) -> Decoder:
        """``regions``: compile the layers as one region each, a quarter of the time to compile.

        ``model`` then keeps its layers wrapped. CUDA graphs take the whole model in one piece.
        """
        if length % chunk:
            raise ValueError(f"a cache of {length} tokens is no multiple of chunk={chunk}")
        if regions:
            model.model.layers = nn.ModuleList(_Region(layer) for layer in model.model.layers)
        step = Step(model, length)
        return cls(step, compile_(step), chunk)

    @property
    def device(self) -> torch.device:
        return next(self.step.parameters()).device

    def call(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [P, vocabulary]; a captured graph overwrites them at the next call."""
        if ids.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        return self.run(ids, positions)

    def prefill(self, tokens: list[int]) -> Tensor:
        """Logits [len(tokens), vocabulary] from an empty cache."""
        count = len(tokens)
        padded = -(-count // self.chunk) * self.chunk
        if not 0 < padded <= self.step.length:
            raise ValueError(
                f"{count} tokens do not fit: the cache holds {self.step.length}, "
                f"in chunks of {self.chunk}"
            )
        tokens = tokens + [0] * (padded - count)
        logits = []
        for start in range(0, padded, self.chunk):
            # Not slices of one tensor: torch.compile compiles anew for other strides.
            ids = torch.tensor([tokens[start : start + self.chunk]], device=self.device)
            at = torch.arange(start, start + self.chunk, device=self.device)
            logits.append(self.call(ids, at).clone())
        return torch.cat(logits)[:count]

    def generate(self, tokens: list[int], count: int, stop: set[int]) -> Iterator[Chosen]:
        """Greedy continuation of ``tokens``, as far as the cache goes."""
        logits = self.prefill(tokens)[-1]
        for position in range(len(tokens), min(len(tokens) + count, self.step.length)):
            token = int(logits.argmax())
            yield Chosen(token, logits)
            if token in stop:
                return
            logits = self.next(token, position)

    def next(self, token: int, position: int) -> Tensor:
        """Logits [vocabulary] after ``token`` at ``position``."""
        ids = torch.tensor([[token]], device=self.device)
        at = torch.tensor([position], device=self.device)
        return self.call(ids, at)[-1].clone()
