"""A Llama block for benchmarks/quantisers.py, and quantisation simulated in floating point."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intlass_ops import hadamard_matrix

QUEST = {4: 0.3534, 8: 0.0309}


class Block(nn.Module):
    """Attention with four query heads to a head of keys, and a gated MLP; no positions."""

    def __init__(self, width: int, inner: int, head: int) -> None:
        super().__init__()
        narrow = max(width // 4, head)
        self.head = head
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, narrow, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (
            linear(y).unflatten(-1, (-1, self.head)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).flatten(-2))
        y = self.norms[1](x)
        out: Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return out


class PseudoQuantised(nn.Module):
    """A linear on tensors that were rotated, rounded to integers and scaled back, in their dtype.

    What QAT costs without integer products: gradients go straight through and stop at clipped
    values, all of it left to torch.compile.
    """

    def __init__(self, linear: nn.Linear, w_bits: int, a_bits: int, rotation: int) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bits = w_bits, a_bits
        self.register_buffer("h", hadamard_matrix(rotation).to(linear.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        w_bits, a_bits = self.bits
        return nn.functional.linear(self._round(x, a_bits), self._round(self.weight, w_bits))

    def _round(self, t: Tensor, bits: int) -> Tensor:
        h = self.get_buffer("h")
        t = (t.reshape(-1, h.shape[0]) @ h).view(t.shape)
        qmax = 2 ** (bits - 1) - 1
        scale = (QUEST[bits] * t.float().square().mean(-1, keepdim=True).sqrt()).detach()
        y = t / scale
        q = y.round().clamp(-qmax, qmax)
        kept = torch.where(y.round().abs() <= qmax, t, 0.0)
        return (kept + (q * scale - kept).detach()).to(t.dtype)


def pseudo_quantised(model: nn.Module, w_bits: int, a_bits: int, rotation: int) -> None:
    """Replace every nn.Linear of ``model``, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, PseudoQuantised(child, w_bits, a_bits, rotation))
