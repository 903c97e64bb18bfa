"""`activation` and `residual` of the ops with INT4, INT8, FP8 and NF4 weights: results, gradients,
vmap. Refusals: test_matmul_refusals.py; any legal call: test_matmul.py.
"""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from gemm_case import X_DTYPE, Case, build, float32_is_exact
from gemm_checks import check_bounded, check_exact
from strategies import ACTIVATIONS, BF16, FP16, FP32, KINDS, PAIRS, epilogue_cases
from tolerance import assert_close, assert_identical
from torch import Tensor

from intlass_ops import batch_invariant, config, explain, matmul_int4_bf16_tn, matmul_int8_bf16_tn
from intlass_ops.config import tuned
from intlass_ops.cuda import jit, launch
from intlass_ops.cuda.plans import device_of


@pytest.mark.parametrize("case", epilogue_cases(), ids=str)
def test_every_pair_and_family_of_kernels(case: Case, device: str) -> None:
    check_bounded(case, device)
    exact = replace(case, activation="relu" if case.activation else None)
    if device == "cpu" and float32_is_exact(build(exact, "cpu")):
        check_exact(exact, device)


@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_exact(kind: str, device: str) -> None:
    for m in (1, 40):
        check_exact(replace(KINDS[kind], lead=(m,), activation="relu", residual=True), device)


@pytest.mark.parametrize("out", [BF16, FP16], ids=str)
@pytest.mark.parametrize("x", ["bf16", "s8", "fp32"])
def test_the_residual_joins_before_the_rounding(x: str, out: torch.dtype, device: str) -> None:
    """257 and 2049 are halfway between two numbers of the output type; the residual decides."""
    codes = torch.tensor([[16] * 16 + [1, 0] if out is BF16 else [127] * 16 + [17, 0]])
    a = codes.repeat(3, 1).to(X_DTYPE[x])
    w, ones = torch.ones(2, 18, dtype=torch.int8, device=device), torch.ones(2, device=device)
    odd = int(codes.sum())
    residual = torch.tensor([[1.0, -1.0]] * 3, device=device).to(out)
    options = {"activation": "relu", "residual": residual, "out_dtype": out}
    y = matmul_int8_bf16_tn(a.to(device), w, None, ones, **options)
    assert y.tolist() == [[odd + 1, odd - 1]] * 3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes_of_an_activation(activation: str, device: str) -> None:
    """Far out it is 0 or the identity; what is no number stays none."""
    values = [0.0, 1e-30, 40.0, -40.0, 88.0, -88.0, -90.0, -104.0, 1e9, -1e9, 1e30, -1e30]
    a = torch.tensor(values, device=device)[:, None].expand(-1, 16)
    w = torch.ones(8, 16, dtype=torch.int8, device=device)
    scale = torch.full((8,), 2.0**-4, device=device)
    for x in (BF16, FP32):
        y = matmul_int8_bf16_tn(a.to(x), w, None, scale, activation=activation, out_dtype=FP32)
        v = a.to(x).double()[:, :8]
        assert_close(y, oracle.ACTIVATIONS[activation](v), v.abs())
        y = matmul_int8_bf16_tn((a * torch.nan).to(x), w, None, scale, activation=activation)
        assert y.isnan().all()


def _reference(
    a: Tensor, w: Tensor, activation: str | None, bias: Tensor, residual: Tensor
) -> Tensor:
    y = a @ w.T + bias
    return (y if activation is None else oracle.ACTIVATIONS[activation](y)) + residual


@pytest.mark.parametrize(
    ("activation", "w"),
    [
        *((None, "s4"), ("gelu", "s4"), (None, "e4m3"), ("silu", "e4m3"), ("silu", "nf4")),
        *((name, "s8") for name in ACTIVATIONS),
    ],
)
def test_gradients(activation: str | None, w: str, device: str) -> None:
    case = Case(
        "fp32", w, (2, 3), 24, 48, groups=3, bias=FP32, activation=activation, residual=True
    )
    call = build(case, device, numbers="random")
    leaves = [call.a, call.options["bias"], call.options["residual"]]
    doubles = [t.double().requires_grad_() for t in leaves]
    for t in leaves:
        t.requires_grad_()
    y = call.run()
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
    y.backward(grad)
    dense = call.weight()
    a, bias, residual = doubles
    _reference(a, dense, activation, bias, residual).backward(grad.double())
    for t, d in zip(leaves, doubles, strict=True):
        assert_close(t.grad, d.grad, 20 * grad.abs().double().max() * torch.ones_like(d))


