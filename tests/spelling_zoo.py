"""Rarer ways to write a quantised linear, each as one function of its buffers and x.

`SPELLINGS` maps a name to (maker of module and input, what becomes of its products). The common
ways are in graph_zoo.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

N, K, G = 48, 128, 32
BF16 = torch.bfloat16
Case = tuple[nn.Module, Tensor]


class Spelled(nn.Module):
    def __init__(self, call: Callable[..., Tensor], **buffers: Tensor) -> None:
        super().__init__()
        self.call = call
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def codes8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape).to(torch.int8)


def scales(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return (torch.rand(shape) * 0.02 + 0.01).to(dtype)


def packed4(*shape: int) -> Tensor:
    return torch.randint(0, 256, (*shape[:-1], shape[-1] // 2)).to(torch.uint8)


def unpack(p: Tensor) -> Tensor:
    return torch.stack([p & 15, p >> 4], -1).flatten(-2)


def int4(p: Tensor, s: Tensor) -> Tensor:
    """Symmetric INT4 in groups of G."""
    q = unpack(p).to(s.dtype).unflatten(-1, (-1, G))
    return ((q - 8) * s.unsqueeze(-1)).flatten(-2)


def per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    s = (x.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-6)
    return (x.float() / s).round().clamp(-128, 127).to(torch.int8), s


def asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.float().amin(-1, keepdim=True), x.float().amax(-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    s = ((high - low) / 255).clamp(min=1e-6)
    z = (-128 - (low / s).round()).clamp(-128, 127)
    return ((x.float() / s).round() + z).clamp(-128, 127).to(torch.int8), s, z


def _int8(call: Callable[..., Tensor], x: tuple[int, ...] = (5, K), **more: Tensor) -> Any:
    def make() -> Case:
        torch.manual_seed(0)
        buffers = {"w": codes8(N, K), "s": scales(N), **more}
        return Spelled(call, **buffers), torch.randn(x).to(BF16)

    return make


def _int4(call: Callable[..., Tensor], x: tuple[int, ...] = (5, K), **more: Tensor) -> Any:
    def make() -> Case:
        torch.manual_seed(0)
        buffers = {"p": packed4(N, K), "s": scales(N, K // G), **more}
        return Spelled(call, **buffers), torch.randn(x).to(BF16)

    return make


def _wide(m: Any) -> Tensor:
    return m.w.to(BF16) * m.s.unsqueeze(-1)


def _mutates(m: Any, x: Tensor) -> Tensor:
    y = functional.linear(x, int4(m.p, m.s))
    m.p.bitwise_xor_(0x55)
    return y


def _asymmetric_int_mm(m: Any, x: Tensor) -> Tensor:
    q, s, z = asymmetric(x)
    sums = z.to(torch.int32) * m.w.to(torch.int32).sum(1)
    return ((torch._int_mm(q, m.w.t()) - sums) * s * m.s.float()).to(x.dtype)


def _static_int_mm(m: Any, x: Tensor) -> Tensor:
    q = (x.float() / m.a).round().clamp(-128, 127).to(torch.int8)
    return ((torch._int_mm(q, m.w.t()) + m.b).float() * (m.a * m.s.float())).to(x.dtype)


def _expanded_scale(m: Any, x: Tensor) -> Tensor:
    q, s = per_token(x)
    acc = torch._int_mm(q, m.w.t())
    return ((acc * s.expand(acc.shape)).to(x.dtype) * m.s).to(x.dtype)


def _int32_mm(m: Any, x: Tensor) -> Tensor:
    q, s = per_token(x)
    return ((q.int() @ m.w.int().t()).float() * s * m.s.float()).to(x.dtype)


def _float_codes(m: Any, x: Tensor) -> Tensor:
    s = 127 / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
    q = (x.float() * s).round().clamp(-128, 127)
    return (functional.linear(q.to(BF16), int4(m.p, m.s)) / s).to(x.dtype)


def _per_tensor(m: Any, x: Tensor) -> Tensor:
    s = (x.float().abs().max() / 127).clamp(min=1e-6)
    q = (x.float() / s).round().clamp(-128, 127).to(torch.int8)
    return functional.linear(q.float() * s, _wide(m).float()).to(x.dtype)


def _fake_quantize(m: Any, x: Tensor) -> Tensor:
    w = torch.fake_quantize_per_channel_affine(m.f, m.c, m.z, 0, -128, 127)
    return functional.linear(x, w.to(BF16))


def _cut_in_three(m: Any, x: Tensor) -> Tensor:
    a, b, c = int4(m.p, m.s).split([16, 16, 16])
    return functional.linear(x, a) + functional.linear(x, b) * functional.linear(x, c)


def _uneven(m: Any, x: Tensor) -> Tensor:
    s = m.u.repeat_interleave(64, 1)[:, :160]
    return functional.linear(x, (unpack(m.v).to(BF16) - 8) * s)


def _constant_groups(m: Any, x: Tensor) -> Tensor:
    """GGUF-like q * d + m where some groups have d = 0."""
    q = unpack(m.p).to(BF16).unflatten(-1, (-1, G))
    return functional.linear(x, (q * m.d.unsqueeze(-1) + m.s.unsqueeze(-1)).flatten(-2))


def _scale_of_every_output(m: Any, x: Tensor) -> Tensor:
    q, s = per_token(x)
    return (torch._int_mm(q, m.w.t()) * (s * m.s.float())).to(x.dtype)


def _weight_zero_points(m: Any, x: Tensor) -> Tensor:
    q, s = per_token(x)
    acc = torch._int_mm(q, unpack(m.p).to(torch.int8).t())
    acc = acc - q.sum(-1, keepdim=True, dtype=torch.int32) * m.z
    return (acc.float() * s * m.c.float()).to(x.dtype)


def _both_zero_points(together: bool) -> Callable[..., Tensor]:
    def call(m: Any, x: Tensor) -> Tensor:
        q, s, z = asymmetric(x)
        z, rows = z.int(), m.w.sum(1, dtype=torch.int32)
        acc = torch._int_mm(q, m.w.t()) - q.sum(-1, keepdim=True, dtype=torch.int32) * m.z
        acc = acc - z * (rows - K * m.z) if together else acc - z * rows + K * z * m.z
        return (acc.float() * s * m.s.float()).to(x.dtype)

    return call


def _one_bit(m: Any, x: Tensor) -> Tensor:
    bits = (m.p.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return functional.linear(x, torch.where(bits.flatten(-2).bool(), m.s, -m.s))


def _between_two_ends(m: Any, x: Tensor) -> Tensor:
    low, high = m.low.float(), m.high.float()
    return functional.linear(x, torch.lerp(low, high, unpack(m.p).float() / 15).to(x.dtype))


def _joined(m: Any, x: Tensor) -> Tensor:
    return functional.linear(x, torch.cat([int4(m.p, m.s), int4(m.r, m.t)]), m.b)


def _nobody_packed(m: Any, x: Tensor) -> Tensor:
    w = (m.q.unflatten(-1, (-1, G)) - 8) * m.s.unsqueeze(-1)
    return functional.linear(x, w.flatten(-2))


def _int64_words(m: Any, x: Tensor) -> Tensor:
    q = ((m.words.unsqueeze(-1) >> torch.arange(0, 64, 4)) & 15).flatten(-2)
    w = (q.to(BF16).unflatten(-1, (-1, G)) - 8) * m.s.unsqueeze(-1)
    return functional.linear(x, w.flatten(-2))


def _scaled_parts(m: Any, x: Tensor) -> Tensor:
    """The nibbles are scaled one after the other; no tensor ever holds all codes."""
    s, z = (each.repeat_interleave(G // 2, -1) for each in (m.s, m.z.to(BF16)))
    parts = [(q.to(BF16) - z) * s for q in (m.p & 15, m.p >> 4)]
    return functional.linear(x, torch.stack(parts, -1).flatten(-2))


def _written_parts(m: Any, x: Tensor) -> Tensor:
    """Six bits, four and two of which are stored apart, dequantised a quarter at a time (Q6_K)."""
    w = torch.empty(N, K, dtype=BF16)
    for i in range(4):
        q = ((m.p[:, i // 2 :: 2] >> (4 * (i % 2))) & 15) | (((m.h >> (2 * i)) & 3) << 4)
        w[:, i * G : (i + 1) * G] = m.s[:, i : i + 1] * (q.to(BF16) - 32)
    return functional.linear(x, w)


def _ternary(m: Any, x: Tensor) -> Tensor:
    q = ((m.t.unsqueeze(-1) // m.powers) % 3).flatten(-2).to(torch.int8) - 1
    return functional.linear(x, q.to(x.dtype) * m.s.unsqueeze(-1))


def _squares(m: Any, x: Tensor) -> Tensor:
    s = m.t.repeat_interleave(32, 0)[:N].repeat_interleave(32, 1)
    return functional.linear(x, (m.w.float() * s).to(x.dtype))


def _padded_rows(m: Any, x: Tensor) -> Tensor:
    """torch._int_mm takes more than 16 rows on a GPU."""
    q, s = per_token(x)
    acc = torch._int_mm(functional.pad(q, (0, 0, 0, 32 - len(q))), m.w.t())[: len(q)]
    return (acc.float() * s * m.s.float()).to(x.dtype)


def _shifted_to_signed(m: Any, x: Tensor) -> Tensor:
    q = ((x.float() / m.a).round() + m.z).clamp(0, 255).to(torch.uint8)
    acc = torch._int_mm((q.to(torch.int16) - 128).to(torch.int8), m.w.t())
    acc = acc - (m.z - 128).to(torch.int32) * m.w.sum(1, dtype=torch.int32)
    return (acc.float() * m.a * m.s.float()).to(x.dtype)


def _divided(m: Any, x: Tensor) -> Tensor:
    """Scales that multiply on the way to codes divide on the way back."""
    to_codes = 127 / x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
    q = (x.float() * to_codes).round().clamp(-128, 127).to(torch.int8)
    return (torch._int_mm(q, m.w.t()) / (to_codes * m.r)).to(x.dtype)


_g = torch.Generator().manual_seed(1)
_B = torch.randn(N, generator=_g).to(BF16)
SPELLINGS: dict[str, tuple[Any, list[str]]] = {
    "torch.mv": (_int8(lambda m, x: torch.mv(_wide(m), x), (K,)), ["w8a16"]),
    "one-dimensional x": (
        _int4(lambda m, x: functional.linear(x, int4(m.p, m.s)), (K,)),
        ["w4a16"],
    ),
    "addmm with alpha and beta": (
        _int8(lambda m, x: torch.addmm(m.b, x, _wide(m).t(), beta=3, alpha=2), b=_B),
        ["w8a16"],
    ),
    "weight left, batched": (_int8(lambda m, x: torch.matmul(_wide(m), x), (3, K, 5)), ["w8a16"]),
    "experts repeated over a batch": (
        _int8(
            lambda m, x: torch.matmul(x, _wide(m).mT),
            (2, 3, 5, K),
            w=codes8(3, N, K),
            s=scales(3, N),
        ),
        ["w8a16"],
    ),
    "experts with a bias": (
        _int8(
            lambda m, x: torch.baddbmm(m.b[:, None], x, _wide(m).mT),
            (3, 5, K),
            w=codes8(3, N, K),
            s=scales(3, N),
            b=_B.expand(3, N).contiguous(),
        ),
        ["w8a16"],
    ),
    "bias before the scale": (
        _int8(lambda m, x: functional.linear(x, m.w.to(BF16), m.b) * m.s, b=_B),
        ["w8a16"],
    ),
    "divided by the scale": (
        _int8(lambda m, x: functional.linear(x, m.w.to(BF16)) / m.s + m.b, b=_B),
        ["w8a16"],
    ),
    "codes mutated in forward": (_int4(_mutates), ["w4a16"]),
    "cut from one weight": (_int4(_cut_in_three), ["w4a16"] * 3),
    "last group shorter": (_int4(_uneven, (5, 160), v=packed4(N, 160), u=scales(N, 3)), ["w4a16"]),
    "groups without a slope": (
        _int4(_constant_groups, d=scales(N, 4) * (torch.rand(N, 4, generator=_g) > 0.3)),
        ["w4a16"],
    ),
    "fake_quantize": (
        _int8(
            _fake_quantize,
            f=torch.randn(N, K, generator=_g),
            c=torch.rand(N, generator=_g) * 0.02 + 0.01,
            z=torch.zeros(N, dtype=torch.int32),
        ),
        ["w8a16"],
    ),
    "int_mm, zero points times row sums": (_int8(_asymmetric_int_mm, (20, K)), ["w8a8"]),
    "int_mm, static scale, int32 bias": (
        _int8(
            _static_int_mm,
            (20, K),
            a=torch.tensor(0.03),
            b=torch.randint(-1000, 1000, (N,), generator=_g).int(),
        ),
        ["w8a8"],
    ),
    "int_mm, scale expanded to the output": (_int8(_expanded_scale, (20, K)), ["w8a8"]),
    "int_mm, one scale for every output": (_int8(_scale_of_every_output, (20, K)), ["w8a8"]),
    "int_mm, zero points of the weight": (
        _int4(
            _weight_zero_points,
            (20, K),
            c=scales(N),
            z=torch.randint(0, 16, (N,), generator=_g).int(),
        ),
        ["w4a8"],
    ),
    **{
        f"int_mm, both zero points{', together' if together else ''}": (
            _int8(
                _both_zero_points(together),
                (20, K),
                z=torch.randint(-9, 9, (N,), generator=_g).int(),
            ),
            ["w8a8"],
        )
        for together in (False, True)
    },
    "one bit": (
        _int8(
            _one_bit,
            p=torch.randint(0, 256, (N, K // 8), generator=_g).to(torch.uint8),
            s=scales(N, 1),
        ),
        ["w4a16"],
    ),
    "codes between two ends": (
        _int4(_between_two_ends, low=-scales(N, 1), high=scales(N, 1)),
        ["w4a16"],
    ),
    "scales in float64": (
        _int8(
            lambda m, x: functional.linear(x, (m.w.double() * m.t).to(x.dtype)),
            t=torch.rand(N, 1, dtype=torch.float64, generator=_g),
        ),
        ["w8a16"],
    ),
    "columns in reverse": (
        _int8(lambda m, x: functional.linear(x, m.w.flip(-1).to(x.dtype) * m.s.unsqueeze(-1))),
        ["w8a16"],
    ),
    "experts in another order": (
        _int8(
            lambda m, x: torch.bmm(x, (m.w[m.i].to(x.dtype) * m.s[m.i].unsqueeze(-1)).mT),
            (3, 5, K),
            w=codes8(3, N, K),
            s=scales(3, N),
            i=torch.tensor([2, 0, 1]),
        ),
        ["w8a16"],
    ),
    "all experts on the same rows": (
        _int8(
            lambda m, x: torch.einsum("mk,enk->men", x, _wide(m)),
            w=codes8(3, N, K),
            s=scales(3, N),
        ),
        ["w8a16"],
    ),
    "integer bias of a float product": (
        _int8(
            lambda m, x: functional.linear(x, _wide(m)) + m.b,
            b=torch.randint(-5, 5, (N,), generator=_g),
        ),
        ["w8a16"],
    ),
    "two weights joined": (
        _int4(_joined, r=packed4(16, K), t=scales(16, K // G), b=torch.ones(N + 16).to(BF16)),
        ["w4a16", "w4a16"],
    ),
    "codes nobody packed": (
        _int4(_nobody_packed, q=torch.randint(0, 16, (N, K), generator=_g).int()),
        ["w4a16"],
    ),
    "int64 words": (
        _int4(_int64_words, words=torch.randint(-(1 << 62), 1 << 62, (N, K // 16), generator=_g)),
        ["w4a16"],
    ),
    "scales that are powers of two": (
        _int4(
            lambda m, x: functional.linear(x, int4(m.p, torch.exp2(m.e.to(BF16)))),
            e=torch.randint(-8, -3, (N, K // G), generator=_g).to(torch.int8),
        ),
        ["w4a16"],
    ),
    "scales that are quantised themselves": (
        _int4(
            lambda m, x: functional.linear(x, int4(m.p, m.e.float() * m.f).to(BF16)),
            e=torch.randint(1, 128, (N, K // G), generator=_g).to(torch.int8),
            f=torch.rand(N, 1, generator=_g) / 1000,
        ),
        ["w4a16"],
    ),
    "parts scaled one by one": (
        _int4(_scaled_parts, z=torch.randint(0, 16, (N, K // G), generator=_g).to(torch.uint8)),
        ["w4a16"],
    ),
    "experts in parts scaled one by one": (
        _int4(
            lambda m, x: torch.bmm(
                x,
                torch.cat([((q.to(BF16) - 8) * m.s) for q in (m.p & 15, m.p >> 4)], -1).mT,
            ),
            (3, 5, K),
            p=packed4(3, N, K),
            s=scales(3, N, 1),
        ),
        ["w4a16"],
    ),
    "six bits in quarters": (
        _int4(
            _written_parts,
            p=torch.randint(0, 256, (N, 64), generator=_g).to(torch.uint8),
            h=torch.randint(0, 256, (N, 32), generator=_g).to(torch.uint8),
        ),
        ["w8a16"],
    ),
    "five ternary digits to a byte": (
        _int8(
            _ternary,
            (5, 160),
            t=torch.randint(0, 243, (N, 32), generator=_g).to(torch.uint8),
            powers=torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8),
        ),
        ["w4a16"],
    ),
    "one scale to a square, the last one cut off": (
        _int8(_squares, t=torch.rand(2, 4, generator=_g) * 0.02 + 0.01),
        ["w8a16"],
    ),
    "int_mm, rows added and cut off": (_int8(_padded_rows), ["w8a8"]),
    "int_mm, static zero point shifted to signed": (
        _int8(_shifted_to_signed, (20, K), a=torch.tensor(0.03), z=torch.tensor(130.0)),
        ["w8a8"],
    ),
    "int_mm, divided by one scale for every output": (
        _int8(_divided, (20, K), r=torch.rand(N, generator=_g) * 50 + 50),
        ["w8a8"],
    ),
    "int32 product": (_int8(_int32_mm, (20, K)), ["w8a8"]),
    "activation codes that stay floats": (_int4(_float_codes, (20, K)), ["w4a8"]),
    "one activation scale in all": (_int8(_per_tensor, (20, K)), ["w8a8"]),
}
