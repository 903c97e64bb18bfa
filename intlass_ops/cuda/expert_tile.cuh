// Tokens that are sorted by expert, in tiles: which expert a tile of a grouped GEMM has, and which tokens.
#pragma once
#include "memory.cuh"

// Expert e has the tokens from ends[e - 1] to ends[e] - 1, in as few tiles as hold them.
struct ExpertEnds {
  const void* ends;
  i64 experts, tokens, tile, bytes;  // tokens of all, and of a tile; bytes of a number

  __device__ __forceinline__ i64 end_of(i64 expert) const {
    if (expert < 0) return 0;
    if (expert >= experts) return tokens;  // no expert has those that come last
    return bytes == 8 ? static_cast<const i64*>(ends)[expert]
                      : static_cast<const int*>(ends)[expert];
  }
};

// `count` tokens from `first` on, none beyond the last tile
struct __align__(16) ExpertTile { int expert, first, count, unused; };
// Tokens that no expert has, whose outputs are 0; and what all are where `ends` cannot be: NaN
constexpr int no_expert = -1, bad_ends = -2;

// Tile `slot`, and how many there are. All lanes of a warp find it together.
__device__ __forceinline__ ExpertTile find_tile(const ExpertEnds& p, int slot, int& used) {
  const int lane = threadIdx.x % 32, tile = int(p.tile), tokens = int(p.tokens);
  ExpertTile found = {no_expert, 0, 0, 0};
  int before = 0;
  bool bad = false;
#pragma unroll 1
  for (int e0 = 0; e0 <= p.experts; e0 += 32) {
    const int e = e0 + lane;
    const i64 begin = p.end_of(e - 1), end = e <= p.experts ? p.end_of(e) : begin;
    bad |= begin < 0 || begin > end || end > tokens;
    const int own = int(max(end - begin, i64(0)) + tile - 1) / tile;
    int sum = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += other;
    }
    const int index = slot - (before + sum - own);
    const u32 owner = __ballot_sync(~0u, index >= 0 && index < own);
    if (owner) {
      const int from = __ffs(owner) - 1, first = int(begin) + index * tile;
      found.expert = e0 + from < p.experts ? e0 + from : no_expert;
      found.first = __shfl_sync(~0u, first, from);
      found.count = __shfl_sync(~0u, min(tile, int(end) - first), from);
    }
    before += __shfl_sync(~0u, sum, 31);
  }
  used = before;
  if (__any_sync(~0u, bad)) {
    used = (tokens + tile - 1) / tile;
    const int first = min(slot, used) * tile;
    found = {bad_ends, first, max(0, min(tile, tokens - first)), 0};
  }
  return found;
}
