// A tile of many tokens in groups, part by part: two accumulators take turns, and while one is emptied the
// tensor cores work on the other. The fragments of a tile of K are made once for all parts.
#pragma once
#include "hopper_scales.cuh"

// Sum a segment's k tiles, two an iteration: ptxas follows wgmma's registers from one to the other but not
// around the loop, where nothing is in flight. Past the end the last tile is multiplied by zero.
__device__ __forceinline__ void sum_parts(const Params& p, Ring& ring, const Segment& segment,
                                          i64 row0, int wg_row0, int lane, int warp, Sums& sum,
                                          Totals& total) {
  if (segment.begin >= segment.end) return;
  pin(lane);
  const Lane own(wg_row0, lane, warp);
  // Scales of the thread's two rows: where they lie, and those of the next tile of K as stored
  const int tiles_per_group = int((min(p.group_size, p.k) + block_k - 1) / block_k);
  int tiles_left = tiles_per_group - segment.begin % tiles_per_group;
  const i64 row = min(row0 + lane / 4, p.n - 1);
  const Scale* scale_at = static_cast<const Scale*>(p.scales) + row * p.scale_row +
                          segment.begin / tiles_per_group * p.scale_group;
  const int to_second = int((min(row0 + lane / 4 + 8, p.n - 1) - row) * p.scale_row);
  Scale next[2];
  auto read_scales = [&] { next[0] = scale_at[0], next[1] = scale_at[to_second]; };
  read_scales();
  float before[2], scale[2] = {0, 0};  // of the tile of K before this one, and of this one
  u32 a[steps][4];
  const RowScale unscaled[row_scales][2];
  u32 data = ring.data(), full = ring.full();
  u64 x_tile = tile_descriptor(data);
  auto tile_at = [&] { return static_cast<const char*>(__cvta_shared_to_generic(data + x_bytes)); };
  auto make = [&](const Chunk& raw, int c) {
    u32 made[turn_steps][4];
    own.fragments(made, raw, unscaled);
#pragma unroll
    for (int r = 0; r < 4; ++r) a[c][r] = made[0][r];
  };
  auto empty_part = [&](int part, const float (&s)[2]) {
#pragma unroll
    for (int e = 0; e < acc_values; ++e) {
      pin(sum.acc[part % 2][e]);
      total.acc[0][part * acc_values + e] += s[e % 4 / 2] * value(sum.acc[part % 2][e]);
    }
  };

  barrier_wait(full, ring.phase);
  const char* tile = tile_at();
  make(own.load(tile, 0, 0), 0), make(own.load(tile, 0, 1), 1);
  u32 previous = 0;  // the stage before this one, which wgmma may still be reading
  int kt = segment.begin;
  // 0, but ptxas does not know: were it certain that a part starts at zero, it would convert up to 31 sums in
  // place before the first FMA. Now the two take turns. With a residual there are no registers for it.
  const u32 goes_on = Config::residual ? 0 : blockIdx.z;
  auto multiply_tile = [&](bool first) {
    const bool real = first || kt < segment.end, more = kt + 1 < segment.end;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      before[h] = scale[h];
      scale[h] = real ? in_units_of_scale(next[h]) * code_unit : 0.f;
    }
    if (more && --tiles_left == 0) tiles_left = tiles_per_group, scale_at += p.scale_group;
    read_scales();
    const char* const this_tile = tile;
    const u32 empty = full + num_stages * 8;
    auto x_step = [x_tile](int part, int s) {
      return x_tile + (part * (block_m / parts) * 128 + s * 32) / 16;
    };
    const int step = more ? ring.step(1) : 0;
    ring.move(step);
    data += step * stage_bytes, full += step * 8, x_tile += i64(step * (stage_bytes / 16));
    auto multiply = [&](int t, int from, int to) {
      wgmma_fence();
#pragma unroll
      for (int s = from; s < to; ++s) wgmma(sum.acc[t % 2], a[s], x_step(t, s), s > 0 || goes_on);
      wgmma_commit();
    };
    // A part goes in halves: between those of the first one, and after the first half of the last one has
    // ended, half of the fragments are made.
#pragma unroll
    for (int t = 0; t < parts; ++t) {
      if (t == 0) {
        if constexpr (Config::residual) {  // which needs the registers that words wait in
          multiply(t, 0, 2);
          if (!first) wgmma_wait<1>();
          make(own.load(this_tile, 0, 2), 2), make(own.load(this_tile, 0, 3), 3);
        } else {
          const Chunk third = own.load(this_tile, 0, 2), fourth = own.load(this_tile, 0, 3);
          multiply(t, 0, 2);
          if (!first) wgmma_wait<1>();
          make(third, 2), make(fourth, 3);
        }
        multiply(t, 2, 4);
        empty_part(parts - 1, before);
        release(previous, threadIdx.x % 32, kt > segment.begin && real);
      } else {
        multiply(t, 0, 2), multiply(t, 2, 4);
        wgmma_wait<2>();
        empty_part(t - 1, scale);
      }
      if (t + 1 == parts) {
        barrier_wait(full, ring.phase);
        tile = tile_at();
        wgmma_wait<1>();
        make(own.load(tile, 0, 0), 0), make(own.load(tile, 0, 1), 1);
        if (!first) wgmma_wait<0>();
      }
    }
    previous = empty;
    ++kt;
  };
#pragma unroll 1
  while (kt < segment.end) multiply_tile(true), multiply_tile(false);
  ring.advance();
  empty_part(parts - 1, scale);
  release(previous, lane);
}
