// Rotation and quantisation in one pass (formulas in fused_quantize.py) with Hopper's wgmma (sm_90a),
// for R = 32, 64, 128: x, seen as rows of R values, times h, both from shared memory.
//
// A block is a few teams of warpgroups. Each team takes units of x in turn, whenever it gets to them,
// through a ring of its own that TMA fills, so that one team's products run while others quantise;
// only h is common to all. h's columns are permuted such that a lane owns of its two rows a run of
// neighbouring products, as far as possible whole groups:
//
//        lane%4:  | 0        | 1          | 2           | 3            |
//        columns    0..run-1   run..2run-1  2run..3run-1  3run..4run-1    run = R / 4
//
// `scope` says where the values that share a scale lie, as in rotate_quantize.cu: in a lane or a quad
// of lanes (`quads`), in some rows of a unit (`table`), or in all of them (`block`).
#include "hopper.cuh"
#include "rotate_codes.cuh"

constexpr int run = R / 4, octets = run / 8;
constexpr int teams = Config::teams, warpgroups = Config::warpgroups;  // of a team
constexpr int threads = 128 * warpgroups, warps = threads / 32;        // of a team
constexpr int rows = 64 * tiles * warpgroups, capacity = rows * (R / 32);
constexpr int group_rows = Config::group_rows;  // not of quads
constexpr int unit_rows = scope == quads   ? rows
                          : scope == table ? rows / group_rows * group_rows
                                           : group_rows;
// Rows of up to 128 bytes, as wgmma takes them: those of R = 128 in two panels
constexpr int panel_row = R == 32 ? 64 : 128, panel = rows * panel_row, h_panel = R * panel_row;
constexpr int panels = R == 128 ? 2 : 1;
constexpr int stage_bytes = rows * R * 2, h_at = teams * stages * stage_bytes;
// TMA brings up to 256 rows at a time.
constexpr int boxes = (unit_rows + 255) / 256;
constexpr int box_rows = boxes == 1 ? unit_rows : (unit_rows + 8 * boxes - 1) / (8 * boxes) * 8;
// Tiles whose products a warpgroup holds at a time
constexpr int batch = scope != quads ? tiles : R < 64 ? 2 : 1;
static_assert(sizeof(T) == 2 && R >= 32 && R <= 128, "see config/rotate_hopper.py");
static_assert(scope == quads || (scope != twice && integers), "see above");
static_assert(tiles % batch == 0, "whole batches");
extern __shared__ __align__(1024) char smem[];

// What generic stores of this thread wrote, wgmma may read.
__device__ __forceinline__ void fence_for_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

using UnitsOfTeam = Units<capacity>;
__device__ __forceinline__ int place(int row, int chunk, int panel_bytes) {
  if constexpr (R == 32) return row * 64 + (chunk ^ (row >> 1 & 3)) * 16;
  return chunk / 8 * panel_bytes + row * 128 + ((chunk ^ row) & 7) * 16;
}
typedef StageRing<stages, stage_bytes> Ring;

// Starts to copy a unit into the next stage of a team's ring.
__device__ __forceinline__ void fill(const TensorMap& x, UnitsOfTeam& units, Ring& ring,
                                     bool producer) {
  if (producer && units.count()) {
    barrier_wait(ring.empty(), ring.phase ^ 1);
    barrier_expect(ring.full(), boxes * box_rows * R * 2);
    const int row = int(units.first / (R / 32));
#pragma unroll
    for (int i = 0; i < boxes; ++i)
#pragma unroll
      for (int j = 0; j < panels; ++j)
        tma_load(ring.data() + j * panel + i * box_rows * panel_row, x, j * panel_row,
                 row + i * box_rows, ring.full());
  }
  __syncwarp();
  units.advance();
  ring.advance();
}

__device__ __forceinline__ u64 descriptor(u32 at) {
  if constexpr (R > 32) return tile_descriptor(at);
  return u64(at >> 4 & 0x3fff) | u64(512 >> 4) << 32 | u64(2) << 62;  // a swizzle of 64 bytes
}
__device__ __forceinline__ u64 step_of(int s, int panel_bytes) {
  return (s / 4 * panel_bytes + s % 4 * 32) >> 4;
}

