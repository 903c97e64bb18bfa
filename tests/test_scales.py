"""Scale searches against brute force, and the contract of every quantiser in scales/."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from intlass_ops import block_quantize, fp4, reference, scales
from intlass_ops import scale_search as search

FP4_GRIDS = {"nvfp4": fp4.e4m3_grid(), "mxfp4": fp4.e8m0_grid()[:-2]}
GROUPS = {"nvfp4": 16, "mxfp4": 32, "int4": 16, "int8": 16, "uint4": 16}
NAIVE = {f: getattr(scales, f"{f}_naive") for f in GROUPS}
OPTIMAL = {f: getattr(scales, f"{f}_optimal") for f in GROUPS}
HESSIAN = {f: getattr(scales, f"{f}_optimal_hessian") for f in GROUPS}


def blocks(seed: int, count: int, g: int) -> Tensor:
    """Gaussian, heavy-tailed, one outlier, mostly zeros, repeated magnitudes, one sign."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, g, generator=rng)
    kind = torch.arange(count) % 6
    x[kind == 1] = x[kind == 1] ** 3
    x[kind == 2, 0] *= 40
    x[kind == 3, 2:] = 0
    x[kind == 4] = (x[kind == 4] * 4).round() / 8
    x[kind == 5] = x[kind == 5].abs() + 1
    return x * torch.rand(count, 1, generator=rng).mul(8).sub(4).exp2()


def gram(seed: int, g: int, rank: int | None = None) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(g, g, generator=rng, dtype=torch.float64) * 0.5 + torch.eye(g)
    x = torch.randn(rank or 4 * g, g, generator=rng, dtype=torch.float64) @ mix
    return x.T @ x


def rounded_by(x: Tensor, s: Tensor) -> Tensor:
    return s * fp4.decode_e2m1(fp4.encode_e2m1(x.double() / s), torch.float64)


def errors_of_grid(
    x: Tensor, grid: Tensor, weights: Tensor | None = None, hessian: Tensor | None = None
) -> Tensor:
    """[blocks, scales], the error of every scale; written without scale_search."""
    errors = []
    for s in grid:
        r = x.double() - rounded_by(x, s)
        if hessian is not None:
            errors.append(((r @ hessian) * r).sum(-1))
        else:
            errors.append((r * r if weights is None else weights * r * r).sum(-1))
    return torch.stack(errors, -1)


def stored_index(format_: str, stored: Tensor) -> Tensor:
    return torch.searchsorted(FP4_GRIDS[format_], fp4.scale_values(stored, torch.float64))


