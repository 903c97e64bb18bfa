// Grouped GEMMs: which expert's problem a block, or a tile of one, is part of.
#pragma once
#include "epilogue.cuh"

__device__ __forceinline__ ExpertTile load_tile(const ExpertTile* from) {
  ExpertTile t;
  asm volatile("ld.global.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(t.expert), "=r"(t.first), "=r"(t.count), "=r"(t.unused)
               : "l"(from));
  return t;
}

// The problem of one expert and some of its tokens
template <class Params>
__device__ __forceinline__ Params problem_of(const Params& all, const ExpertTile& tile) {
  static_assert(!Config::residual && !has_a_zero, "grouped GEMMs offer neither");
  Params p = all;
  const int expert = max(tile.expert, 0);
  auto moved = [](const void* from, i64 bytes) { return static_cast<const char*>(from) + bytes; };
  p.m = tile.count;
  p.x += tile.first * p.x_stride;
  p.w += expert * p.w_expert;
  p.scales = moved(p.scales, expert * p.scale_expert);
  if (has_zeros) p.zeros = moved(p.zeros, expert * p.zero_expert);
  if (p.bias) p.bias = moved(p.bias, expert * p.bias_expert);
  if (p.alpha) p.alpha = moved(p.alpha, expert * p.alpha_expert);
  if (p.a_scale) p.a_scale = static_cast<const float*>(p.a_scale) + tile.first * p.a_scale_row;
  p.out = static_cast<Out*>(p.out) + tile.first * p.n;
  return p;
}

// Whether no expert has the tokens, whose outputs in rows from n0 on are written then
template <int rows, int threads, class Params>
__device__ __forceinline__ bool belongs_to_none(const Params& p, const ExpertTile& tile, i64 n0,
                                                int thread) {
  if (tile.expert >= 0) return false;
  const float value = tile.expert == no_expert ? 0.f : __int_as_float(0x7fc00000);
#pragma unroll 1
  for (int i = thread; i < tile.count * rows; i += threads) {
    const i64 n = n0 + i % rows;
    if (n < p.n) store_rounded(static_cast<Out*>(p.out) + i / rows * p.n + n, value);
  }
  return true;
}

// Blocks that go from tile to tile (hopper.cu) ask anew wherever they need to know: what comes of it should
// take no registers in between. Without experts all of these are nothing.
template <class Params>
__device__ __forceinline__ decltype(auto) problem_of_slot(const Params& all, int slot) {
  if constexpr (of_experts)
    return problem_of(all, load_tile(all.tiles + slot));
  else
    return (all);
}
// From a row of W and a token of the problem to those of all
template <class Params>
__device__ __forceinline__ void place_among_all(const Params& all, int slot, int& m, int& n) {
  if constexpr (of_experts) {
    const ExpertTile tile = load_tile(all.tiles + slot);
    m += tile.first, n += max(tile.expert, 0) * int(all.n);
  }
}
template <int rows, int threads, class Params>
__device__ __forceinline__ bool slot_belongs_to_none(const Params& all, int slot, i64 n0,
                                                     int thread) {
  if constexpr (of_experts) {
    const ExpertTile tile = load_tile(all.tiles + slot);
    return belongs_to_none<rows, threads>(problem_of(all, tile), tile, n0, thread);
  }
  return false;
}
// How a problem's tiles are shared out, with as many tiles of tokens as there are
template <class Params, class Shares>
__device__ __forceinline__ decltype(auto) shares_of(const Params& all, const Shares& most) {
  if constexpr (of_experts) {
    wait_for_predecessors();
    Shares shares = most;
    shares.of_m = load_tile(all.tiles + most.of_m).count;
    shares.whole = shares.of_m * most.of_n;
    return shares;
  } else {
    return (most);
  }
}

// What a block computes where there is one for each tile of tokens and rows: the problem of its expert.
// Blocks of some tiles of tokens are neighbours, so that they share rows of W. Without experts it is the
// problem as given.
template <bool, class Params> struct OfBlock {
  const Params& p;
  template <int rows, int threads> __device__ __forceinline__ bool is_done(i64) const {
    return false;
  }
  __device__ __forceinline__ OfBlock anew(const Params&) const { return *this; }
};
template <class Params> struct OfBlock<true, Params> {
  ExpertTile tile;
  Params p;

  __device__ __forceinline__ OfBlock(const Params& all, const ExpertTile& tile)
      : tile(tile), p(problem_of(all, tile)) {}
  __device__ __forceinline__ OfBlock(const Params& all) : OfBlock(all, own_tile(all)) {}

  static __device__ __forceinline__ ExpertTile own_tile(const Params& all) {
    wait_for_predecessors();
    const u32 together = u32(all.together);
    return load_tile(all.tiles + blockIdx.z * together + blockIdx.x % together);
  }
  // What the main loop should keep in no registers
  __device__ __forceinline__ OfBlock anew(const Params& all) const {
    ExpertTile t = tile;
    asm volatile("" : "+r"(t.expert), "+r"(t.first), "+r"(t.count));
    return {all, t};
  }
  template <int rows, int threads> __device__ __forceinline__ bool is_done(i64 n0) const {
    return p.m == 0 || belongs_to_none<rows, threads>(p, tile, n0, threadIdx.x);
  }
};
// The block's tile of rows, or of rows and tokens
template <class Params> __device__ __forceinline__ u32 tile_of_block(const Params& p) {
  if constexpr (of_experts)
    return blockIdx.x / u32(p.together);
  else
    return blockIdx.x;
}
