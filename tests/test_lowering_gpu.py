"""The lowering on a real GPU: kernels, CUDA graphs, stale weights, memory of packing."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable

import graph_zoo
import module_zoo
import pytest
import store_rows_in_torch
import test_lowering_blocks
import torch
from lowering_helpers import SWAPPED, TOLERANCE, fresh, outcomes, relative_error
from test_side_by_side import SCHEMES, X, _swap, three
from torch import Tensor, nn

from intlass_ops import (
    Int4WeightOnly,
    Int8DynamicActivationInt4Weight,
    Int8DynamicActivationInt8Weight,
    explain,
    lowering,
    matmul_int8_bf16_tn,
    quantize_,
    quantize_int8,
)
from intlass_ops.cuda import launch_store_rows
from intlass_ops.cuda.launch_store_rows import Planes, Stored
from intlass_ops.lowering import blocks, graph_pass
from intlass_ops.lowering.storage import pack_all
from intlass_ops.prepare import prepare_
from intlass_ops.quantize import Scheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def close(y: Tensor, expected: Tensor) -> bool:
    return relative_error(y, expected) < TOLERANCE[expected.dtype]


@pytest.mark.parametrize(
    "name", ["SubMul", "ActOrder", "Int8Epilogue", "Int8Asymmetric", "Experts"]
)
def test_idiom_runs_on_our_kernels(name: str) -> None:
    module = graph_zoo.AFFINE[name]().cuda()
    x = torch.randn(2, 3, graph_zoo.K, device="cuda").bfloat16()
    with fresh(), torch.no_grad():
        y = torch.compile(module, backend=lowering.backend, fullgraph=True)(x)
        assert close(y, module(x))
        assert outcomes() == [SWAPPED], lowering.report()


def test_siblings_that_are_packed_as_one() -> None:
    a, b = (graph_zoo.Int32Words(seed=seed).cuda() for seed in (1, 2))

    def both(x: Tensor) -> Tensor:
        return nn.functional.silu(a(x)) * b(x)

    x = torch.randn(5, graph_zoo.K, device="cuda").bfloat16()
    with fresh(), torch.no_grad():
        y = torch.compile(both, backend=lowering.backend, fullgraph=True)(x)
        assert close(y, both(x))
        assert lowering.counters()["fused"] == 1


@pytest.mark.parametrize("kind", ["SubMul", "Int8PerChannel"])
def test_replayed_cuda_graphs_see_changed_weights(kind: str) -> None:
    module = graph_zoo.AFFINE[kind]().cuda()
    x = torch.randn(4, graph_zoo.K, device="cuda").bfloat16()
    with fresh(), torch.no_grad():
        compiled = torch.compile(module, backend=lowering.backend, mode="reduce-overhead")
        for _ in range(4):
            assert close(compiled(x), module(x))
        module.s.mul_(-2)
        assert close(compiled(x), module(x))
        first = next(module.buffers())
        first.copy_(first.flip(0).clone())
        for _ in range(2):
            assert close(compiled(x), module(x))
        assert lowering.counters().get("run.captured_cold", 0) == 0


class Residuals(nn.Module):
    """Kernels of Inductor's that read what others than the kernel just before have written."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.first, self.second = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.second(nn.functional.silu(self.first(y)) * y)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (Int4WeightOnly(128), 1),
        (Int8DynamicActivationInt8Weight(), 1),
        (Int8DynamicActivationInt4Weight(128), 64),  # quantisers that write lanes
    ],
)
def test_kernels_that_start_early_compute_the_same(config: Scheme, tokens: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Residuals(1024) for _ in range(4))).cuda().bfloat16()
    quantize_(model.requires_grad_(False), config)
    x = torch.randn(tokens, 1024, device="cuda").bfloat16()
    results = []
    for early in (False, True):
        options = {"triton.cudagraphs": True, graph_pass.EARLY: early}
        with fresh(), torch.no_grad():
            compiled = torch.compile(model, backend=lowering.backend, options=options)
            replays = [compiled(x).clone() for _ in range(60)]
            assert all(torch.equal(each, replays[-1]) for each in replays[3:])
            results.append(replays[-1])
    assert relative_error(*results) < TOLERANCE[x.dtype]


def test_a_weight_that_the_graph_computes_is_read_when_it_is_there() -> None:
    def f(x: Tensor, x_scale: Tensor, w: Tensor) -> Tensor:
        scales = w.abs().amax(-1) / 127
        codes = (w / scales[:, None]).round().to(torch.int8)
        return matmul_int8_bf16_tn(x, codes, x_scale, scales)

    x = torch.ones(1, 4096, device="cuda", dtype=torch.int8)
    x_scale = torch.ones(1, 1, device="cuda")
    with fresh(), torch.no_grad():
        compiled = torch.compile(f, backend=lowering.backend, options={"triton.cudagraphs": True})
        for _ in range(20):
            w = torch.randn(128, 4096, device="cuda")
            assert close(compiled(x, x_scale, w), f(x, x_scale, w))


@pytest.mark.parametrize("name", ["GPTQ: 4-bit v1, act-order", "AWQ: GEMM"])
def test_prepared_module_on_the_gpu(name: str) -> None:
    linear, x, expected = module_zoo.MODULES[name][0]()
    model = nn.Sequential(linear).cuda()
    with fresh(), torch.no_grad():
        assert [d.outcome for d in prepare_(model)] == [SWAPPED]
        assert close(model(x.cuda()).cpu(), expected.to(x.dtype))


