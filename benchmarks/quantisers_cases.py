"""What benchmarks/quantisers.py times: the cases of each section, their peers and their bars."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from llama_block import Block, pseudo_quantised
from quantisers_timing import BF16, Bench, Call, Row, Time
from torch import Tensor

import intlass_ops as ia
from intlass_ops import block_quantize, fused_quantize, packing, scales
from intlass_ops.calibrate import InputStatistics
from intlass_ops.straight_through import quantise_activations

FUSED: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "int8": ia.fused_quantize_int8,
    "int4": ia.fused_quantize_int4,
    "mx": ia.fused_quantize_mx,
    "nv": ia.fused_quantize_nv,
}


# A case makes its tensors and names its rows; a section is a list of cases.
Case = Callable[[], Iterator[Row]]


def rotate_and_quantise(b: Bench) -> Iterator[Case]:
    m, k = b.size(8192), b.size(8192, 256)
    x = b.randn(m, k)
    xs, pairs = b.copies(x), b.copies(x, torch.empty_like(x))
    copy = b.ms(lambda x, to: to.copy_(x), pairs)

    def case(r: int, format_: str) -> Iterator[Row]:
        h = ia.hadamard_matrix(r, dtype=BF16, device=b.device)
        call, name = FUSED[format_], f"{format_} R={r}"
        ours = b.ms(lambda x: call(x, h), xs)

        @functools.cache
        def part_of_copy() -> float:
            return (x.nbytes + sum(t.nbytes for t in call(x, h))) / (2 * x.nbytes)

        def at_copy_speed() -> float:
            return part_of_copy() * copy()

        yield Row("rotate + quantise, speed of a copy", name, 0.8, ours, at_copy_speed)
        if r != 32 and format_ in ("mx", "nv"):
            return
        group = {"mx": 32, "nv": 16}.get(format_)
        method = "quest" if format_ == "mx" else "abs_max"
        plan = fused_quantize.plan_of("peer", format_, x, h, method, group)

        @functools.cache
        def unfused() -> Time:
            def maths(x: Tensor) -> tuple[Tensor, ...]:
                # rounded to bf16 on the way, which ours is not: fewer bytes than the same maths
                rotated = (x.view(-1, r) @ h).view(x.shape)
                return fused_quantize.quantize_rotated(rotated.float(), plan)[:2]

            return b.ms(b.compiled(maths), xs)

        what = "rotate + quantise over torch.compile"
        yield Row(what, name, 3.0, ours, lambda: unfused()())

    for r in (32, 64, 128):
        for format_ in FUSED:
            yield functools.partial(case, r, format_)


def pipelines(b: Bench) -> Iterator[Case]:
    """Rotation, quantisation and product against the product alone."""
    h = ia.hadamard_matrix(64, dtype=BF16, device=b.device)

    def case(n: int, k: int, m: int) -> Iterator[Row]:
        w8 = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=b.device)
        w4 = packing.pack(w8.clamp(-7, 7))
        s, x = torch.rand(n, device=b.device), b.randn(m, k)

        def int8(xq: Tensor, scale: Tensor, w: Tensor) -> Tensor:
            return ia.matmul_int8_bf16_tn(xq, w, scale, s)

        def int4(xq: Tensor, scale: Tensor, w: Tensor) -> Tensor:
            return ia.matmul_int4_bf16_tn(xq, w, s, k=k, a_scale=scale)

        def rows(
            scheme: str, product: Callable[..., Tensor], quantise: Callable[..., Any], w: Tensor
        ) -> Iterator[Row]:
            quantised, ws, bits = quantise(x, h)[:2], b.copies(w), int(scheme[-1])
            alone = b.ms(lambda w: product(*quantised, w), ws)

            def layer(w: Tensor) -> Tensor:
                """What RotatedIntLinear runs."""
                codes, scale, _ = quantise_activations(x, h, bits, "abs_max", mask=False)
                return product(codes, scale, w)

            whole = b.ms(layer, ws)
            name = f"{scheme} M={m} N={n} K={k}"

            def warm() -> None:
                product(*quantised, w)
                layer(w)

            yield Row("pipeline over product alone", name, 0.9, whole, alone, warm)

        yield from rows("w8a8", int8, ia.fused_quantize_int8, w8)
        yield from rows("w4a4", int4, ia.fused_quantize_int4, w4)

    for n, k in ((5120, 5120), (51200, 5120), (5120, 25600), (28672, 8192)):
        for m in (2048, 4096):
            yield functools.partial(case, b.size(n), b.size(k), b.size(m))


def fp4_products(b: Bench) -> Iterator[Case]:
    h = ia.hadamard_matrix(32, dtype=BF16, device=b.device)

    def case(n: int, k: int, m: int) -> Iterator[Row]:
        w, x = b.randn(n, k), b.randn(m, k)
        (mx_w, mx_s), (nv_w, nv_s) = ia.fused_quantize_mx(w, h), ia.fused_quantize_nv(w, h)
        (mx_x, mx_t), (nv_x, nv_t) = ia.fused_quantize_mx(x, h), ia.fused_quantize_nv(x, h)
        mx_tiles, nv_tiles = ia.to_blocked(mx_t), ia.to_blocked(nv_t)

        def mxf4(w: Tensor, s: Tensor) -> Tensor:
            return ia.matmul_mxf4_bf16_tn(mx_x, w, mx_tiles, s)

        def nvf4(w: Tensor, s: Tensor) -> Tensor:
            return ia.matmul_nvf4_bf16_tn(nv_x, w, nv_tiles, s)

        def ada(w: Tensor, s: Tensor) -> Tensor:
            return ia.matmul_ada_mxf4_bf16_tn(mx_x, w, mx_t, s)

        calls: dict[str, tuple[Callable[..., Tensor], list[tuple[Tensor, ...]]]] = {
            "mxf4": (mxf4, b.copies(mx_w, ia.to_blocked(mx_s))),
            "nvf4": (nvf4, b.copies(nv_w, ia.to_blocked(nv_s))),
        }
        if m <= 16:
            calls["ada mxf4"] = ada, b.copies(mx_w, mx_s)
        else:  # INT8 would not be exact (launch_mx.py)
            wide = mx_s.clone()
            wide.view(torch.uint8)[0, :2] += 4
            calls["mxf4, wide scales"] = mxf4, b.copies(mx_w, ia.to_blocked(wide))
        dense = b.ms(lambda w: x @ w.T, b.copies(w))
        for name, (call, copies) in calls.items():
            at, bar = f"{name} M={m} N={n} K={k}", 2.5 if m <= 16 else 1.0
            warm = functools.partial(call, *copies[0])
            yield Row("FP4 product over bf16 cuBLAS", at, bar, b.ms(call, copies), dense, warm)

    for n, k in ((4096, 4096), (28672, 4096), (8192, 28672)):
        for m in (1, 16, b.size(2048), b.size(4096)):
            yield functools.partial(case, b.size(n), b.size(k), m)


def mixed(b: Bench) -> Iterator[Case]:
    n = k = b.size(4096)
    g = 128
    q = torch.randint(0, 16, (n, k), device=b.device, dtype=torch.int32)
    packed = ia.pack_int4(q)
    s = torch.rand(k // g, n, device=b.device).to(BF16) + 0.5
    z = torch.full_like(s, 8)

    def maths(packed: Tensor, s: Tensor, z: Tensor) -> Tensor:
        codes = torch.stack((packed & 15, packed >> 4), -1).view(n, k // g, g)
        return ((codes - z.T[..., None]) * s.T[..., None]).view(n, k)

    dense = b.compiled(maths)  # one kernel, by Inductor

    copies = b.copies(packed, s, z)

    @functools.cache
    def tinygemm_weights() -> list[tuple[Tensor, ...]]:
        pairs = (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8)
        w = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        # its zeros are those of codes that run from -8 to 7
        return b.copies(w, torch.stack((s, (8 - z) * s), -1).contiguous())

    def case(m: int) -> Iterator[Row]:
        x, at = b.randn(m, k), f"M={m} N={n} K={k}"

        calls: dict[str, Call] = {
            "forward": lambda w, s, z: ia.mixed_mm(x, w.T, s, z, g),
            "transposed": lambda w, s, z: ia.mixed_mm(x, w.T, s, z, g, transposed=True),
        }
        peers: dict[str, Call] = {
            "forward": lambda *copy: x @ dense(*copy).T,
            "transposed": lambda *copy: x @ dense(*copy),
        }
        ours = {name: b.ms(call, copies) for name, call in calls.items()}
        for name, call in calls.items():
            what, warm = "mixed_mm over dequantise + matmul", functools.partial(call, *copies[0])
            other = b.ms(peers[name], copies)
            yield Row(what, f"{name} {at}", 1.0, ours[name], other, warm)
        what = "mixed_mm, transposed within 1.25x of forward"
        yield Row(what, at, 0.8, ours["transposed"], ours["forward"])
        if b.cuda:

            @functools.cache
            def tinygemm() -> Time:
                run = torch.ops.aten._weight_int4pack_mm
                return b.ms(lambda w, s: run(x, w, g, s), tinygemm_weights())

            yield Row("mixed_mm over tinygemm", at, 1.0, ours["forward"], lambda: tinygemm()())

    for m in (16, 32, 64, 128, 256, 512, 1024):
        yield functools.partial(case, m)


def searches(b: Bench) -> Iterator[Case]:
    """Triton's search against the vectorised one in PyTorch, on some rows of the weight."""
    w = torch.randn(b.size(4096), b.size(14336), device=b.device)

    def whole() -> Iterator[Row]:
        run = b.wall_ms(lambda: ia.int4_optimal(w, group_size=128))
        yield Row("int4_optimal g128 within 1 s", f"{tuple(w.shape)}", 1.0, run, lambda: 1e3)

    def case(name: str, rows: int, columns: int, find: Callable[[Tensor], object]) -> Iterator[Row]:
        part = w[:rows, :columns]

        @functools.cache
        def vectorised() -> float:
            by_triton = block_quantize._by_triton
            block_quantize._by_triton = lambda *_: False
            try:
                return b.wall_ms(lambda: find(part), 1)()
            finally:
                block_quantize._by_triton = by_triton

        ours = b.wall_ms(lambda: find(part))
        yield Row("scale search over torch", f"{name} {tuple(part.shape)}", 10.0, ours, vectorised)

    yield whole
    if not b.cuda:
        return
    inputs = torch.randn(8192, 2048, device=b.device)
    finds: dict[str, tuple[int, int, Callable[[Tensor], object]]] = {
        "int4 g128": (512, w.shape[1], lambda w: ia.int4_optimal(w, group_size=128)),
        "int8 g128": (64, w.shape[1], lambda w: ia.int8_optimal(w, group_size=128)),
        "uint4 g128": (256, w.shape[1], lambda w: ia.uint4_optimal(w, group_size=128)),
        "nvfp4": (512, w.shape[1], ia.nvfp4_optimal),
        "mxfp4": (512, w.shape[1], ia.mxfp4_optimal),
    }
    under_a_hessian: dict[int, Callable[..., object]] = {
        128: ia.int4_optimal_hessian,
        16: ia.nvfp4_optimal_hessian,
        32: ia.mxfp4_optimal_hessian,
    }
    for group, call in under_a_hessian.items():
        hessian = scales.block_hessians(inputs, group)
        search = functools.partial(call, hessian=hessian, group_size=group)
        finds[f"{call.__name__} g{group}"] = 512, inputs.shape[1], search
    for name, (rows, columns, find) in finds.items():
        yield functools.partial(case, name, rows, columns, find)