@pytest.mark.parametrize("format_", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("goal", ["plain", "weights", "hessian", "singular hessian"])
@settings(max_examples=6)
@given(seed=st.integers(0, 2**31))
def test_fp4_pruned_search_is_brute_force_on_every_block(
    format_: str, goal: str, seed: int
) -> None:
    g, grid = GROUPS[format_], FP4_GRIDS[format_]
    x = blocks(seed, 60, g)
    if goal == "plain":
        stored, _ = OPTIMAL[format_](x)
        errors = errors_of_grid(x, grid)
    elif goal == "weights":
        weights = torch.rand(g, generator=torch.Generator().manual_seed(seed)).double() ** 4
        weights[0] = 0
        stored, _ = OPTIMAL[format_](x, weights=weights)
        errors = errors_of_grid(x, grid, weights=weights)
    else:
        h = gram(seed, g, rank=g // 2 if goal == "singular hessian" else None)
        stored, _ = HESSIAN[format_](x, hessian=h[None])
        errors = errors_of_grid(x, grid, hessian=h)
    chosen, best = stored_index(format_, stored).squeeze(-1), errors.argmin(-1)
    if goal in ("plain", "weights"):
        assert torch.equal(chosen, best)
    # Two scales may stand for the same numbers. Their errors are one number that a matrix product
    # rounds either way, so that either may come first.
    found, wanted = (rounded_by(x, grid[index][:, None]) for index in (chosen, best))
    assert torch.equal(found, wanted)


def test_fp4_pruning_prunes() -> None:
    """The bounds leave few of the 126 e4m3 scales for Gaussian blocks, but more than one."""
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(1)).double()
    grid = fp4.e4m3_grid()
    s0 = fp4.encode_e4m3(x.abs().amax(-1) / 6).double()[:, None]
    budget = search.block_error(x - s0 * fp4.round_e2m1(x / s0))
    low, high = search.scale_bounds(x, budget, 6.0, 0.25)
    tried = ((grid >= low[:, None]) & (grid <= high[:, None])).sum(-1).double()
    assert 1 < tried.mean() < 20


def test_mxfp4_best_scale_may_be_neither_naive_nor_its_double() -> None:
    w = torch.full((1, 32), 0.2)
    w[0, 0] = 4.0
    # naive: 1, which rounds all the small ones to 0; half of it clips 4 to 3 and keeps them
    assert fp4.scale_values(scales.mxfp4_naive(w)[0]).item() == 1.0
    assert fp4.scale_values(scales.mxfp4_optimal(w)[0]).item() == 0.5


def interval_optimum(
    x: Tensor, qmin: int, qmax: int, weights: Tensor | None = None, hessian: Tensor | None = None
) -> float:
    """Least error of one block over all scales: the best of each interval of constant codes."""
    x = x.double()
    metric = torch.diag(torch.ones_like(x) if weights is None else weights)
    metric = metric if hessian is None else hessian
    k = torch.arange(max(-qmin, qmax), dtype=torch.float64) + 0.5
    edges = (x.abs()[:, None] / k).flatten()
    edges = edges[edges > 0].unique()
    low = torch.cat([torch.zeros(1), edges])
    high = torch.cat([edges, 4 * edges[-1:]])
    wide = high - low > 2.0**-23 * high  # else no float32 scale lies between
    low, high = low[wide], high[wide]
    q = (x / (0.5 * (low + high))[:, None]).round().clamp(qmin, qmax)  # [intervals, g]
    s = (q @ metric @ x) / ((q @ metric) * q).sum(-1)
    s = torch.where(s.isfinite(), torch.minimum(torch.maximum(s, low), high), high)
    r = torch.cat([x[None], x - s[:, None] * q])  # without a scale everything is left
    return float(((r @ metric) * r).sum(-1).min())


def integer_case(format_: str, x: Tensor, **goal: Tensor) -> tuple[Tensor, Tensor]:
    """Dequantised float64 blocks and their residuals from the format's optimal quantiser."""
    f = HESSIAN[format_] if "hessian" in goal else OPTIMAL[format_]
    s, *z, q = f(x, **goal)
    zero = z[0].double() if z else 0.0
    deq = (q.double() - zero) * s.double()
    return deq, x.double() - deq


@pytest.mark.parametrize("format_", ["int4", "uint4", "int8"])
@pytest.mark.parametrize("goal", ["plain", "weights", "hessian", "singular hessian"])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**31))
@example(seed=14266)  # breakpoints that coincide
@example(seed=58)  # that coincide but for rounding
@example(seed=102)  # an optimum at the edge of an interval
def test_integer_optimum_is_that_of_every_interval(format_: str, goal: str, seed: int) -> None:
    g = 8
    x = blocks(seed, 6, g)[seed % 6][None]
    given_goal: dict[str, Tensor] = {}
    metric: dict[str, Tensor] = {}
    if goal == "weights":
        metric["weights"] = torch.rand(g, generator=torch.Generator().manual_seed(seed)).double()
        given_goal = metric
    elif goal != "plain":
        metric["hessian"] = gram(seed, g, rank=g // 2 if goal == "singular hessian" else None)
        given_goal = {"hessian": metric["hessian"][None]}
    _, r = integer_case(format_, x, **given_goal)
    error = float(search.block_error(r, **metric))
    qmax = {"int4": 7, "int8": 127}.get(format_, 0)
    ranges = [(-qmax, qmax)] if qmax else [(-z, 15 - z) for z in range(16)]
    least = min(interval_optimum(x[0], low, high, **metric) for low, high in ranges)
    size = float(search.block_error(x.double(), **metric))
    # float32 scales: an error of 2^-24·s on every code, to first order in a residual of that size
    slack = 1e-6 * (least * size) ** 0.5 + 1e-12 * size
    assert error <= least + slack
    if goal in ("plain", "weights"):
        assert error >= least - slack


@pytest.mark.parametrize("format_", ["int4", "int8"])
def test_no_scale_of_a_dense_grid_beats_the_optimum(format_: str) -> None:
    x = blocks(3, 30, 16)
    _, r = integer_case(format_, x)
    error = search.block_error(r)
    qmax = {"int4": 7, "int8": 127}[format_]
    for factor in torch.linspace(0.2, 3.0, 3000, dtype=torch.float64):
        s = factor * x.double().abs().amax(-1, keepdim=True) / qmax
        q = (x / s).round().clamp(-qmax, qmax)
        assert (search.block_error(x - s * q) >= error * (1 - 1e-6)).all()


@given(seed=st.integers(0, 2**31), z=st.integers(0, 15), weighted=st.booleans())
def test_scale_bounds_hold_for_every_better_scale(seed: int, z: int, weighted: bool) -> None:
    x = blocks(seed, 6, 16).double()
    rng = torch.Generator().manual_seed(seed)
    w = torch.rand(16, generator=rng, dtype=torch.float64) if weighted else None
    limit = torch.where(x >= 0, 15.0 - z, float(z)).double()
    s0 = (x.amax(-1) - x.amin(-1))[:, None] / 15

    def error(s: Tensor) -> Tensor:
        q = torch.maximum(torch.minimum((x.abs() / s).round(), limit), torch.zeros(()))
        return search.block_error(x.abs() - s * q, w)

    budget = error(s0)
    low, high = search.scale_bounds(x, budget, limit, 0.5, w)
    for s in torch.logspace(-2, 1.5, 400, dtype=torch.float64)[:, None, None] * s0:
        better = error(s) <= budget
        assert (s.squeeze(-1) >= low)[better].all()
        assert (s.squeeze(-1) <= high)[better].all()


@pytest.mark.parametrize("format_", list(GROUPS))
def test_each_goal_is_best_at_its_own_measure(format_: str) -> None:
    g = GROUPS[format_]
    w = blocks(5, 64, 4 * g)
    x = torch.randn(256, 4 * g) @ (torch.randn(4 * g, 4 * g) / g**0.5 + torch.eye(4 * g))
    deq = {
        "naive": NAIVE[format_](w, -1, True, group_size=g)[-1],
        "sse": OPTIMAL[format_](w, -1, True, group_size=g)[-1],
        "hessian": HESSIAN[format_](w, -1, True, X=x, group_size=g)[-1],
    }
    r = {name: (w - d).double().view(64, 4, g) for name, d in deq.items()}
    sse = {name: search.block_error(v) for name, v in r.items()}
    h = scales.block_hessians(x, g)
    out = {name: torch.einsum("njg,jgh,njh->nj", v, h, v) for name, v in r.items()}
    assert (sse["sse"] <= sse["naive"] * (1 + 1e-5)).all()
    assert (out["hessian"] <= out["naive"] * (1 + 1e-5)).all()
    assert sse["sse"].sum() < sse["hessian"].sum()
    assert out["hessian"].sum() < out["sse"].sum() < out["naive"].sum()


@pytest.mark.parametrize("format_", list(GROUPS))
@pytest.mark.parametrize("kind", [NAIVE, OPTIMAL])
def test_dim_strides_and_dtype(
    format_: str, kind: dict[str, Callable[..., tuple[Tensor, ...]]]
) -> None:
    g = GROUPS[format_]
    w = blocks(7, 6, 2 * g).view(2, 3, 2 * g).to(torch.bfloat16)
    *parts, codes, dequant = kind[format_](w, -1, True, group_size=g)
    assert parts[0].shape == (2, 3, 2)
    assert codes.shape == dequant.shape == w.shape
    assert dequant.dtype == w.dtype
    *parts_t, codes_t, dequant_t = kind[format_](w.movedim(-1, 0), 0, True, group_size=g)
    for a, b in zip([*parts, codes, dequant], [*parts_t, codes_t, dequant_t], strict=True):
        raw_a, raw_b = (t.view(torch.uint8) if t.element_size() == 1 else t for t in (a, b))
        assert torch.equal(raw_a, raw_b.movedim(0, -1))


@pytest.mark.parametrize("format_", list(GROUPS))
@pytest.mark.parametrize("kind", [NAIVE, OPTIMAL, HESSIAN])
def test_zero_and_non_finite_blocks(
    format_: str, kind: dict[str, Callable[..., tuple[Tensor, ...]]]
) -> None:
    g = min(GROUPS[format_], 16) if kind is HESSIAN else GROUPS[format_]
    w = blocks(9, 5, g)
    w[1], w[2, 0], w[3, 1] = 0.0, torch.nan, torch.inf
    more = {"hessian": gram(1, g)[None]} if kind is HESSIAN else {}
    s, *_, deq = kind[format_](w, -1, True, group_size=g, **more)
    s = fp4.scale_values(s).squeeze(-1)
    assert s[1] == 1
    assert (deq[1] == 0).all()
    assert not s[2:4].isfinite().any()
    assert not deq[2:4].isfinite().all(-1).any()
    assert deq[[0, 4]].isfinite().all()
    clean, *_, clean_deq = kind[format_](w[[0, 4]], -1, True, group_size=g, **more)
    assert torch.equal(s[[0, 4]], fp4.scale_values(clean).squeeze(-1))
    assert torch.equal(deq[[0, 4]], clean_deq)


@pytest.mark.parametrize("format_", list(GROUPS))
def test_what_the_format_holds_comes_back_exactly(format_: str) -> None:
    g = GROUPS[format_]
    rng = torch.Generator().manual_seed(0)
    if format_.endswith("fp4"):
        codes = torch.randint(0, 16, (40, g), generator=rng)
        codes[:, 0] = 7
        w = fp4.decode_e2m1(codes) * 2.0 ** torch.randint(-6, 6, (40, 1), generator=rng)
    else:
        low, high = {"int4": (-7, 7), "int8": (-127, 127), "uint4": (-5, 10)}[format_]
        w = torch.randint(low, high + 1, (40, g), generator=rng).float()
        w[:, 0], w[:, 1] = high, low
        w *= 2.0 ** torch.randint(-60, 60, (40, 1), generator=rng)
    for kind in (NAIVE, OPTIMAL):
        assert torch.equal(kind[format_](w, -1, True)[-1], w)


def test_nvfp4_global_scale_keeps_tiny_tensors() -> None:
    w = blocks(2, 200, 16) * 1e-6
    g = scales.nvfp4_global_scale(w)
    s, q, deq = scales.nvfp4_optimal(w, -1, True, global_scale=g)
    assert float((w - deq).norm() / w.norm()) < 0.11
    assert torch.equal(scales.nvfp4_dequantize(s, q, global_scale=g), deq)
    assert float(fp4.scale_values(scales.nvfp4_naive(w, global_scale=g)[0]).max()) == 448
    # without it the smallest e4m3 serves: coarse, but a scale is never zero
    s, _ = scales.nvfp4_naive(w)
    assert (fp4.scale_values(s)[(w != 0).any(-1)] == 2.0**-9).all()
    assert scales.nvfp4_global_scale(torch.zeros(4)) == 1.0


def test_mxfp4_covers_the_range_of_float32() -> None:
    tiny, huge = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    w = torch.linspace(-1, 1, 32) * torch.tensor([[huge], [tiny], [2.0**-149 * 40]])
    for f in (scales.mxfp4_naive, scales.mxfp4_optimal):
        s, _, deq = f(w, -1, True)
        assert deq.isfinite().all()
        assert int(s.view(torch.uint8).max()) <= 127 + 125
        assert float((deq.double() - w.double())[:2].norm() / w[:2].double().norm()) < 0.2


def test_int4_naive_is_the_reference_quantiser() -> None:
    w = blocks(4, 50, 32)
    s, q = scales.int4_naive(w)
    scale, _ = reference.quantization_parameters(w, 4, True)
    assert torch.equal(s, scale)
    assert torch.equal(q, reference.quantize(w, scale, None, 4, None))


def test_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w = blocks(6, 6, 32)
    h = torch.stack([gram(j, 16) for j in range(2)])
    weights = torch.rand(6, 32)
    calls = [
        lambda: scales.nvfp4_optimal(w, weights=weights),
        lambda: scales.int4_optimal(w, group_size=16, weights=weights),
        lambda: scales.uint4_optimal_hessian(w, group_size=16, hessian=h),
    ]
    whole = [f() for f in calls]
    monkeypatch.setattr(block_quantize, "_CHUNK_ELEMENTS", 1000)
    for a, b in zip(whole, (f() for f in calls), strict=True):
        assert all(
            torch.equal(fp4.scale_values(s), fp4.scale_values(t)) for s, t in zip(a, b, strict=True)
        )


@pytest.mark.parametrize("shape", [(0, 32), (3, 0, 32)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    for format_ in GROUPS:
        *_, codes = OPTIMAL[format_](torch.empty(shape), group_size=16)
        assert codes.shape == shape


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: scales.nvfp4_naive(torch.zeros(2, 24)),
            ValueError,
            r"nvfp4_naive: size 24 of dim=-1 is not a multiple of group_size=16",
        ),
        (
            lambda: scales.int4_optimal(torch.zeros(4, dtype=torch.int32)),
            TypeError,
            r"int4_optimal: expected a floating-point tensor .* got torch.int32 \(4,\)",
        ),
        (
            lambda: scales.mxfp4_optimal_hessian(torch.zeros(4, 32)),
            ValueError,
            "mxfp4_optimal_hessian: give either X or hessian",
        ),
        (
            lambda: scales.int8_optimal_hessian(torch.zeros(4, 32), X=torch.zeros(5, 16)),
            ValueError,
            r"int8_optimal_hessian: X has shape \(5, 16\); dim=-1 of w has 32",
        ),
        (
            lambda: scales.int4_optimal_hessian(torch.zeros(4, 32), hessian=torch.zeros(2, 16, 16)),
            ValueError,
            r"int4_optimal_hessian: hessian is \(2, 16, 16\), expected \(1, 32, 32\)",
        ),
        (
            lambda: scales.int4_optimal(torch.zeros(4, 8), weights=torch.full((8,), -2.0)),
            ValueError,
            "int4_optimal: weights must be >= 0, the smallest is -2.0",
        ),
        (
            lambda: scales.nvfp4_optimal(torch.zeros(4, 16), global_scale=0.0),
            ValueError,
            "nvfp4_optimal: global_scale=0.0 is not a positive number",
        ),
        (
            lambda: scales.int4_dequantize(torch.zeros(2, 3), torch.zeros(2, 16).int()),
            ValueError,
            "int4_dequantize: 3 blocks do not divide size 16 of dim=-1",
        ),
        (
            lambda: scales.int8_dequantize(torch.zeros(1, 2), torch.zeros(2, 16).int()),
            ValueError,
            r"int8_dequantize: scales has shape \(1, 2\), codes \(2, 16\); they must be the same",
        ),
        (
            lambda: scales.mxfp4_dequantize(torch.zeros(2, 2), torch.zeros(2, 16)),
            TypeError,
            "mxfp4_dequantize: codes has dtype float32; expected one of int8",
        ),
        (
            lambda: scales.int4_naive(torch.zeros(2, 16), dim=2),
            ValueError,
            r"int4_naive: dim=2 is none of a tensor of shape \(2, 16\)",
        ),
        (
            lambda: scales.uint4_optimal(torch.zeros(2, 16), weights=torch.ones(3, 16)),
            ValueError,
            r"uint4_optimal: weights is \(3, 16\), w \(2, 16\); it must broadcast",
        ),
    ],
)
def test_errors_name_the_values(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