def test_packing_releases_each_original() -> None:
    """Afterwards a model holds its packed weights and nothing else."""
    layers = [module_zoo.GptFastInt8() for _ in range(4)]
    model = nn.Sequential(*layers).cuda()
    del layers
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with fresh(), torch.no_grad():
        prepare_(model)
    gc.collect()
    held = torch.cuda.memory_allocated()
    assert held <= before * 1.15 + (1 << 16)


def test_packing_takes_a_few_bytes_an_element() -> None:
    n, k = 8192, 4096
    codes = torch.randint(0, 256, (n, k // 2), device="cuda").to(torch.uint8)
    scales = (torch.rand(n, k // 32, 1, device="cuda") * 0.01 + 0.01).bfloat16()

    def linear(x: Tensor) -> Tensor:
        q = torch.stack([codes & 15, codes >> 4], -1).view(n, -1, 32).to(x.dtype)
        return nn.functional.linear(x, ((q - 8) * scales).view(n, k))

    x = torch.randn(2, k, device="cuda").bfloat16()
    with fresh(), torch.no_grad():
        expected = linear(x)
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        assert close(torch.compile(linear, backend=lowering.backend, fullgraph=True)(x), expected)
    used = torch.cuda.max_memory_allocated() - before
    assert used <= 10 * n * k + 64 * blocks.BLOCK_ELEMENTS


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_stored_as_pytorch_stores_them(dtype: torch.dtype, bits: int, zeros: bool) -> None:
    n, k, group = 70, 195, 39
    low, levels = 3 if zeros else -(2 ** (bits - 1)), 2**bits
    generator = torch.Generator("cuda").manual_seed(bits)

    def random(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, device="cuda", generator=generator).double()

    groups = (n, k // group)
    scale, zero = (1 + random(100, *groups)) / 64, random(levels, *groups) + 0.25 * zeros
    codes = low + random(levels, n, k) + (0 if zeros else zero.repeat_interleave(group, 1))
    order = torch.randperm(k, device="cuda", generator=generator)
    at = [
        (q - zero.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)
        for q in (0 * codes, 0 * codes + 1, codes)
    ]
    at = [torch.empty_like(each).index_copy_(1, order, each) for each in at]

    def stored(store: Callable[..., None], at: list[Tensor]) -> tuple[list[Tensor], int]:
        empty = functools.partial(torch.zeros, device="cuda")
        packed = bits == 4 or zeros
        type_ = torch.uint8 if packed else torch.int8
        weight = [empty(n, (k + 1) // 2 if packed else k, dtype=type_) for _ in range(2)]
        scales = [empty(*groups) for _ in range(3)]
        pair = (weight[1], scales[2]) if bits == 8 and zeros else (None, None)
        into = Stored(weight[0], scales[0], scales[1] if zeros else None, *pair)
        flags = empty(1, dtype=torch.int32)
        kind = torch.finfo(dtype)
        store(Planes(*at, at[2].to(dtype), kind), order, low, levels, into, flags)
        return [*weight, *scales], int(flags)

    ours, flags = stored(launch_store_rows.store_rows, at)
    expected = stored(store_rows_in_torch.store_rows, at)
    assert launch_store_rows.was_affine(flags)
    assert flags == expected[1]
    assert all(map(torch.equal, ours, expected[0]))
    for i, change in ((2, 0.3), (1, 0.01), (0, float("nan"))):
        wrong = [each.clone() for each in at]
        wrong[i][n - 1, k - 1] += change
        assert not launch_store_rows.was_affine(stored(launch_store_rows.store_rows, wrong)[1])


@pytest.mark.parametrize("make", test_lowering_blocks.MAKERS)
def test_rows_are_stored_as_they_are_measured(
    make: type[graph_zoo.Idiom], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, leaves = test_lowering_blocks.weight_of(make())
    leaves = [leaf.cuda() for leaf in leaves]
    for name in ("FIRST_ELEMENTS", "TAKEN_ELEMENTS"):
        monkeypatch.setattr(blocks, name, 16 * graph_zoo.K)
    (packed,) = pack_all((recipe,), leaves)
    monkeypatch.setattr(launch_store_rows, "can_store", lambda device: False)
    (expected,) = pack_all((recipe,), leaves)
    test_lowering_blocks.same(packed, expected, make)


def test_norm_and_swiglu_are_computed_by_the_quantiser() -> None:
    x, w = (torch.randn(size, device="cuda").bfloat16() for size in ((33, 512), (512,)))

    def step(x: Tensor) -> Tensor:
        codes, scale, _ = quantize_int8(nn.functional.rms_norm(x, (512,), w, 1e-5))
        y = (codes.float() * scale).bfloat16()
        codes, scale, _ = quantize_int8(nn.functional.silu(y) * x)
        return codes.float() * scale

    with fresh(), torch.no_grad():
        y = torch.compile(step, backend=lowering.backend, fullgraph=True)(x)
        assert lowering.counters()["quantisers"] == 2
        # A norm summed in another order may move a code by one.
        assert relative_error(y, step(x)) < 2 / 127


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "w4a8"])
def test_siblings_are_one_kernel_under_cuda_graphs(scheme: str) -> None:
    model = three(SCHEMES[scheme], bias=True).cuda()
    x = X.cuda()
    with fresh(), torch.no_grad():
        call = torch.compile(model, backend=lowering.backend, mode="reduce-overhead")
        assert len(explain(call, x).dispatches) == 2
        for change in (lambda m: m.v.scales.mul_(-2), _swap):
            for _ in range(4):
                assert all(close(y, z) for y, z in zip(call(x), model(x), strict=True))
            change(model)
            assert all(close(y, z) for y, z in zip(call(x), model(x), strict=True))
