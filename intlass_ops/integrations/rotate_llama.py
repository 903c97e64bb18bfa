"""`rotate_llama_`: fold rotations into a Llama's weights, so that they cost nothing at run time.

The residual stream x becomes x Q, with Q an orthogonal matrix that spreads outliers over all
features. RMSNorm without its gain commutes with Q, so gains move into the linears that follow:

    embedding, and what reads the stream (q, k, v, gate, up, head)     W · gain · Q
    what writes it (o, down)                                           Qᵀ W
    values of each head, and o's view of them                          v H,  W Hᵀ

The function stays the same to rounding. Rotations before o's and down's inputs as a whole would
have to run online (`QATConfig(rotation=…)`, `RotatedIntLinear`) and are not done here.
Method: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (2024).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..rotation import hadamard_matrix


@torch.no_grad()
def rotate_llama_(model: Any, *, seed: int = 0, rotate_heads: bool = True) -> None:
    """Rotate a transformers Llama (or a model of the same shape: Mistral, Qwen2, …), in place.

    ``seed`` draws the signs of Q = diag(±1)·hadamard_matrix(hidden_size). ``rotate_heads`` also
    rotates each head's values. Tied embeddings come apart, since only the head takes the last gain.
    Norms must be x·gain / rms(x) with a ``weight`` alone, linears plain nn.Linear. Everything is
    computed in float64 and rounded to the weights' dtype once.

    Raises TypeError for other layers or norms and ValueError for sizes without a Hadamard matrix,
    before anything is changed.

    >>> rotate_llama_(model, seed=0)                                         # doctest: +SKIP
    >>> quantize_(model, Int4DynamicActivationInt4Weight(64))                # doctest: +SKIP
    """
    try:
        body, head = model.model, model.lm_head
        layers, embedding = body.layers, body.embed_tokens
        _require_linears(head)
        _require_rms_norm(body.norm)
        for layer in layers:
            _require_linears(*_readers(layer), *_writers(layer))
            _require_rms_norm(layer.input_layernorm)
            _require_rms_norm(layer.post_attention_layernorm)
            if rotate_heads:
                hadamard_matrix(layer.self_attn.head_dim)  # an error comes before any change
    except AttributeError as problem:
        raise TypeError(
            f"rotate_llama_: {type(model).__name__} has not the layers of a Llama: {problem}"
        ) from None
    hidden = embedding.weight.shape[1]
    device = embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (hidden, 1), generator=generator).double() * 2 - 1
    q = (signs * hadamard_matrix(hidden, dtype=torch.float64)).to(device)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
        model.config.tie_word_embeddings = False

    _set(embedding.weight, embedding.weight.double() @ q)
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        _read(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), q)
        _read(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), q)
        for linear in _writers(layer):
            _set(linear.weight, q.T @ linear.weight.double())
            if linear.bias is not None:
                _set(linear.bias, linear.bias.double() @ q)
        if rotate_heads:
            _rotate_heads(attention.v_proj, attention.o_proj, attention.head_dim)
    _read(body.norm, (head,), q)


def _readers(layer: Any) -> tuple[nn.Module, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj


def _writers(layer: Any) -> tuple[Any, ...]:
    return layer.self_attn.o_proj, layer.mlp.down_proj


def _require_linears(*modules: nn.Module) -> None:
    for module in modules:
        if type(module) is not nn.Linear:
            raise TypeError(f"rotate_llama_: expected nn.Linear, found {type(module).__name__}")


def _require_rms_norm(norm: Any) -> None:
    """That it computes x·gain / rms(x): other norms have a weight too, and mean something else."""
    gain = norm.weight
    x = torch.linspace(-1, 2, gain.numel(), dtype=gain.dtype, device=gain.device)
    expected = x.double() / x.double().square().mean().sqrt() * gain.double()
    found = norm(x).double()
    if not torch.allclose(found, expected, rtol=0.02, atol=0.01 * float(expected.abs().max())):
        raise TypeError(f"rotate_llama_: {type(norm).__name__} is not x·gain / rms(x)")


def _read(norm: Any, linears: Iterable[Any], q: Tensor) -> None:
    """Linears after a norm take its gain and the rotation."""
    gain = norm.weight.double()
    for linear in linears:
        _set(linear.weight, (linear.weight.double() * gain) @ q)
    norm.weight.fill_(1)


def _rotate_heads(v: Any, o: Any, head_dim: int) -> None:
    h = hadamard_matrix(head_dim, dtype=torch.float64, device=v.weight.device)
    rows = v.weight.double().unflatten(0, (-1, head_dim))  # [heads, head_dim, hidden]
    _set(v.weight, (h.T @ rows).flatten(0, 1))
    if v.bias is not None:
        _set(v.bias, (v.bias.double().unflatten(0, (-1, head_dim)) @ h).flatten())
    columns = o.weight.double().unflatten(1, (-1, head_dim))  # [hidden, heads, head_dim]
    _set(o.weight, (columns @ h).flatten(1))


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)