// Where the product by a column of h goes, among those of a row of x: into `lanes` of 32 (packing.py)
__device__ __forceinline__ constexpr int place_of(int column) {
  const int in_32 = column % 32;
  return Config::lanes ? column - in_32 + in_32 / 2 + in_32 % 2 * 16 : column;
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
      const int at = place_of(n + e), t = at / run, v = at % run, row = v / 2 * 8 + t * 2 + v % 2;
      *reinterpret_cast<u32*>(to + place(row, k / 8, h_panel) + k % 8 * 2) =
          __byte_perm(upper[e / 2], lower[e / 2], e % 2 ? 0x7632 : 0x5410);
    }
  }
  fence_for_wgmma();
  __syncthreads();
}

// A thread's products of two rows, lane / 4 and eight further on; value i of its run
using Acc = float[R / 2];
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

// A warp's rows in strips that lie in one group each: 8 or 16 neighbours, or all of a `block`. Slots
// number the strips of a unit as they lie.
constexpr int strips_of_tile = group_rows % 16 ? 2 : 1;
constexpr int strips = scope == table ? tiles * strips_of_tile : 1, slot_count = warps * strips;
constexpr int group_slots = scope == table ? group_rows * strips_of_tile / 16 : slot_count;

__device__ __forceinline__ constexpr int strip_of(int tile, int half) {
  return scope == table ? tile * strips_of_tile + half % strips_of_tile : 0;
}
__device__ __forceinline__ int slot_of(int warp, int strip) {
  const int tile = warp / 4 * tiles + strip / strips_of_tile;
  return scope == table ? (tile * 4 + warp % 4) * strips_of_tile + strip % strips_of_tile : warp;
}
__device__ __forceinline__ float over_warp(float stat) {
  if constexpr (quest) return over_lanes<32>(stat, Combine());
  return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(stat)));
}

__device__ __forceinline__ Scale of_lane(const Scale& s, int lane) {
  return {__shfl_sync(~0u, s.divisor, lane), __shfl_sync(~0u, s.reciprocal, lane),
          bool(__shfl_sync(~0u, int(s.boosted), lane))};
}

__device__ __forceinline__ void team_sync(int team) {
  asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(threads) : "memory");
}

// Where a warp's rows and a lane's values lie in a unit
struct Seat {
  int team, warp, lane;

  __device__ __forceinline__ int row(int tile) const {
    return (warp / 4 * tiles + tile) * 64 + warp % 4 * 16;
  }
  __device__ __forceinline__ bool has_rows(const Place& unit, int tile) const {
    return row(tile) * (R / 32) < unit.pieces;
  }
  __device__ __forceinline__ Place place(const Place& unit, int tile) const {
    return {unit.first, unit.pieces, (row(tile) + lane / 4) * R + lane % 4 * run};
  }
};

// Groups of whole rows: the products of a unit, whose groups have `group` pieces
__device__ __forceinline__ void quantise_rows(const Params& p, const Place& unit, int group,
                                              const Acc (&v)[batch], const Seat& seat,
                                              float* slots) {
  float stats[strips] = {};
#pragma unroll
  for (int tile = 0; tile < tiles; ++tile)
    if (seat.has_rows(unit, tile))
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int from = 0; from < run; from += part) {
          float& stat = stats[strip_of(tile, half)];
          const float found = Combine()(stat, stat_of(v[tile], half, from));
          // a group that is a unit may end within a warp's rows: those beyond hold anything
          const bool has_row = scope == table || group_rows % 16 == 0 ||
                               seat.place(unit, tile).of_half(half).exists();
          stat = has_row ? found : stat;
        }
#pragma unroll
  for (int i = 0; i < strips; ++i) {
    const float stat = over_warp(stats[i]);
    if (seat.lane == 0) slots[slot_of(seat.warp, i)] = stat;
  }
  team_sync(seat.team);
  // Lane i works out the scale of strip i.
  float own = 0.f;
