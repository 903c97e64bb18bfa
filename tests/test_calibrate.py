"""The weight quantisers: against their formulas solved another way, and against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intlass_ops import calibrate
from intlass_ops.calibrate import InputStatistics, QuantizedWeight, output_error
from intlass_ops.gptq import gptq


def layer(seed: int, n: int, k: int, tokens: int = 512) -> tuple[Tensor, Tensor]:
    """A weight [n, k] and inputs [tokens, k] that are correlated, a few channels large."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=rng) * 0.05
    low_rank = torch.randn(tokens, k // 4, generator=rng) @ torch.randn(k // 4, k, generator=rng)
    x = low_rank / (k // 4) ** 0.5 + 0.3 * torch.randn(tokens, k, generator=rng)
    x[:, :: k // 8] *= 6
    return w, x


def hessian_of(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    statistics = InputStatistics(x.shape[-1], dtype=dtype)
    statistics.update(x)
    return statistics.hessian


def error(w: Tensor, q: QuantizedWeight, h: Tensor) -> float:
    return float(output_error((w - q.dequantize()).double(), h))


def test_statistics_are_those_of_all_the_data_at_once() -> None:
    _, x = layer(0, 1, 32)
    whole, parts = (
        InputStatistics(32, dtype=torch.float64),
        InputStatistics(32, dtype=torch.float64),
    )
    whole.update(x)
    for part in x.view(8, 4, 16, 32):
        parts.update(part)
    assert parts.tokens == whole.tokens == 512
    torch.testing.assert_close(parts.hessian, x.double().T @ x.double())
    torch.testing.assert_close(parts.mean_abs, x.double().abs().mean(0))
    with pytest.raises(ValueError, match="x has 16 features, the layer has K=32"):
        whole.update(x[:, :16])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 32])
def test_better_methods_leave_less_output_error(symmetric: bool, group_size: int | None) -> None:
    w, x = layer(1, 48, 128)
    h = hessian_of(x)
    how = {"group_size": group_size, "symmetric": symmetric}
    rtn, mse = calibrate.rtn(w, **how), calibrate.mse(w, **how)  # type: ignore[arg-type]
    plain = float((w - rtn.dequantize()).square().sum())
    assert float((w - mse.dequantize()).square().sum()) < plain
    one, best = (
        error(w, gptq(w, h, act_order=order, **how), h)  # type: ignore[arg-type]
        for order in (False, True)
    )
    assert max(one, best) < 0.7 * min(error(w, mse, h), error(w, rtn, h))
    scaled, c = calibrate.awq(w, h, **how)  # type: ignore[arg-type]
    assert float(output_error((w - scaled.dequantize() / c).double(), h)) < 0.9 * error(w, rtn, h)


def gptq_by_least_squares(
    w: Tensor, h: Tensor, first: QuantizedWeight, order: list[int], damping: float
) -> Tensor:
    """GPTQ without factors or blocks: after each column, solve for all the columns still free.

    Residuals r of the rounded columns F fixed, those of the free columns R that minimise rᵀHr are
    r_R = -r_F H_FR H_RR⁻¹, and the next column is rounded at w + (its share of) -r_R.
    """
    h = h + damping * h.diagonal().mean() * torch.eye(h.shape[0], dtype=h.dtype)
    w = w.double()
    scale = first.scales.double().repeat_interleave(w.shape[1] // first.scales.shape[1], 1)
    zero = torch.zeros_like(scale)
    if first.zeros is not None:
        zero = first.zeros.double().repeat_interleave(w.shape[1] // first.zeros.shape[1], 1)
    low, high = (-7, 7) if first.zeros is None else (0, 15)
    codes, residual = torch.empty_like(w), torch.zeros_like(w)
    for i, column in enumerate(order):
        done, free = order[:i], order[i:]
        target = w[:, column]
        if done:
            inverse = torch.linalg.inv(h[free][:, free])
            target = target + (residual[:, done] @ h[done][:, free] @ inverse)[:, 0]
        s, z = scale[:, column], zero[:, column]
        codes[:, column] = ((target / s).round() + z).clamp(low, high)
        residual[:, column] = w[:, column] - (codes[:, column] - z) * s
    return codes


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    block_size=st.sampled_from([1, 5, 16, 128]),
)
def test_gptq_is_conditional_least_squares(
    seed: int, symmetric: bool, act_order: bool, block_size: int
) -> None:
    w, x = layer(seed, 6, 32)
    h = hessian_of(x)
    group_size = 8 if act_order else None
    q = gptq(
        w,
        h,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        block_size=block_size,
    )
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(32)
    expected = gptq_by_least_squares(w, h, q, order.tolist(), damping=0.01)
    assert torch.equal(q.codes.double(), expected)


def test_gptq_does_not_depend_on_the_block_size() -> None:
    w, x = layer(3, 16, 96)
    results = [gptq(w, hessian_of(x), group_size=16, block_size=b) for b in (1, 16, 40, 96, 500)]
    for other in results[1:]:
        assert torch.equal(other.codes, results[0].codes)
        assert torch.equal(other.scales, results[0].scales)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_without_correlation_is_the_scale_search_alone(
    symmetric: bool, act_order: bool
) -> None:
    w, x = layer(4, 16, 64)
    h = torch.diag(hessian_of(x).diagonal())
    q = gptq(w, h, group_size=32, symmetric=symmetric, act_order=act_order)
    alone = calibrate.mse(w, group_size=32, symmetric=symmetric, weights=h.diagonal())
    assert torch.equal(q.codes, alone.codes)
    assert torch.equal(q.scales, alone.scales)
    assert torch.equal(q.dequantize(), alone.dequantize())
    plain = gptq(w, h, group_size=32, symmetric=symmetric, optimal_scales=False)
    assert torch.equal(plain.codes, calibrate.rtn(w, group_size=32, symmetric=symmetric).codes)


def test_gptq_with_inputs_that_are_never_active() -> None:
    w, x = layer(5, 8, 64)
    x[:, 10:20] = 0
    x[:, 32:48] = 0
    q = gptq(w, hessian_of(x), group_size=16)
    assert q.dequantize().isfinite().all()
    near = calibrate.rtn(w[:, 32:48], group_size=16).dequantize()
    own = q.dequantize()[:, 32:48]
    assert float((own - w[:, 32:48]).norm()) <= float((near - w[:, 32:48]).norm())


def test_gptq_names_what_is_wrong_with_the_hessian() -> None:
    w = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"gptq: the Hessian with damping=0.0 is not positive"):
        gptq(w, torch.ones(8, 8), damping=0.0)
    with pytest.raises(ValueError, match=r"gptq: hessian is \(4, 4\), expected \(8, 8\)"):
        gptq(w, torch.eye(4))
    with pytest.raises(ValueError, match="gptq: the Hessian holds an infinity or a NaN"):
        gptq(w, torch.full((8, 8), torch.nan))
    with pytest.raises(ValueError, match="gptq: K=8 is not a multiple of group_size=3"):
        gptq(w, torch.eye(8), group_size=3)


@given(seed=st.integers(0, 2**31), p=st.sampled_from([0.4, 0.7, 0.9]))
def test_hqq_never_loses_to_rtn_at_its_own_measure(seed: int, p: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(6, 128, generator=rng) * 0.1
    w[:, ::40] *= 8
    q, rtn = calibrate.hqq(w, p=p), calibrate.rtn(w, group_size=64, symmetric=False)
    assert q.zeros is not None
    assert q.zeros.dtype == torch.float32
    assert int(q.codes.max()) <= 15

    def measure(a: QuantizedWeight) -> Tensor:
        return (w - a.dequantize()).abs().pow(p).view(6, 2, 64).sum(-1)

    assert (measure(q) <= measure(rtn) * (1 + 1e-5)).all()
    if seed % 7 == 0:
        assert measure(q).sum() < measure(rtn).sum()


def test_hqq_of_a_weight_on_its_grid_is_exact() -> None:
    codes = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(0))
    codes[:, 0], codes[:, 1] = 0, 15
    w = (codes.float() - 6) * 0.25
    assert torch.equal(calibrate.hqq(w).dequantize(), w)


def test_awq_keeps_a_plain_weight_where_scaling_does_not_pay() -> None:
    w = torch.randint(-7, 8, (8, 32)).float()
    w[:, 0] = 7
    q, c = calibrate.awq(w, hessian_of(layer(6, 8, 32)[1]))
    assert torch.equal(c, torch.ones(32))
    assert torch.equal(q.dequantize(), w)


def test_awq_scaled_layer_computes_the_same_product() -> None:
    w, x = layer(7, 24, 64)
    statistics = InputStatistics(64)
    statistics.update(x)
    q, c = calibrate.awq(
        w, statistics.hessian, mean_abs=statistics.mean_abs, group_size=32, optimal_scales=True
    )
    assert not torch.equal(c, torch.ones(64))
    exact, got = x @ w.T, (x / c) @ q.dequantize().T
    plain = x @ calibrate.mse(w, group_size=32).dequantize().T
    assert float((got - exact).norm()) < float((plain - exact).norm())


def test_error_metrics() -> None:
    w = torch.tensor([[3.0, 4.0]])
    metrics = calibrate.quantization_error(
        w, torch.tensor([[3.0, 3.5]]), torch.diag(torch.tensor([1.0, 0.0]))
    )
    assert metrics == (0.125, 0.1, 0.5, 20.0, 0.0)
    assert calibrate.quantization_error(w, w).sqnr_db == float("inf")
    x = torch.randn(100, 2)
    h, w_hat = hessian_of(x), w + 0.1
    expected = float((x @ (w - w_hat).T).norm() / (x @ w.T).norm())
    assert calibrate.quantization_error(w, w_hat, h).output == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", [calibrate.rtn, calibrate.mse])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_canonical_form(method: Callable[..., QuantizedWeight], bits: int, symmetric: bool) -> None:
    w = torch.randn(5, 64).to(torch.bfloat16)
    q = method(w, bits=bits, group_size=16, symmetric=symmetric)
    assert q.codes.shape == (5, 64)
    assert q.codes.dtype == (torch.int8 if symmetric else torch.uint8)
    assert q.scales.shape == (5, 4)
    assert (q.zeros is None) == symmetric
    assert float((q.dequantize() - w.float()).norm() / w.float().norm()) < {4: 0.11, 8: 0.006}[bits]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibrate.rtn(torch.zeros(8)), r"rtn: expected a weight \[N, K\], got .*\(8,\)"),
        (lambda: calibrate.mse(torch.zeros(2, 8), bits=3), "mse: bits=3; expected 4 or 8"),
        (
            lambda: calibrate.rtn(torch.zeros(2, 8), bits=8, symmetric=False),
            "rtn: 8-bit weights are symmetric",
        ),
        (lambda: calibrate.hqq(torch.zeros(2, 64), p=1.5), "hqq: p=1.5 is not between 0 and 1"),
        (
            lambda: calibrate.awq(torch.zeros(2, 8), torch.eye(8), steps=0),
            "awq: steps=0 leaves nothing to try",
        ),
    ],
)
def test_errors_name_the_values(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize(("symmetric", "act_order"), [(True, True), (False, False)])
def test_gptq_on_the_gpu_agrees_with_the_cpu(symmetric: bool, act_order: bool) -> None:
    torch.manual_seed(0)
    w, x = torch.randn(100, 512), torch.randn(2048, 512)
    h = x.T @ x
    how: dict[str, Any] = {"group_size": 64, "symmetric": symmetric, "act_order": act_order}
    here = gptq(w, h, **how).dequantize()
    there = gptq(w.cuda(), h.cuda(), **how).dequantize().cpu()
    assert ((here - there).abs() > 1e-3).float().mean() < 0.05
    errors = [float(output_error(q - w, h)) for q in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_error_of_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^quantization_error: w is \(2, 4\), .* \(4,\)"):
        calibrate.quantization_error(torch.ones(2, 4), torch.ones(4))


@pytest.mark.parametrize("how", [calibrate.rtn, calibrate.mse, calibrate.hqq])
def test_weights_without_rows(how: Callable[..., QuantizedWeight]) -> None:
    codes, scales, _ = how(torch.ones(0, 64), group_size=32)
    assert (codes.shape, scales.shape) == ((0, 64), (0, 2))