def test_the_bias_of_integer_activations_has_a_gradient(device: str) -> None:
    """W4A4 of odd K: what is before the activation is computed again from packed codes."""
    case = Case("u4", "s4", (4,), 5, 33, bias=FP32, a_scale="token", a_zero=torch.uint8)
    call = build(replace(case, activation="relu"), device)
    call.options["bias"].requires_grad_()
    call.run().float().sum().backward()
    before = build(case, device).expected().y
    assert call.options["bias"].grad.tolist() == (before > 0).sum(0).tolist()


@pytest.mark.parametrize("in_dims", [(0, None), (0, 1), (None, 0)])
def test_vmap_of_a_residual(in_dims: tuple[int | None, int | None], device: str) -> None:
    call = build(Case("bf16", "s4", (4, 3), 6, 32), device)
    a = call.a if in_dims[0] == 0 else call.a[0]
    shape = {0: (4, 3, 6), 1: (3, 4, 6), None: (3, 6)}[in_dims[1]]
    residual = torch.arange(float(torch.Size(shape).numel()), device=device).view(shape).to(BF16)

    def one(a: Tensor, residual: Tensor) -> Tensor:
        options = {"activation": "relu", "residual": residual}
        return matmul_int4_bf16_tn(a, call.w, call.scales, **options)

    y = torch.vmap(one, in_dims)(a, residual)
    for i in range(4):
        of_entry = [
            t if d is None else t.select(d, i) for t, d in zip((a, residual), in_dims, strict=True)
        ]
        assert_identical(y[i], one(*of_entry))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_a_row_does_not_depend_on_others_beside_it(activation: str, device: str) -> None:
    """Vectors of the CPU's loops end where rows do: 61 is no multiple of their width."""
    for x in ("bf16", "s8"):
        call = build(Case(x, "s8", (9,), 61, 64, out=FP32, residual=True), device, numbers="random")
        residual = call.options["residual"]
        options = {"activation": activation, "out_dtype": FP32}
        with batch_invariant():
            y = matmul_int8_bf16_tn(call.a, call.w, None, call.scales, residual=residual, **options)
            for i in range(9):
                part = matmul_int8_bf16_tn(
                    call.a[i : i + 1],
                    call.w,
                    None,
                    call.scales,
                    residual=residual[i : i + 1],
                    **options,
                )
                assert torch.equal(part, y[i : i + 1])


def test_neither_changes_which_kernel_is_picked() -> None:
    for x, w in PAIRS:
        if x == "fp32":
            continue
        for m in (1, 16, 100, 3000):
            device = config.device_of("sm_90a")
            types = "float", "float", "__half"
            shape = config.Shape(x, w, *types, w == "u4", x == "u4", True, m, 4096, 4096, 4096)
            c = config.pick(device, shape)
            fused = config.with_epilogue(c, "gelu_tanh", True)
            assert tuned.tile_of(c) == tuned.tile_of(fused)
            assert str(fused) == f"{c} gelu_tanh residual"
            assert config.with_epilogue(fused, None, False) == c


# ----------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["w4a16", "w8a8", "w4a8"])
def test_every_tile_of_every_kernel(kind: str) -> None:
    """Each candidate of a problem, K split and shared included, bit for bit."""
    gpu = device_of(0)
    for m in (3, 150):
        case = replace(KINDS[kind], lead=(m,), n=328, k=1024, groups=8 if kind == "w4a16" else 1)
        case = replace(case, a_zero=None, activation="relu", residual=True)
        wanted = explain(build(case, "cuda").run).dispatches[0].kernel
        assert wanted.endswith("relu residual")
        zeros = launch.ZERO_TYPE[case.zero] if case.w == "u4" else "float"
        types = launch.TYPE[case.scale], zeros, launch.TYPE[case.out_dtype]
        sizes = m, case.n, case.k, case.k // case.groups
        shape = config.Shape(case.x, case.w, *types, case.w == "u4", False, True, *sizes)
        tiles = config.candidates(gpu, shape)
        jit.warmup([config.with_epilogue(c, "relu", True) for c in tiles], progress=False)
        for tile in tiles:
            with launch.forced(tile):
                check_exact(case, "cuda")


@pytest.mark.gpu
def test_a_residual_that_the_kernel_before_writes() -> None:
    """Kernels that start early read it after those before have ended."""
    call = build(Case("s8", "s8", (4,), 4096, 512, a_scale="token", residual=True), "cuda")
    plain = replace(call, options={"a_scale": call.options["a_scale"]}).expected().y
    residual, written = call.options["residual"], torch.zeros(1 << 26, dtype=BF16, device="cuda")
    call.run()
    for i in range(20):
        written.add_(1)
        residual.copy_(written[: residual.numel()].view_as(residual))
        assert_identical(call.run(), oracle.round_to(plain + i + 1, BF16))