#pragma unroll
  for (int i = 0; i < strips; ++i) {
    const int of_group = slot_of(seat.warp, i) / group_slots;
    float stat = 0.f;
#pragma unroll
    for (int first = 0; first < group_slots; first += 32) {  // one order, wherever the group lies
      const int at = first + seat.lane, slot = of_group * group_slots + at;
      if (at < group_slots && slot < slot_count) stat = Combine()(stat, slots[slot]);
    }
    stat = over_warp(stat);
    if (seat.lane == i) own = stat;
  }
  const float made = integer_scale(p, own, float(i64(group) * 32));
  const Scale mine = divide_by(made);
  const int slot = slot_of(seat.warp, seat.lane), of_slot = slot / group_slots;
  if (seat.lane < strips && slot % group_slots == 0 && of_slot * group < unit.pieces)
    static_cast<float*>(p.scales)[unit.first / group + of_slot] = made;
#pragma unroll
  for (int tile = 0; tile < tiles; ++tile)
    if (seat.has_rows(unit, tile))
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Scale scale[groups];
        scale[0] = of_lane(mine, strip_of(tile, half));
#pragma unroll
        for (int i = 1; i < groups; ++i) scale[i] = scale[0];
        store_run(p, seat.place(unit, tile).of_half(half), v[tile], half, scale);
      }
}

extern "C" __global__ void __launch_bounds__(threads* teams, 1)
    rotate_quantize(const __grid_constant__ Params p, const __grid_constant__ TensorMap x_map) {
  const int team = __shfl_sync(~0u, threadIdx.x / threads, 0), thread = threadIdx.x % threads;
  const Seat seat{team, __shfl_sync(~0u, thread / 32, 0), thread % 32};
  __shared__ u64 barriers[teams][2 * stages];
  if (threadIdx.x == 0) {
    prefetch(x_map);
#pragma unroll 1
    for (int i = 0; i < teams; ++i)
#pragma unroll 1
      for (int j = 0; j < stages; ++j) {
        barrier_init(smem_address(&barriers[i][j]), 1);
        barrier_init(smem_address(&barriers[i][stages + j]), warps);
      }
    publish_barriers();
  }
  __syncthreads();
  Ring ring{smem_address(smem) + team * (stages * stage_bytes), smem_address(barriers[team])};
  Ring ahead_ring = ring;
  const u64 h = descriptor(smem_address(smem) + h_at);
  wait_for_predecessors();
  const int taker = team * gridDim.x + blockIdx.x, takers = gridDim.x * teams;
  UnitsOfTeam ahead(p, taker, takers), units(p, taker, takers);
#pragma unroll
  for (int i = 0; i < stages - 1; ++i) fill(x_map, ahead, ahead_ring, thread == 0);
  load_h(p, smem + h_at);

  __shared__ float slots[teams][2][slot_count];
  int turn = 0;
  for (; units.count(); units.advance(), ring.advance(), turn ^= 1) {
    barrier_wait(ring.full(), ring.phase);
    if (!ahead.count()) launch_dependents();  // the last stages
    const u64 x = descriptor(ring.data() + seat.warp / 4 * (tiles * 64 * panel_row));
    const Place unit = {units.first, units.count(), 0};
    Acc v[batch];
    // Products of tiles `tile` to `tile + batch`; the copy of another unit starts behind the first.
    const auto multiply = [&](int tile) {
      wgmma_fence();
#pragma unroll
      for (int b = 0; b < batch; ++b)
#pragma unroll
        for (int s = 0; s < R / 16; ++s)
          wgmma(v[b], x + ((tile + b) * 64 * panel_row >> 4) + step_of(s, panel),
                h + step_of(s, h_panel), s > 0);
      wgmma_commit();
      if (tile == 0) fill(x_map, ahead, ahead_ring, thread == 0);
      wgmma_wait<0>();
      if (tile + batch == tiles && seat.lane == 0) barrier_arrive(ring.empty());
#pragma unroll
      for (int i = 0; i < batch * R / 2; ++i) pin(v[i / (R / 2)][i % (R / 2)]);
    };
    if constexpr (scope == quads) {
#pragma unroll
      for (int tile = 0; tile < tiles; tile += batch) {
        multiply(tile);
#pragma unroll
        for (int b = 0; b < batch; ++b)
          quantise_runs(p, seat.place(unit, tile + b), v[b], seat.lane);
      }
    } else {
      multiply(0);
      quantise_rows(p, unit, units.group, v, seat, slots[team][turn]);
    }
  }
}
