"""Hand-written quantised linears in many spellings, for the lowering tests.

Each idiom is a module whose forward dequantises and multiplies in its own way; `IDIOMS` maps a
name to its class. Codes, scales and zeros are drawn at construction; nothing here knows how the
lowering recognises anything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from intlass_ops import lut4

N, K, GROUP = 48, 128, 32


class Idiom(nn.Module):
    """Random INT4 codes q [N, K], scales and zeros [N, K / GROUP] as buffers of a known dtype."""

    q: Tensor
    s: Tensor
    z: Tensor

    def __init__(self, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        q = torch.randint(0, 16, (N, K), generator=g)
        s = (torch.rand(N, K // GROUP, generator=g) * 0.02 + 0.01).to(dtype)
        z = torch.randint(4, 12, (N, K // GROUP), generator=g)
        self.setup(q, s, z)

    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        self.register_buffer("p", (q[:, ::2] | (q[:, 1::2] << 4)).to(torch.uint8))
        self.register_buffer("s", s)
        self.register_buffer("z", z.to(torch.uint8))

    def unpack(self) -> Tensor:
        return torch.stack([self.p & 15, self.p >> 4], dim=-1).view(N, K)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class SubMul(Idiom):
    def forward(self, x: Tensor) -> Tensor:
        q = self.unpack().to(self.dtype).view(N, -1, GROUP)
        w = (q - self.z.to(self.dtype).unsqueeze(-1)) * self.s.unsqueeze(-1)
        return nn.functional.linear(x, w.view(N, K))


class RepeatInterleave(Idiom):
    def forward(self, x: Tensor) -> Tensor:
        q = self.unpack().to(self.dtype)
        s = self.s.repeat_interleave(GROUP, 1)
        z = self.z.repeat_interleave(GROUP, 1).to(self.dtype)
        return x @ (q * s - s * z).t()


class IntegerZeros(Idiom):
    def forward(self, x: Tensor) -> Tensor:
        q = self.unpack().to(torch.int32).view(N, -1, GROUP) - self.z.to(torch.int32).unsqueeze(-1)
        return x @ (q.to(self.dtype) * self.s.unsqueeze(-1)).reshape(N, K).T


class DivideByInverse(Idiom):
    def forward(self, x: Tensor) -> Tensor:
        q = self.unpack().float().view(N, -1, GROUP)
        inverse = 1.0 / self.s.float()
        w = (q - self.z.float().unsqueeze(-1)) / inverse.unsqueeze(-1)
        return nn.functional.linear(x, w.view(N, K).to(self.dtype))


class AddShift(Idiom):
    """GGUF Q4_1 spelling: q * s + b."""

    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        super().setup(q, s, z)
        self.register_buffer("b", -(s.float() * z).to(s.dtype))

    def forward(self, x: Tensor) -> Tensor:
        q = self.unpack().to(self.dtype).view(N, -1, GROUP)
        return x @ torch.addcmul(self.b.unsqueeze(-1), q, self.s.unsqueeze(-1)).view(N, K).t()


class SignExtendWhere(Idiom):
    def forward(self, x: Tensor) -> Tensor:
        q = self.unpack().to(torch.int8)
        q = torch.where(q > 7, q - 16, q)
        w = q.to(self.dtype).view(N, -1, GROUP) * self.s.unsqueeze(-1)
        return nn.functional.linear(x, w.view(N, K))


class SignExtendShift(Idiom):
    def forward(self, x: Tensor) -> Tensor:
        p = self.p.view(torch.int8)
        q = torch.stack([(p << 4) >> 4, p >> 4], dim=-1).view(N, K)
        w = q.to(self.dtype).view(N, -1, GROUP) * self.s.unsqueeze(-1)
        return nn.functional.linear(x, w.view(N, K))


class HalvesCat(Idiom):
    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        super().setup(q, s, z)
        self.p.copy_(q[:, : K // 2] | (q[:, K // 2 :] << 4))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.cat([self.p % 16, self.p // 16], dim=1).to(self.dtype)
        w = (q.view(N, -1, GROUP) - 8) * self.s.unsqueeze(-1)
        return nn.functional.linear(x, w.flatten(1))


class Int32Words(Idiom):
    """Eight nibbles per int32 along K, GPTQ-like, weight [K, N], with a bias."""

    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        shifts = torch.arange(8) * 4
        words = (q.t().reshape(K // 8, 8, N) << shifts.view(1, -1, 1)).sum(1)
        self.register_buffer("words", words.to(torch.int64).to(torch.int32))
        self.register_buffer("shifts", shifts.to(torch.int32))
        self.register_buffer("s", s.t().contiguous())
        self.register_buffer("z", z.t().contiguous().to(torch.int32))
        self.register_buffer("bias", torch.randn(N).to(s.dtype))

    def forward(self, x: Tensor) -> Tensor:
        q = (self.words.unsqueeze(1) >> self.shifts.view(1, -1, 1)) & 15
        q = q.reshape(K, N)
        s, z = self.s.repeat_interleave(GROUP, 0), self.z.repeat_interleave(GROUP, 0)
        return torch.matmul(x, (q - z).to(self.dtype) * s) + self.bias


class ActOrder(Int32Words):
    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        super().setup(q, s, z)
        g = torch.Generator().manual_seed(5)
        self.register_buffer("g_idx", (torch.randperm(K, generator=g) // GROUP).to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        q = ((self.words.unsqueeze(1) >> self.shifts.view(1, -1, 1)) & 15).reshape(K, N)
        g = self.g_idx.long()
        z, s = (torch.ops.aten.index.Tensor(t, [g]) for t in (self.z, self.s))
        return torch.matmul(x, (q - z).to(self.dtype) * s)


class AwqOrder(Idiom):
    """AutoAWQ's naive path: int32 [K, N / 8], nibbles of N in the order 0 4 1 5 2 6 3 7."""

    ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        def words(values: Tensor) -> Tensor:
            blocks = values.reshape(values.shape[0], N // 8, 8)[..., list(self.ORDER)]
            return (blocks << (torch.arange(8) * 4)).sum(-1).to(torch.int32)

        order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
        self.register_buffer("order", (torch.arange(N).view(-1, 8)[:, order]).flatten())
        self.register_buffer("shifts", torch.arange(0, 32, 4))
        self.register_buffer("qweight", words(q.t()))
        self.register_buffer("qzeros", words(z.t()))
        self.register_buffer("s", s.t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        def unpack(words: Tensor) -> Tensor:
            nibbles = torch.bitwise_right_shift(words.unsqueeze(-1), self.shifts).to(torch.int8)
            flat = nibbles.view(words.shape[0], -1)
            ordered = torch.ops.aten.index.Tensor(flat, [None, self.order])
            return torch.bitwise_and(ordered, 15)

        q = unpack(self.qweight)
        z = unpack(self.qzeros).repeat_interleave(GROUP, dim=0)
        w = (q - z) * self.s.repeat_interleave(GROUP, dim=0)
        return torch.matmul(x, w)


class Int8PerChannel(Idiom):
    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        g = torch.Generator().manual_seed(6)
        self.register_buffer("w", torch.randint(-127, 128, (N, K), generator=g).to(torch.int8))
        self.register_buffer("s", s[:, 0].clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.w.to(self.dtype) * self.s.unsqueeze(1))


class Int8Epilogue(Int8PerChannel):
    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        super().setup(q, s, z)
        self.register_buffer("bias", torch.randn(N).to(s.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.w.to(x.dtype)) * self.s + self.bias


class Int8Asymmetric(Int8PerChannel):
    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        super().setup(q, s, z)
        g = torch.Generator().manual_seed(7)
        u = torch.randint(0, 256, (N, K), generator=g).to(torch.uint8)
        self.register_buffer("w", u)
        self.register_buffer("z", torch.rand(N, generator=g) * 100 + 70)

    def forward(self, x: Tensor) -> Tensor:
        w = (self.w.float() - self.z.unsqueeze(1)) * self.s.float().unsqueeze(1)
        return nn.functional.linear(x, w.to(x.dtype))


class Conv1dLayout(Int8PerChannel):
    """transformers' Conv1D: weight [K, N]."""

    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        super().setup(q, s, z)
        self.register_buffer("w", self.w.t().contiguous())
        self.register_buffer("bias", torch.randn(N).to(s.dtype))

    def forward(self, x: Tensor) -> Tensor:
        w = self.w.to(x.dtype) * self.s
        return torch.addmm(self.bias, x.view(-1, K), w).view(*x.shape[:-1], N)


class Einsum(SubMul):
    def forward(self, x: Tensor) -> Tensor:
        q = self.unpack().to(self.dtype).view(N, -1, GROUP)
        w = (q - self.z.to(self.dtype).unsqueeze(-1)) * self.s.unsqueeze(-1)
        return torch.einsum("...k,nk->...n", x, w.view(N, K))


class WeightLeft(SubMul):
    def forward(self, x: Tensor) -> Tensor:
        q = self.unpack().to(self.dtype).view(N, -1, GROUP)
        w = (q - self.z.to(self.dtype).unsqueeze(-1)) * self.s.unsqueeze(-1)
        flat = x.reshape(-1, K)
        return (w.view(N, K) @ flat.t()).t().reshape(*x.shape[:-1], N)


class Experts(Idiom):
    """[E, K, N] stacked experts, one token block each."""

    E = 3

    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        g = torch.Generator().manual_seed(8)
        q = torch.randint(0, 16, (self.E, K, N), generator=g).to(torch.uint8)
        self.register_buffer("p", q[:, ::2] | (q[:, 1::2] << 4))
        scales = torch.rand(self.E, K // GROUP, 1, N, generator=g) * 0.02 + 0.01
        self.register_buffer("s", scales.to(s.dtype))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.stack([self.p & 15, self.p >> 4], dim=2).view(self.E, K // GROUP, GROUP, N)
        w = ((q.to(self.dtype) - 8) * self.s).view(self.E, K, N)
        flat = x.reshape(1, -1, K).expand(self.E, -1, K)
        return torch.bmm(flat, w).sum(0).view(*x.shape[:-1], N)


class Fp8PerRow(Idiom):
    codes = torch.float8_e4m3fn

    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        g = torch.Generator().manual_seed(10)
        self.register_buffer("w", (torch.randn(N, K, generator=g) * 80).to(self.codes))
        self.register_buffer("s", s[:, 0] / 16)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.w.to(self.dtype) * self.s.unsqueeze(1))


class Fp8Epilogue(Fp8PerRow):
    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        super().setup(q, s, z)
        self.register_buffer("bias", torch.randn(N).to(s.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.w.to(x.dtype)) * self.s + self.bias


class Fp8Blocks(Fp8PerRow):
    """DeepSeek's: a scale for each block of 32 x 32, the last row of blocks cut off."""

    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        super().setup(q, s, z)
        g = torch.Generator().manual_seed(11)
        self.register_buffer("s", torch.rand(-(-N // 32), K // GROUP, generator=g) / 500 + 0.001)

    def forward(self, x: Tensor) -> Tensor:
        s = self.s.repeat_interleave(32, 0).narrow(0, 0, N).repeat_interleave(GROUP, 1)
        return nn.functional.linear(x, (self.w.to(torch.float32) * s).to(x.dtype))


class Fp8OtherType(Fp8PerRow):
    codes = torch.float8_e5m2


class Fp8Rounded(Fp8PerRow):
    """The scaled weight is rounded to a type that we do not read."""

    def forward(self, x: Tensor) -> Tensor:
        w = (self.w.to(self.dtype) * self.s.unsqueeze(1)).to(torch.float8_e5m2)
        return nn.functional.linear(x, w.to(self.dtype))


class Fp8Added(Fp8PerRow):
    def forward(self, x: Tensor) -> Tensor:
        w = self.w.to(self.dtype) * self.s.unsqueeze(1) + self.s.unsqueeze(1)
        return nn.functional.linear(x, w)


class MulSum(SubMul):
    """Not a GEMM call at all; must be left alone and stay right."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.unpack().to(self.dtype).view(N, -1, GROUP)
        w = ((q - self.z.to(self.dtype).unsqueeze(-1)) * self.s.unsqueeze(-1)).view(N, K)
        return (x.unsqueeze(-2).float() * w.float()).sum(-1).to(x.dtype)


class Nf4(Idiom):
    """The codes index a table, here a buffer: NF4's numbers."""

    NUMBERS = lut4.numbers("nf4")

    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        super().setup(q, s, z)
        self.register_buffer("table", self.NUMBERS.to(s.dtype))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.ops.aten.index.Tensor(self.table, [self.unpack().int()])
        w = w.view(N, -1, GROUP) * self.s.unsqueeze(-1)
        return nn.functional.linear(x, w.view(N, K))


class Fp4Table(Nf4):
    """Half integers, those of e2m1: the same kernels with other numbers."""

    NUMBERS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


class Table(Idiom):
    """Other numbers, which the graph itself holds."""

    NUMBERS = torch.linspace(-1, 1, 16).pow(3).tolist()

    def forward(self, x: Tensor) -> Tensor:
        table = torch.cat(
            [torch.full((1,), v, dtype=x.dtype, device=x.device) for v in self.NUMBERS]
        )
        w = torch.ops.aten.index.Tensor(table, [self.unpack().int()])
        w = w.view(N, -1, GROUP) * self.s.unsqueeze(-1)
        return nn.functional.linear(x, w.view(N, K))


class AxisZero(Idiom):
    """Groups along N."""

    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        super().setup(q, s, z)
        g = torch.Generator().manual_seed(9)
        self.register_buffer("s0", (torch.rand(N // 16, 1, K, generator=g) * 0.02).to(s.dtype))

    def forward(self, x: Tensor) -> Tensor:
        w = (self.unpack().to(self.dtype).view(N // 16, 16, K) - 8) * self.s0
        return nn.functional.linear(x, w.view(N, K))


class Dense(Idiom):
    def setup(self, q: Tensor, s: Tensor, z: Tensor) -> None:
        self.weight = nn.Parameter(torch.randn(N, K).to(s.dtype) / 11)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class Clamped(SubMul):
    """A clamp on the dequantised weight: not affine for every value."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.unpack().to(self.dtype).view(N, -1, GROUP)
        w = (q - self.z.to(self.dtype).unsqueeze(-1)) * self.s.unsqueeze(-1)
        return nn.functional.linear(x, w.view(N, K).clamp(-0.03, 0.03))


class PartClamped(Idiom):
    """The nibbles are scaled one after the other, and one of them is clamped."""

    def forward(self, x: Tensor) -> Tensor:
        s = self.s.repeat_interleave(GROUP // 2, 1)
        low, high = (((q.to(self.dtype) - 8) * s) for q in (self.p & 15, self.p >> 4))
        return nn.functional.linear(x, torch.cat([low, high.clamp(-0.03, 0.03)], 1))


class Squared(Int8PerChannel):
    def forward(self, x: Tensor) -> Tensor:
        w = self.w.to(self.dtype)
        return nn.functional.linear(x, w * w.abs() * self.s.unsqueeze(1))


AFFINE: dict[str, Callable[..., Idiom]] = {
    cls.__name__: cls
    for cls in (
        SubMul, RepeatInterleave, IntegerZeros, DivideByInverse, AddShift, SignExtendWhere,
        SignExtendShift, HalvesCat, AwqOrder, Int32Words, ActOrder, Int8PerChannel, Int8Epilogue,
        Int8Asymmetric, Conv1dLayout, Einsum, WeightLeft, Experts, Fp8PerRow, Fp8Epilogue,
        Fp8Blocks, Nf4, Fp4Table,
    )
}  # fmt: skip
UNTOUCHED: dict[str, Callable[..., Idiom]] = {
    cls.__name__: cls
    for cls in (
        MulSum, Table, AxisZero, Dense, Clamped, PartClamped, Squared, Fp8OtherType,
        Fp8Rounded, Fp8Added,
    )
}  # fmt: skip
