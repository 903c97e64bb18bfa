// What weights take their scales by, or sums theirs, made once for a block: the warps beside the producer's
// read the scales of W's rows and leave in each stage of the ring what its consumers multiply by, a RowScale or
// a SumScale a row and group.
#pragma once
#include "hopper_scales.cuh"

// Neighbouring groups of a row that a lane reads at a time, as registers allow, and the tiles of K that have
// them
constexpr bool few_registers = num_stages < 4 || (producer_registers <= 40 && stage_rows > 64) ||
                               (has_zeros && sizeof(Zero) > 1);
constexpr bool wide = sizeof(Scale) > 2;
constexpr int of_run = wide && few_registers && stage_rows >= 256 ? 1
                       : wide || (flushes == 1 && few_registers)  ? 2
                                                                  : 4;
constexpr int of_stages = wide && block_k < 128 ? 2 * flushes : flushes;  // of two short ones
constexpr int run_groups = of_run > of_stages ? of_run : of_stages;
constexpr int run = run_groups / flushes;
static_assert(run <= num_stages, "barriers tell only a phase apart from the next");

// Scales or zero points of a row in a run, as stored
template <class T> struct GroupRun {
  static constexpr int count = (run_groups * sizeof(T) + 3) / 4;
  u32 words[count];

  __device__ __forceinline__ T at(int g) const {
    T v[4 / sizeof(T)];
    *reinterpret_cast<u32*>(v) = words[g * sizeof(T) / 4];
    return v[g % (4 / sizeof(T))];
  }
};
// Where they lie: W's scales or its zero points, values of row after row and group after group
struct GroupRows {
  int tiles_of_group, last;  // tiles of K, groups

  __device__ __forceinline__ explicit GroupRows(const Params& p) {
    // whole groups per tile or whole tiles per group: config.why_not_hopper
    const int k = int(p.k), group_size = int(p.group_size);
    tiles_of_group = flushes > 1 ? 1 : (min(group_size, k) + block_k - 1) / block_k;
    last = (k - 1) / group_size;
  }
  // Those of row n from a tile of K on
  template <class T>
  __device__ __forceinline__ void read(GroupRun<T>& to, const void* values, i64 row, i64 group,
                                       int n, int kt) const {
    constexpr int bytes = run_groups * sizeof(T);
    const T* at = static_cast<const T*>(values) + n * row;
    // neighbours, and all runs on their own multiples
    if (bytes % 4 == 0 && group == 1 && tiles_of_group == 1 && (last + 1) % run_groups == 0 &&
        (reinterpret_cast<i64>(values) | row * i64(sizeof(T))) % bytes == 0) {
      load_global(to.words, at + kt * flushes);
      return;
    }
    T v[GroupRun<T>::count * 4 / sizeof(T)];
    if constexpr (of_experts && run_groups % 2 == 0 && sizeof(T) <= 2) {  // two at a time
      struct __align__(2 * sizeof(T)) Two { T v[2]; };
      if (group == 1 && tiles_of_group == 1 && last % 2 == 1 &&
          (reinterpret_cast<i64>(values) | row * i64(sizeof(T))) % sizeof(Two) == 0) {
#pragma unroll
        for (int g = 0; g < run_groups; g += 2)
          reinterpret_cast<Two*>(v)[g / 2] =
              *reinterpret_cast<const Two*>(at + min(kt * flushes + g, last - 1));
#pragma unroll
        for (int w = 0; w < GroupRun<T>::count; ++w) to.words[w] = reinterpret_cast<u32*>(v)[w];
        return;
      }
    }
    // past the last group the sums are zero, and must meet a number
#pragma unroll
    for (int g = 0; g < run_groups; ++g)
      v[g] = at[min((kt * flushes + g) / tiles_of_group, last) * group];
#pragma unroll
    for (int w = 0; w < GroupRun<T>::count; ++w) to.words[w] = reinterpret_cast<u32*>(v)[w];
  }
};

