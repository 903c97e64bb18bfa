"""What hopper.cu is told: how tiles are shared out, and which tile a problem gets."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from intlass_ops import config
from intlass_ops.config import hopper_tiles

H200 = config.device_of("sm_90a")
MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "h200-tiles.json"


def a_shape(x: str, w: str, m: int, n: int, k: int, group_size: int) -> config.Shape:
    return config.Shape(
        x_kind=x,
        w_kind=w,
        scale_type="float" if group_size == k else "__nv_bfloat16",
        zero_type="unsigned char",
        out_type="__nv_bfloat16",
        has_zeros=w == "u4",
        has_a_zero=False,
        aligned=True,
        m=m,
        n=n,
        k=k,
        group_size=group_size,
    )


def k_tiles_done(c: config.Hopper, m: int, n: int, k: int, sm_count: int) -> Counter[int]:
    """As the blocks' Schedule of hopper.cu goes: k tiles done of each tile."""
    (blocks, _, _) = c.grid(m, n, k, sm_count)
    _, _, k_tiles, whole, helpers, tail, each, extra = c.shares(m, n, k, blocks)
    done: Counter[int] = Counter()
    if c.rest_by_k:  # 64 rows each
        team = c.block_n // c.rest_rows
        for share in range(blocks):
            first = share * each + min(share, extra)
            end = (share + 1) * each + min(share + 1, extra)
            assert end - first <= k_tiles  # so it leaves no more than one piece
            done.update(whole * team + unit // k_tiles for unit in range(first, end))
        done.update(dict.fromkeys(range(whole * team), k_tiles))
        return done
    pieces = []
    for block in range(blocks):
        own, rank = divmod(block, c.cluster)

        def sum_up(tile: int, begin: int, end: int, rank: int = rank) -> None:
            stripe = -(-(end - begin) // c.split_k)
            first = min(begin + rank % c.split_k * stripe, end)
            done[tile * c.sharing + rank // c.split_k] += min(first + stripe, end) - first

        for tile in range(own, whole, blocks // c.cluster):
            sum_up(tile, 0, k_tiles)
        if tail and own >= helpers:
            sum_up(whole + own - helpers, 0, k_tiles - tail)
        elif tail:
            unit = own * each + min(own, extra)
            end = (own + 1) * each + min(own + 1, extra)
            while unit < end:
                step = min(tail - unit % tail, end - unit)
                begin = k_tiles - tail + unit % tail
                sum_up(whole + unit // tail, begin, begin + step)
                pieces.append((own + unit // tail) * c.cluster + rank)
                unit += step
    assert len(set(pieces)) == len(pieces)
    assert all(piece < blocks for piece in pieces)
    return done


@settings(max_examples=40)
@given(st.integers(17, 3000), st.integers(1, 30000), st.integers(1, 9000), st.integers(4, 150))
def test_every_k_tile_is_summed_once(m: int, n: int, k: int, sm_count: int) -> None:
    device = dataclasses.replace(H200, sm_count=sm_count)
    shapes = a_shape("s8", "s8", m, n, k, k), a_shape("bf16", "s4", m, n, k, 128)
    for c, _ in itertools.chain(*(config.hopper_candidates(device, shape) for shape in shapes)):
        done = k_tiles_done(c, m, n, k, sm_count)
        tiles = -(-n // c.rest_rows) if c.rest_by_k else c.tiles(m, n)
        assert set(done) == set(range(tiles))
        assert set(done.values()) == {-(-k // c.block_k)}


def test_the_pick_is_close_to_the_best_tile_measured() -> None:
    losses = []
    measured = json.loads(MEASURED.read_text())
    columns = measured["columns"]
    for p in measured["problems"]:
        group_size = p["k"] if p["group_size"] == "channel" else p["group_size"]
        shape = a_shape(p["activations"], p["weights"], p["m"], p["n"], p["k"], group_size)
        c = config.pick(H200, shape)
        assert isinstance(c, config.Hopper)
        how = ["block_m", "tiles_n", "consumers", "stream_k", "split_k", "num_stages", "in_turns"]
        how += ["share_x", "share_w", "by_stages"]  # before there was rest_by_k
        places = [columns.index(name) for name in how]
        times = {tuple(t[i] for i in places): t[0] for t in p["tiles"]}
        tile = tuple(int(getattr(c, name)) for name in how)
        if tile in times:  # tiles of a hopeless prediction were not measured
            losses.append(times[tile] / min(times.values()))
    assert len(losses) > 120
    assert sum(losses) / len(losses) < 1.02


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"aligned": False}, "rows do not start on 16-byte boundaries"),
        ({"apart": False}, "rows overlap, which TMA does not take"),
        ({"has_a_zero": True}, "activations with a zero point need row sums of W"),
        ({"group_size": 48}, "group_size=48 is neither 16, 32, 64 nor a multiple of 128"),
        (
            {"group_size": 16, "out_type": "float"},
            "group_size=16 is neither 32, 64 nor a multiple of 128",
        ),
        ({"x_kind": "s8", "w_kind": "s8"}, "INT8 weights under INT8 activations have one scale"),
    ],
)
def test_what_it_refuses_goes_to_the_portable_kernel(change: dict[str, object], said: str) -> None:
    shape = dataclasses.replace(a_shape("bf16", "s4", 64, 256, 768, 128), **change)  # type: ignore[arg-type]
    assert said in (config.why_not_hopper(H200, shape) or "")
    assert isinstance(config.pick(H200, shape), config.Gemm)
    assert said in config.reason(H200, shape)


def test_older_gpus_take_the_portable_kernel() -> None:
    shape = a_shape("bf16", "s4", 64, 256, 768, 128)
    assert isinstance(config.pick(config.device_of("sm_86"), shape), config.Gemm)
    assert isinstance(config.pick(config.without_wgmma(H200), shape), config.Gemm)
    assert "sm_86 has no wgmma" in config.reason(config.device_of("sm_86"), shape)


def test_many_tokens_in_groups_are_multiplied_part_by_part() -> None:
    """Where registers allow: without zero points, and in groups of whole tiles of K."""
    c = config.pick(H200, a_shape("s8", "s4", 2048, 28672, 4096, 128))
    assert isinstance(c, config.Hopper)
    assert (c.block_m, c.parts, c.wgmma) == (256, 4, ("s8", 64))
    for w, group_size in (("u4", 128), ("s4", 64), ("s4", 4096)):
        tiles = config.hopper_candidates(H200, a_shape("s8", w, 2048, 28672, 4096, group_size))
        assert {c.parts for c, _ in tiles} == {1}


def test_under_bf16_weights_take_scales_of_any_float_type() -> None:
    """Under fp16 they take its own alone. Few tokens may have sums that take them instead."""
    for scale_type, w, group_size in itertools.product(
        ("__half", "float"), ("s4", "u4", "s8"), (32, 128)
    ):
        shape = dataclasses.replace(
            a_shape("bf16", w, 512, 4096, 4096, group_size), scale_type=scale_type
        )
        tiles = [c for c, _ in config.hopper_candidates(H200, shape)]
        assert {c.grouping for c in tiles if c.block_m > 128} <= {config.Grouping.SCALED_WEIGHTS}
        assert not any(c.needs_token_sums for c in tiles)
        of_sums = any(c.grouping != config.Grouping.SCALED_WEIGHTS for c in tiles)
        assert of_sums == (w != "u4" and group_size == 128)
        # four bytes for a row and group: both numbers that the scale is split into
        assert {c.staged_bytes for c in tiles} == {8 if w == "u4" else 4}
        for change in ({"x_kind": "fp16"}, {"out_type": "float"}):
            other = dataclasses.replace(shape, **change)
            if change == {"x_kind": "fp16"}:
                other = dataclasses.replace(other, scale_type="float")
            found = {c.grouping for c, _ in config.hopper_candidates(H200, other)}
            assert config.Grouping.SCALED_WEIGHTS not in found


def test_tables_say_nothing_of_scales_that_are_split() -> None:
    """They were measured with scales of bf16, which take an instruction where these take three."""
    h200 = dataclasses.replace(H200, name="NVIDIA H200")
    shape = a_shape("bf16", "s4", 64, 28672, 4096, 128)
    halves = dataclasses.replace(shape, scale_type="__half")
    if config.reason(h200, shape).startswith("tuned"):
        assert not config.reason(h200, halves).startswith("tuned")
    few = dataclasses.replace(halves, m=1)  # whose sums take either
    assert config.pick(h200, few).entry == config.pick(h200, dataclasses.replace(shape, m=1)).entry


def test_few_tokens_have_sums_that_take_scales_which_would_be_split() -> None:
    for m, of_sums in ((32, True), (64, True), (256, False), (2048, False)):
        shape = dataclasses.replace(a_shape("bf16", "s4", m, 28672, 4096, 128), scale_type="__half")
        c = config.pick(H200, shape)
        assert isinstance(c, config.Hopper)
        assert (c.grouping != config.Grouping.SCALED_WEIGHTS) == of_sums


def test_groups_of_16_are_for_weights_that_take_scales() -> None:
    shape = dataclasses.replace(a_shape("bf16", "s8", 64, 4096, 4096, 16), scale_type="float")
    assert isinstance(config.pick(H200, shape), config.Hopper)
    assert config.why_not_hopper(H200, dataclasses.replace(shape, out_type="float")) is not None


def test_stages_of_256_k_have_whole_groups() -> None:
    for x, group_size, found in (
        ("bf16", 128, True),
        ("bf16", 256, True),
        ("bf16", 64, False),
        ("bf16", 384, False),
        ("s8", 4096, True),
    ):
        tiles = [
            c
            for c, _ in config.hopper_candidates(H200, a_shape(x, "s4", 32, 4096, 4096, group_size))
        ]
        assert any(c.block_k == 256 for c in tiles) == found
        # one is given back after the next one has come
        assert all(c.num_stages >= 2 * c.consumers for c in tiles if c.by_stages)


@pytest.mark.parametrize("m", [2048, 512])
def test_many_tokens_of_small_groups_come_in_stages_of_64_k(m: int) -> None:
    """Others are bound by decoding: half as much for twice as many tokens a tile."""
    for x, w, scale_type, group_size, short in (
        ("bf16", "u4", "__nv_bfloat16", 32, True),
        ("bf16", "u4", "__nv_bfloat16", 64, True),
        ("bf16", "s4", "__half", 32, True),
        ("fp16", "s4", "__half", 32, True),
        ("bf16", "s8", "float", 16, True),
        ("bf16", "s4", "__nv_bfloat16", 128, False),
        ("bf16", "u4", "__half", 128, False),
        ("s8", "s4", "__nv_bfloat16", 32, False),
    ):
        shape = a_shape(x, w, m, 4096, 4096, group_size)
        own = "__half" if x == "fp16" else "__nv_bfloat16"
        c = config.pick(H200, dataclasses.replace(shape, scale_type=scale_type, out_type=own))
        assert isinstance(c, config.Hopper)
        assert (c.block_k == 64) == short
        if short:
            assert c.block_m == 256
            assert c.num_stages >= 3


def test_what_holds_for_any_number_of_tokens_is_found_once() -> None:
    """A server meets a new one with each prompt."""
    hopper_tiles._of_any_m.cache_clear()
    for m in range(17, 300):
        config.pick(H200, a_shape("bf16", "s4", m, 4096, 5120, 128))
    assert hopper_tiles._of_any_m.cache_info().misses == 1


def test_no_tokens_are_loaded_that_there_are_none_of() -> None:
    c = config.pick(H200, a_shape("s8", "s8", 20, 4096, 4096, 4096))
    assert isinstance(c, config.Hopper)
    assert (c.block_m, c.x_rows(20), c.x_rows(24), c.x_rows(25)) == (32, 24, 24, 32)
    assert dataclasses.replace(c, block_m=64, share_x=2).x_rows(20) == 32


def test_int4_activations_come_in_order_where_rows_are_whole_vectors() -> None:
    c = config.pick(H200, a_shape("s8", "s4", 64, 4096, 4096, 128))
    assert isinstance(c, config.Hopper)
    for k, aligned, ordered in ((4096, True, True), (4112, True, False), (4096, False, False)):
        same = config.in_lane_order(c, k, aligned)
        assert same == dataclasses.replace(c, lane_order=ordered)
    portable = config.pick(config.device_of("sm_86"), a_shape("s8", "s4", 64, 4096, 4096, 128))
    assert config.in_lane_order(portable, 4096, True) is portable


def test_few_int4_activations_are_widened_by_blocks_of_one_warp() -> None:
    """For which there is room beside a tile of hopper.cu: its 1024 registers more."""
    few, many = (config.pick_widen(H200, "s4", True, m, 2048, True) for m in (512, 1024))
    assert few.threads == 32
    assert few.grid(512, 2048) == (512, 4, 1)
    assert many.threads == 128
