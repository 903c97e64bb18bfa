// Rotation and quantisation in one pass (formulas in fused_quantize.py) with Hopper's wgmma (sm_90a),
// for R = 32, 64, 128: x, seen as rows of R values, times h, both from shared memory.
//
// A block is a few teams of warpgroups. Each team takes units of x in turn, whenever it gets to them,
// through a ring of its own, so that one team's products run while others quantise; only h is common
// to all. A warpgroup multiplies 64 rows by `columns` of h at a time. h's columns are permuted such
// that a lane owns of its two rows a run of neighbouring products, as far as possible whole groups:
//
//        lane%4:  | 0        | 1          | 2           | 3            |
//        columns    0..run-1   run..2run-1  2run..3run-1  3run..4run-1    run = columns / 4
//
// `scope` says where the values that share a scale lie, as in rotate_quantize.cu: in a lane or a quad
// of lanes (`quads`), or in all of a unit (`block`). No others come here.
#include "hopper.cuh"
#include "rotate_codes.cuh"

constexpr int columns = Config::columns, run = columns / 4, octets = run / 8;
constexpr int teams = Config::teams, warpgroups = Config::warpgroups;  // of a team
constexpr int threads = 128 * warpgroups, warps = threads / 32;        // of a team
constexpr int rows = 64 * tiles * warpgroups, capacity = rows * (R / 32);
// Rows of up to 128 bytes, as wgmma takes them: those of R = 128 in two panels
constexpr int panel_row = R == 32 ? 64 : 128, panel = rows * panel_row, h_panel = R * panel_row;
constexpr int stage_bytes = rows * R * 2, h_at = teams * stages * stage_bytes;
// Tiles whose products a warpgroup holds at a time
constexpr int batch = scope == block ? tiles : columns < 64 ? 64 / columns : 1;
static_assert(sizeof(T) == 2 && R >= 32 && R <= 128, "see config/rotate_hopper.py");
static_assert(scope == quads || (scope == block && columns == R && integers), "see above");
static_assert(tiles % batch == 0, "whole batches");
extern __shared__ __align__(1024) char smem[];

// What generic stores and cp.async of this thread wrote, wgmma may read.
__device__ __forceinline__ void fence_for_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

using UnitsOfTeam = Units<capacity>;
__device__ __forceinline__ int place(int row, int chunk, int panel_bytes) {
  if constexpr (R == 32) return row * 64 + (chunk ^ (row >> 1 & 3)) * 16;
  return chunk / 8 * panel_bytes + row * 128 + ((chunk ^ row) & 7) * 16;
}
struct Layout {
  static constexpr int threads = ::threads, rows = ::rows, row_chunks = R / 8;
  static __device__ __forceinline__ int chunk_at(int row, int chunk) {
    return place(row, chunk, panel);
  }
};

__device__ __forceinline__ u64 descriptor(u32 at) {
  if constexpr (R > 32) return tile_descriptor(at);
  return u64(at >> 4 & 0x3fff) | u64(512 >> 4) << 32 | u64(2) << 62;  // a swizzle of 64 bytes
}
__device__ __forceinline__ u64 step_of(int s, int panel_bytes) {
  return (s / 4 * panel_bytes + s % 4 * 32) >> 4;
}

// h's columns as rows along k. A thread takes two rows of k, eight columns of them.
__device__ __forceinline__ void load_h(const Params& p, char* to) {
  const T* h = static_cast<const T*>(p.h);
  for (int i = threadIdx.x; i < R * R / 16; i += threads * teams) {
    const int k = i % 8 * 2 + i / R * 16, n = i / 8 % (R / 8) * 8;
    const uint4 a = *reinterpret_cast<const uint4*>(h + k * R + n);
    const uint4 b = *reinterpret_cast<const uint4*>(h + (k + 1) * R + n);
    const u32 upper[4] = {a.x, a.y, a.z, a.w}, lower[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int column = (n + e) % columns, t = column / run, v = column % run;
      const int row = n / columns * columns + v / 2 * 8 + t * 2 + v % 2;
      *reinterpret_cast<u32*>(to + place(row, k / 8, h_panel) + k % 8 * 2) =
          __byte_perm(upper[e / 2], lower[e / 2], e % 2 ? 0x7632 : 0x5410);
    }
  }
  fence_for_wgmma();
  __syncthreads();
}

// A thread's products of two rows, lane / 4 and eight further on; value i of its run
using Acc = float[columns / 2];
__device__ __forceinline__ float value(const Acc& v, int half, int i) {
  return v[i / 2 * 4 + half * 2 + i % 2];
}

// The scale of each of a lane's groups, or its part of one
constexpr int near = scope == quads ? Config::group_size : run;
constexpr int part = near < run ? near : run, groups = run / part;
constexpr int group_lanes = scope == quads ? near / part : 1;
static_assert(group_lanes <= 4 && part % 8 == 0, "a group lies in one quad of lanes");

