"""INT8 codes as lanes (packing.py): what writes them, who asks for them; results are the same.

The products themselves are test_matmul.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lowering_helpers import Counting, fresh, relative_error
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import intlass_ops as ia
from intlass_ops import batch_invariant, config, lowering, packing
from intlass_ops.ops import lanes

H200 = config.device_of("sm_90a")
BF16 = torch.bfloat16
OPS = torch.ops.intlass


def numbers(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -------------------------------------------------------------------------------------- quantisers


def by_token(x: Tensor, **more: Any) -> dict[str, Any]:
    """What quantises each row of x, alone or behind something."""
    weight = x.reshape(-1, x.shape[-1])[0].clone()
    return {
        "alone": ia.quantize_int8(x, **more),
        "full range": ia.quantize_int8(x, full_range=True, **more),
        "norm": ia.rms_norm_quantize(x, weight, round_first=True, **more),
        "silu": ia.silu_mul_quantize(x, x.flip(0), **more),
    }


def by_other_segments(x: Tensor, **more: Any) -> dict[str, Any]:
    return {
        "asymmetric": ia.quantize_int8(x, symmetric=False, **more),
        "stochastic": ia.quantize_int8(x, rounding="stochastic", seed=5, **more),
        "groups of 32": ia.quantize_int8(x, granularity="group", group_size=32, **more),
        "groups of 16": ia.quantize_int8(x, granularity="group", group_size=16, **more),
        "channel": ia.quantize_int8(x, granularity="channel", **more),
        "tensor": ia.quantize_int8(x, granularity="tensor", **more),
    }


def check_same_codes(x: Tensor, quantisers: Callable[..., dict[str, Any]] = by_token) -> None:
    plain = quantisers(x)
    for name, (q, *rest) in quantisers(x, lanes=True).items():
        codes, *expected = plain[name]
        assert q.dtype == torch.int32, name
        assert q.shape == (*x.shape[:-1], x.shape[-1] // 4), name
        assert q.is_contiguous(), name
        assert torch.equal(packing.from_lanes(q), codes), name
        for a, b in zip(rest, expected, strict=True):
            assert (a is None and b is None) or torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_codes_and_scales_are_the_same(dtype: torch.dtype, device: str) -> None:
    check_same_codes(numbers(2, 3, 96, dtype=dtype).to(device))


def test_segments_of_every_kind(device: str) -> None:
    check_same_codes(numbers(2, 3, 96).to(device), by_other_segments)


def test_no_tokens(device: str) -> None:
    x = torch.empty(0, 64, device=device)
    assert ia.quantize_int8(x, lanes=True)[0].shape == (0, 16)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(5, 4096), (1200, 992), (700, 5120), (600, 14336), (2, 320_000)], ids=str
)
def test_every_way_of_the_kernel(shape: tuple[int, ...]) -> None:
    """Few rows and many, in registers or not, by a cluster or not, ends that are no warp's."""
    check_same_codes(numbers(*shape).cuda())


def test_rows_that_are_not_aligned(device: str) -> None:
    wide = numbers(5, 200).to(device)
    for x in (wide[:, 1:65], wide[:, 8:72], wide[::2, :64], wide.T[:64].T):
        check_same_codes(x)