def gptq(b: Bench) -> Iterator[Case]:
    """The seven weights of a Llama-8B layer."""
    wide, inner = b.size(4096), b.size(14336)

    def case() -> Iterator[Row]:
        statistics_of = {}
        for k in {wide, inner}:
            statistics_of[k] = InputStatistics(k, device=b.device)
            statistics_of[k].update(torch.randn(2 * k, k, device=b.device))
        shapes = [(wide // 4, wide)] * 2 + [(wide, wide)] * 2 + [(inner, wide)] * 2
        weights = [torch.randn(*shape, device=b.device) for shape in [*shapes, (wide, inner)]]

        def quantise(w: Tensor) -> None:
            ia.gptq(w, statistics_of[w.shape[1]].hessian, group_size=128, act_order=True)

        def layer() -> None:
            for w in weights:
                quantise(w)

        run = b.wall_ms(layer, 1, warm=lambda: quantise(weights[0]))
        what = "GPTQ of a layer's seven weights within 60 s"
        yield Row(what, f"{wide}, {inner}", 1.0, run, lambda: 60e3)

    yield case


def training(b: Bench) -> Iterator[Case]:
    """Forward and backward of one Llama-8B block."""
    width, inner, tokens = b.size(4096), b.size(14336), b.size(4096, 64)
    x = b.randn(1, tokens, width).requires_grad_()

    def step(prepare: Callable[[Block], object]) -> Time:
        @functools.cache
        def measured() -> float:
            with torch.device(b.device):
                block = Block(width, inner, 128 if not b.tiny else 32).to(BF16)
            prepare(block)
            run = b.compiled(block)

            def once() -> None:
                block.zero_grad()
                run(x).float().square().mean().backward()

            once()
            return b.wall_ms(once, 10 if b.cuda else 1)()

        return measured

    dense = step(lambda _: None)

    def case(scheme: Literal["w8a8", "w4a4"]) -> Iterator[Row]:
        bits = 8 if scheme == "w8a8" else 4
        simulated = step(lambda block: pseudo_quantised(block, bits, bits, rotation=32))
        config = ia.QATConfig(scheme, 32, "quest", "int8")
        ours = step(lambda block: ia.quantize_(block, config))
        yield Row("training step over bf16", scheme, 1.0, ours, dense)
        yield Row("training step over pseudo-quantised", scheme, 1.3, ours, simulated)

    yield functools.partial(case, "w8a8")
    yield functools.partial(case, "w4a4")


# Sections and their shares of the time; what one leaves goes to those after it.
SECTIONS: dict[Callable[[Bench], Iterator[Case]], float] = {
    searches: 0.2,
    gptq: 0.1,
    mixed: 0.1,
    fp4_products: 0.15,
    pipelines: 0.15,
    rotate_and_quantise: 0.25,
    training: 0.35,
}