__device__ __forceinline__ float stat_of(const Acc& v, int half, int from) {
  const float first = value(v, half, from);
  float stat = quest ? first * first : fabsf(first);
#pragma unroll
  for (int i = from + 1; i < from + part; ++i) {
    const float x = value(v, half, i);
    stat = quest ? __fmaf_rn(x, x, stat) : Combine()(stat, fabsf(x));
  }
  return stat;
}
__device__ __forceinline__ float sum_of(const Acc& v, int half, int from) {
  float sum = value(v, half, from);
#pragma unroll
  for (int i = from + 1; i < from + part; ++i) sum += value(v, half, i);
  return sum;
}
__device__ __forceinline__ float squared_distance(const Acc& v, int half, int from, float mean) {
  float squares = 0.f;
#pragma unroll
  for (int i = from; i < from + part; ++i) {
    const float d = value(v, half, i) - mean;
    squares = __fmaf_rn(d, d, squares);
  }
  return squares;
}

// Mean squared distance from the mean, in `of[half]`; if lanes share groups, in of[0] that of one row:
// see `share`. A difference of sums, unless it cancels.
__device__ __forceinline__ void variances(float (&of)[2], const Acc& v, int from, bool odd) {
  constexpr int count = group_lanes == 1 ? 2 : 1;
  float sums[2] = {sum_of(v, 0, from), sum_of(v, 1, from)};
  float squares[2] = {stat_of(v, 0, from), stat_of(v, 1, from)};
  if constexpr (group_lanes > 1) {
    sums[0] = share<group_lanes>(sums, odd, Sum());
    squares[0] = share<group_lanes>(squares, odd, Sum());
  }
  bool cancels = false;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const float mean = sums[i] * (1.f / near), square = squares[i] * (1.f / near);
    of[i] = __fmaf_rn(-mean, mean, square);
    cancels |= of[i] < .25f * square;
  }
  if (!__any_sync(~0u, cancels)) return;
  float means[2] = {sums[0] * (1.f / near), sums[1] * (1.f / near)};
  if constexpr (group_lanes > 1) {
    const float own = means[0], other = __shfl_xor_sync(~0u, own, 1);
    means[0] = odd ? other : own, means[1] = odd ? own : other;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) squares[half] = squared_distance(v, half, from, means[half]);
  if constexpr (group_lanes > 1) squares[0] = share<group_lanes>(squares, odd, Sum());
#pragma unroll
  for (int i = 0; i < count; ++i) of[i] = squares[i] * (1.f / near);
}

// Where a lane's run begins: in the unit, whose first piece is `first` of x and which has `pieces`
struct Place {
  i64 first;
  int pieces, value;

  __device__ __forceinline__ bool exists() const { return value < pieces * 32; }
  // of the lane's row `lane / 4`, or of the one eight further on
  __device__ __forceinline__ Place of_half(int half) const {
    return {first, pieces, value + half * 8 * R};
  }
};

__device__ __forceinline__ void store_run(const Params& p, Place at, const Acc& v, int half,
                                          const Scale (&scale)[groups]) {
  u32 words[octets * bits / 4], kept = 0;
#pragma unroll
  for (int o = 0; o < octets; ++o) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = value(v, half, 8 * o + i);
    const Scale one[1] = {scale[8 * o / part]};
    const Codes c = codes_of(p, x, one);
#pragma unroll
    for (int w = 0; w < bits / 4; ++w) words[o * (bits / 4) + w] = c.word[w];
    kept |= c.kept << 8 * o;
  }
  if (!at.exists()) return;
  store_global(static_cast<char*>(p.codes) + at.first * (4 * bits) + at.value * bits / 8, words);
  if constexpr (Config::mask) {
    unsigned char* mask = p.mask + at.first * 4 + at.value / 8;
    if constexpr (octets == 4)
      *reinterpret_cast<u32*>(mask) = kept;
    else if constexpr (octets == 2)
      *reinterpret_cast<unsigned short*>(mask) = (unsigned short)kept;
    else
      *mask = (unsigned char)kept;
  }
}

// Groups that lie in a quad: two rows of a lane, `at` the first of them
__device__ __forceinline__ void quantise_runs(const Params& p, Place at, const Acc& v, int lane) {
  const int t = lane % 4;
  const bool odd = t & 1;
  Scale scale[2][groups];
#pragma unroll
  for (int g = 0; g < groups; ++g) {
    const int from = g * part;
    const auto store_scale = [&](int half, auto stored) {
      const Place group = at.of_half(half);
      if (group.exists())
        static_cast<decltype(stored)*>(
            p.scales)[group.first * 32 / near + (group.value + from) / near] = stored;
    };
    float stats[2];
    if constexpr (quest && !integers)
      variances(stats, v, from, odd);
    else
      stats[0] = stat_of(v, 0, from), stats[1] = stat_of(v, 1, from);
    if constexpr (integers) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float made =
            integer_scale(p, over_lanes<group_lanes>(stats[half], Combine()), float(near));
        scale[half][g] = divide_by(made);
        if (t % group_lanes == 0) store_scale(half, made);
      }
    } else if constexpr (group_lanes == 1) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        u32 code;
        scale[half][g] = fp4_scale(p, quest ? __fsqrt_rn(stats[half]) : stats[half], code);
        store_scale(half, (unsigned char)code);
      }
    } else {
      // neighbours share their two rows: each works out the scale of one
      u32 code;
      const float stat = quest ? __fsqrt_rn(stats[0]) : share<group_lanes>(stats, odd, Combine());
      const Scale own = fp4_scale(p, stat, code);
      if (t % group_lanes < 2) store_scale(odd, (unsigned char)code);
      swap_rows(scale[0][g], scale[1][g], own, odd);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) store_run(p, at.of_half(half), v, half, scale[half]);
}