def test_what_is_not_finite(device: str) -> None:
    x = numbers(4, 64).to(device)
    x[0, 3], x[1, 40], x[2, 0] = torch.nan, torch.inf, -torch.inf
    (q, scale, _), (codes, same, _) = ia.quantize_int8(x, lanes=True), ia.quantize_int8(x)
    assert torch.equal(packing.from_lanes(q), codes)
    torch.testing.assert_close(scale, same, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: ia.quantize_int8(x[:, :24], lanes=True), "quantize_int8: K=24 is not a multip"),
        (lambda x: ia.rms_norm_quantize(x[:, :40], lanes=True), "K=40 is not a multiple of 32"),
        (lambda x: ia.silu_mul_quantize(x, x, bits=4, lanes=True), "lanes=True with bits=4"),
        (lambda x: ia.quantize_int8(x, x[:, :1], lanes=True), "computes the scale, and one is"),
        (
            lambda x: OPS.quantize_dynamic(x, 4, "token", None, True, None, lanes=True),
            "quantize_int4: lanes=True with bits=4; lanes are of INT8 codes",
        ),
    ],
)
def test_refusals(call: Callable[[Tensor], Any], said: str, device: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(numbers(3, 64).to(device))


def test_opcheck(device: str) -> None:
    x = numbers(3, 64, dtype=torch.float32).to(device)
    opcheck(OPS.quantize_dynamic.default, (x, 8, "token", None, True, None, False, True))
    opcheck(OPS.rms_norm_quantize.default, (x, x[0].clone(), 1e-6), {"lanes": True})
    opcheck(OPS.silu_mul_quantize.default, (x, x + 1), {"full_range": True, "lanes": True})


# ------------------------------------------------------------------------------------ who asks


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever there is, `takes_lanes` answers for an H200."""
    monkeypatch.setattr(lanes, "_gpu", lambda _: H200)
    return


class _Quantisers(TorchDispatchMode):
    """Notes the dtypes of the codes that quantisers make."""

    def __init__(self) -> None:
        super().__init__()
        self.codes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "quantize" in str(func):
            self.codes.append(result[0].dtype)
        return result


def made(call: Callable[[], Any]) -> list[torch.dtype]:
    with _Quantisers() as seen:
        call()
    return seen.codes


def linear(n: int, k: int, activation: Any = "int8", zeros: bool = False, seed: int = 0) -> Any:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
    scales = torch.rand(n, k // 32, generator=g) * 0.1
    z = torch.randint(0, 16, scales.shape, generator=g, dtype=torch.uint8) if zeros else None
    return ia.IntLinear(ia.pack_int4(codes), scales, z, activation=activation)


@pytest.mark.parametrize("activation", ["int8", "int8_full_range"])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_layer_asks_from_17_tokens_on(
    activation: str, zeros: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = linear(40, 64, activation, zeros).to(device)
    for shape, tokens in (((16, 64), 16), ((17, 64), 17), ((2, 9, 64), 18), ((0, 64), 0)):
        x = numbers(*shape).to(device)
        monkeypatch.setattr(lanes, "_gpu", lambda _: None)
        expected = layer(x)
        assert made(lambda: layer(x)) == [torch.int8]  # noqa: B023
        monkeypatch.setattr(lanes, "_gpu", lambda _: H200)
        assert torch.equal(layer(x), expected)
        kind = torch.int32 if tokens > 16 else torch.int8
        assert made(lambda: layer(x)) == [kind]  # noqa: B023
        with batch_invariant():
            assert made(lambda: layer(x)) == [torch.int8]  # noqa: B023


def test_other_layers_do_not_ask(hopper: None, device: str) -> None:
    x = numbers(32, 64).to(device)
    w8 = torch.randint(-128, 128, (40, 64), dtype=torch.int8)
    assert made(lambda: ia.IntLinear(w8, torch.ones(40), activation="int8").to(device)(x)) == [
        torch.int8
    ]
    assert made(lambda: linear(40, 64, "int4").to(device)(x)) == [torch.uint8]
    assert made(lambda: linear(40, 64, None).to(device)(x)) == []
    odd = numbers(32, 80).to(device)  # K is no multiple of 32
    w4 = torch.zeros(40, 40, dtype=torch.uint8)
    layer = ia.IntLinear(w4, torch.ones(40), activation="int8").to(device)
    assert made(lambda: layer(odd)) == [torch.int8]


def test_what_a_layer_refuses(hopper: None, device: str) -> None:
    x, layer = torch.ones(32, 64, device=device), linear(40, 64).to(device)
    with pytest.raises(TypeError, match="int8"):
        layer(x.to(torch.int8))
    with pytest.raises(TypeError, match="float64"):
        layer(x.double())
    layer.scales = layer.scales.double()
    with pytest.raises(TypeError, match="scales"):
        layer(x)


@pytest.mark.gpu
def test_a_layer_gets_what_the_picked_kernel_takes() -> None:
    """On a Hopper GPU no product of a layer puts lanes in order by itself."""
    for activation, m in (("int8", 17), ("int8_full_range", 300), ("int8", 1)):
        layer, x = linear(256, 512, activation).cuda(), numbers(m, 512).cuda()
        found = ia.explain(layer, x).dispatches[0]
        assert "put in order" not in found.reason
        on_hopper = torch.cuda.get_device_capability() == (9, 0)
        assert made(lambda: layer(x)) == [  # noqa: B023
            torch.int32 if on_hopper and m > 16 else torch.int8
        ]
        q, scale, _ = ia.quantize_int8(x, full_range=activation != "int8")
        y = ia.matmul_int4_bf16_tn(q, layer.weight, layer.scales, a_scale=scale)
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("arch", config.ARCHS)
def test_lanes_are_for_hopper_cu(arch: str) -> None:
    def shape(**more: Any) -> config.Shape:
        given: dict[str, Any] = {
            "x_kind": "s8",
            "w_kind": "s4",
            "scale_type": "float",
            "zero_type": "float",
            "out_type": "__nv_bfloat16",
            "has_zeros": False,
            "has_a_zero": False,
            "aligned": True,
            "m": 64,
            "n": 4096,
            "k": 4096,
            "group_size": 128,
        }
        return config.Shape(**(given | more))

    gpu = config.device_of(arch)
    for one in ({}, {"m": 4096}, {"m": 256, "group_size": 4096}):
        assert config.takes_lanes(gpu, shape(**one)) == (arch == "sm_90a")
    for other in (
        {"m": 1},
        {"k": 4112, "group_size": 4112},
        {"x_kind": "bf16"},
        {"w_kind": "s8", "group_size": 4096},
        {"group_size": 48, "k": 4128},
        {"batch_invariant": True},
        {"m": 257, "group_size": 4096},
    ):
        assert not config.takes_lanes(gpu, shape(**other))


# ----------------------------------------------------------------------------------------- compiled


class Block(nn.Module):
    """q, k and v of one norm, then a gated pair and what follows it."""

    def __init__(self, last: str | None = "int8") -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64, dtype=BF16)
        self.q, self.k, self.v = (linear(n, 64, seed=n) for n in (64, 32, 32))
        self.gate, self.up = (linear(96, 64, seed=n) for n in (1, 2))
        self.down = linear(64, 96, last, seed=3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.q(y) + torch.cat((self.k(y), self.v(y)), -1)
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


def compiled_codes(module: nn.Module, x: Tensor, **options: Any) -> tuple[Tensor, list[bool]]:
    """A compiled module's result, and of each quantiser in its graph whether it writes lanes."""
    backend = Counting()
    with fresh(), torch.no_grad():
        y = torch.compile(module, backend=backend, fullgraph=True, **options)(x)
    (graph,) = backend.graphs
    targets = (OPS.quantize_dynamic, OPS.rms_norm_quantize, OPS.silu_mul_quantize)
    nodes = [
        node for node in graph.graph.nodes if node.target in [each.default for each in targets]
    ]
    return y, [bool(node.kwargs.get("lanes")) for node in nodes]


def test_compiled_quantisers_write_lanes(hopper: None) -> None:
    """One for q, k and v, which stay one product, one for gate and up, one fused with SiLU."""
    module, x = Block(), numbers(2, 10, 64)
    with torch.no_grad():
        expected = module(x)
    y, asked = compiled_codes(module, x)
    assert asked == [True, True, True]
    assert lowering.counters()["lanes"] == 3
    assert lowering.counters()["joined"] == 3
    assert torch.equal(y, expected)
    assert all(d.scheme == "w4a8" for d in lowering.report())


def test_few_or_unknown_numbers_of_tokens_do_not(hopper: None) -> None:
    assert compiled_codes(Block(), numbers(2, 8, 64))[1] == [False] * 3
    assert compiled_codes(Block(), numbers(2, 10, 64), dynamic=True)[1] == [False] * 3
    with batch_invariant():
        assert compiled_codes(Block(), numbers(2, 10, 64))[1] == [False] * 3


def test_a_gpu_that_has_no_use_for_them() -> None:
    assert compiled_codes(Block(), numbers(2, 10, 64))[1] == [False] * 3


class Shared(nn.Module):
    """Codes that an INT8 weight, or the caller, gets too."""

    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.narrow = linear(64, 64)
        codes = torch.randint(-128, 128, (64, 64), dtype=torch.int8)
        self.wide = ia.IntLinear(codes, torch.ones(64), activation="int8")
        self.returned = returned

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = ia.quantize_int8(x)[0]
        return self.narrow(x), codes if self.returned else self.wide(x)


@pytest.mark.parametrize("returned", [False, True])
def test_codes_that_others_read_stay_bytes(returned: bool, hopper: None) -> None:
    module, x = Shared(returned), numbers(32, 64)
    y, asked = compiled_codes(module, x)
    assert not any(asked)
    for a, b in zip(y, module(x), strict=True):
        assert torch.equal(a, b)


def test_inductor_runs_them(hopper: None) -> None:
    module, x = Block(), numbers(20, 64)
    with fresh(), torch.no_grad():
        y = torch.compile(module, backend=lowering.backend, fullgraph=True)(x)
    assert lowering.counters()["lanes"] == 3
    with torch.no_grad():
        assert relative_error(y, module(x)) < 2e-2