// Scales for which one FMA is not exact become NaN
template <int pairs>
__device__ __forceinline__ void mark_lost(GroupRun<Scale> (&scales)[pairs][2]) {
  u32 lost = 0;
#pragma unroll
  for (int i = 0; i < pairs; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (u32 two : scales[i][h].words) lost |= lost_by_one_fma(two);
  if (lost & 0x7fff7fff)
#pragma unroll
    for (int i = 0; i < pairs; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (u32& two : scales[i][h].words) {
          const u32 each = lost_by_one_fma(two);
          if (each & 0x7fff) two |= 0x7fff;
          if (each & 0x7fff0000) two |= 0x7fff0000;
        }
}

// Into the stages of all of a block's segments; each warp has every third run of tiles
constexpr int scale_warps = 3;
// At a stage: every lane of the warp whose it is, and one of each other
constexpr int scale_arrivals = 32 + scale_warps - 1;
__device__ __forceinline__ void make_row_scales(const Params& all, const Shares& shares,
                                                Ring ring) {
  constexpr int pairs = stage_rows / 64;  // of rows eight apart, of a lane
  int lane = threadIdx.x % 32;
  int turn = __shfl_sync(~0u, threadIdx.x / 32, 0) - 1;  // runs until its own
  bool waited = false;
  const GroupRows groups(all);
  Schedule schedule;
  int rest_row = shares.first_row_of_rest();
#pragma unroll 1
  for (Segment s; schedule.next(shares, s);) {
    int m0, n0;
    const int slot = shares.locate_slot(s.tile, m0, n0);
    decltype(auto) p = problem_of_slot(all, slot);
    s = s.of_block();
#pragma unroll 1
    for (int first = s.begin / run * run, end; first < s.end; first = end) {
      end = first + run;
      if (rest_by_k && first < shares.k_tiles) end = min(end, shares.k_tiles);
      if (rest_by_k && first == shares.k_tiles) rest_row += rest_rows;
      if (turn-- > 0) {
        // Arrives at each, so that none passes it by: it would wait for a phase that was over
#pragma unroll
        for (int t = 0; t < run; ++t) {
          if (first + t < s.begin || first + t >= min(end, s.end)) continue;
          barrier_wait(ring.empty(), ring.phase ^ 1);
          __syncwarp();
          if (lane == 0) barrier_arrive(ring.full());
          ring.advance();
        }
        continue;
      }
      turn = scale_warps - 1;
      pin(lane);  // else rows and addresses of all pairs are kept, for which there are no registers
      const int kt = place_of(first, shares.k_tiles);
      auto row = [&](int i, int h) {
        const int of_pair = i * 64 < block_n ? n0 + i * 64 : rest_row + i * 64 - block_n;
        return min(of_pair + lane / 8 * 16 + lane % 8 + h * 8, int(p.n) - 1);
      };
      if (!waited) {  // the first ones come into L2 while others may still write them
#pragma unroll
        for (int i = 0; i < pairs; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            prefetch_l2(static_cast<const Scale*>(p.scales) + row(i, h) * p.scale_row +
                        kt * flushes / groups.tiles_of_group * p.scale_group);
        wait_for_predecessors(), waited = true;
      }
      GroupRun<Scale> scales[pairs][2];
      GroupRun<Zero> zeros[pairs][2];
#pragma unroll
      for (int i = 0; i < pairs; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int n = row(i, h);
          groups.read(scales[i][h], p.scales, p.scale_row, p.scale_group, n, kt);
          if constexpr (has_zeros)
            groups.read(zeros[i][h], p.zeros, p.zero_row, p.zero_group, n, kt);
        }
      if constexpr (one_fma) mark_lost(scales);
      const int stop = rest_by_k ? min(end, s.end) : s.end;  // `end` would take a register
#pragma unroll
      for (int t = 0; t < run; ++t) {
        if (first + t < s.begin || first + t >= stop) continue;
        barrier_wait(ring.empty(), ring.phase ^ 1);
#pragma unroll
        for (int f = 0; f < flushes; ++f)
#pragma unroll
          for (int i = 0; i < pairs; ++i) {
            const int g = t * flushes + f;
            Staged rows[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const u32 word = scales[i][h].words[g * int(sizeof(Scale)) / 4];
              rows[h] = Staged(word, g, has_zeros ? zeros[i][h].at(g) : Zero());
            }
            store_row_scales(ring.data() + scales_at(f, i * 64) + lane * (2 * staged_bytes), rows);
          }
        barrier_arrive(ring.full());
        ring.advance();
      }
    }
  }
}