__device__ __forceinline__ void team_sync(int team) {
  asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(threads) : "memory");
}

extern "C" __global__ void __launch_bounds__(threads* teams, Config::blocks_per_sm)
    rotate_quantize(const __grid_constant__ Params p) {
  const int team = __shfl_sync(~0u, threadIdx.x / threads, 0), thread = threadIdx.x % threads;
  const int warp = __shfl_sync(~0u, thread / 32, 0), lane = thread % 32;
  // of a team: the first row of the warpgroup, of a warp, and the first value of a lane
  const int group_row = warp / 4 * tiles * 64, warp_row = group_row + warp % 4 * 16;
  const int value = (warp_row + lane / 4) * R + lane % 4 * run;
  const u32 ring = smem_address(smem) + team * (stages * stage_bytes);
  const u64 h = descriptor(smem_address(smem) + h_at);
  wait_for_predecessors();
  const int taker = team * gridDim.x + blockIdx.x, takers = gridDim.x * teams;
  UnitsOfTeam ahead(p, taker, takers), units(p, taker, takers);
#pragma unroll
  for (int i = 0; i < stages - 1; ++i) {
    fill<Layout>(p, ahead, ring + i * stage_bytes, thread);
    ahead.advance();
  }
  load_h(p, smem + h_at);

  __shared__ float all_slots[teams][2][warps];
  int turn = 0;
  for (int stage = 0, next = stages - 1; units.count(); units.advance()) {
    cp_async_wait<stages - 2>();
    fence_for_wgmma();
    team_sync(team);
    if (!ahead.count()) launch_dependents();  // the last stages
    const u64 x = descriptor(ring + stage * stage_bytes + group_row * panel_row);
    const Place unit = {units.first, units.count(), 0};
    float v[batch][columns / 2];
    bool filled = false;
    // Products of tiles `tile` to `tile + batch` with the columns from `column` on
    const auto multiply = [&](int tile, int column) {
      wgmma_fence();
#pragma unroll
      for (int b = 0; b < batch; ++b)
#pragma unroll
        for (int s = 0; s < R / 16; ++s)
          wgmma(v[b], x + ((tile + b) * 64 * panel_row >> 4) + step_of(s, panel),
                h + (column * panel_row >> 4) + step_of(s, h_panel), s > 0);
      wgmma_commit();
      if (!filled) {
        fill<Layout>(p, ahead, ring + next * stage_bytes, thread);
        ahead.advance();
        filled = true;
      }
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < batch * columns / 2; ++i) pin(v[i / (columns / 2)][i % (columns / 2)]);
    };
    // A tile of which the warp has rows
    const auto exists = [&](int tile) { return (warp_row + tile * 64) * (R / 32) < unit.pieces; };
    const auto place_of = [&](int tile, int column) {
      return Place{unit.first, unit.pieces, value + tile * 64 * R + column};
    };
    if constexpr (scope == quads) {
#pragma unroll
      for (int tile = 0; tile < tiles; tile += batch)
#pragma unroll
        for (int column = 0; column < R; column += columns) {
          multiply(tile, column);
#pragma unroll
          for (int b = 0; b < batch; ++b) quantise_runs(p, place_of(tile + b, column), v[b], lane);
        }
    } else {
      multiply(0, 0);
      float stat = 0.f;
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile)
        if (exists(tile))
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int from = 0; from < run; from += part)
              stat = Combine()(stat, stat_of(v[tile], half, from));
      stat = over_lanes<32>(stat, Combine());
      float (&slots)[warps] = all_slots[team][turn];
      turn ^= 1;
      if (lane == 0) slots[warp] = stat;
      team_sync(team);
      stat = slots[0];
#pragma unroll
      for (int w = 1; w < warps; ++w) stat = Combine()(stat, slots[w]);
      const float made = integer_scale(p, stat, float(i64(units.group) * 32));
      if (thread == 0) static_cast<float*>(p.scales)[unit.first / units.group] = made;
      Scale scale[groups];
#pragma unroll
      for (int i = 0; i < groups; ++i) scale[i] = divide_by(made);
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile)
        if (exists(tile))
#pragma unroll
          for (int half = 0; half < 2; ++half)
            store_run(p, place_of(tile, 0).of_half(half), v[tile], half, scale);
    }
    stage = stage == stages - 1 ? 0 : stage + 1;
    next = next == stages - 1 ? 0 : next + 1;
  }
}
