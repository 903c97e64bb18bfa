// A tile of many tokens in groups, part by part: two accumulators take turns, and while one is emptied the
// tensor cores work on the other. The fragments of a tile of K are made once for all parts.
#pragma once
#include "hopper_scales.cuh"

// Sum a segment's k tiles, two an iteration: ptxas follows wgmma's registers from one to the other but not
// around the loop, where nothing is in flight. Past the end the last tile is multiplied by zero.
__device__ __forceinline__ void sum_parts(Ring& ring, const Segment& segment, int wg_row0, int lane,
                                          int warp, Sums& sum, Totals& total) {
  if (segment.begin >= segment.end) return;
  pin(lane);
  const Lane own(wg_row0, lane, warp);
  const int scales_of_lane = scales_at(0, wg_row0 + warp * 16 + lane / 4 * 2);
  SumScale scale[2];  // of the tile of K before this one, then of this one
  scale[0].values[0] = scale[1].values[0] = 0;
  // The first halves of two tiles' fragments take turns: the next ones are made while wgmma reads these.
  u32 first_half[2][2][4], second_half[2][4];
  const RowScale unscaled[kept_scales][row_scales][2];
  u32 data = ring.data(), full = ring.full();
  u64 x_tile = tile_descriptor(data);
  int words_at[steps];  // where a lane's words of a chunk lie in a stage
#pragma unroll
  for (int c = 0; c < steps; ++c) words_at[c] = x_bytes + own.place(c), pin(words_at[c]);
  auto make = [&](u32(&half)[2][4], const char* tile, int first_chunk) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      u32 made[turn_steps][4];
      own.fragments(made, own.load(tile + words_at[first_chunk + s]), unscaled, 0);
#pragma unroll
      for (int r = 0; r < 4; ++r) half[s][r] = made[0][r];
    }
  };
  auto tile_at = [&] { return static_cast<const char*>(__cvta_shared_to_generic(data)); };
  auto empty_part = [&](int part) {
#pragma unroll
    for (int e = 0; e < acc_values; ++e) {
      pin(sum.acc[part % 2][e]);
      total.acc[0][part * acc_values + e] +=
          scale[e % 4 / 2].values[0] * value(sum.acc[part % 2][e]);
    }
  };

  barrier_wait(full, ring.phase);
  const char* tile = tile_at();
  make(first_half[0], tile, 0);
  u32 previous = 0;  // the stage before this one, which wgmma may still be reading
  int kt = segment.begin;
  auto multiply_tile = [&](bool first) {
    const bool real = first || kt < segment.end, more = kt + 1 < segment.end;
    auto& these = first_half[first ? 0 : 1];
    const char* const this_tile = tile;
    const u32 empty = full + num_stages * 8;
    auto x_step = [x_tile](int part, int s) {
      return x_tile + (part * (block_m / parts) * 128 + s * 32) / 16;
    };
    const int step = more ? ring.step(1) : 0;
    ring.move(step);
    data += step * stage_bytes, full += step * 8, x_tile += i64(step * (stage_bytes / 16));
    auto multiply = [&](int part, int from, int to) {
#pragma unroll
      for (int s = from; s < to; ++s)
        wgmma(sum.acc[part % 2], s < 2 ? these[s] : second_half[s - 2], x_step(part, s), s > 0);
      wgmma_commit();
    };
    wgmma_fence();
    multiply(0, 0, 2);
    if (!first) wgmma_wait<1>();
    make(second_half, this_tile, 2);
    wgmma_fence();
    multiply(0, 2, 4);
    // Waits for nothing in the first tile; else ptxas, which forgets around the loop that the last part has
    // ended, would wait for all (C7517)
    wgmma_wait<2>();
    empty_part(parts - 1);
    load_row_scales(scale, this_tile + scales_of_lane);
    if (!real) scale[0].values[0] = scale[1].values[0] = 0;
    release(previous, threadIdx.x % 32, kt > segment.begin && real);
#pragma unroll
    for (int t = 1; t < parts; ++t) {
      wgmma_fence();
      multiply(t, 0, 4);
      wgmma_wait<1>();
      empty_part(t - 1);
    }
    barrier_wait(full, ring.phase);
    tile = tile_at();
    make(first_half[first ? 1 : 0], tile, 0);
    if (!first) wgmma_wait<0>();
    previous = empty;
    ++kt;
  };
#pragma unroll 1
  while (kt < segment.end) multiply_tile(true), multiply_tile(false);
  ring.advance();
  empty_part(parts - 1);
  release(previous, lane);
}
