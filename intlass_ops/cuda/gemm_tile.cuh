// What a block of gemm.cu computes: its tile of the output, what its threads keep of it, and what is read
// once: scales group by group, and the vectors of the epilogue.
#pragma once
#include "experts.cuh"
#include "fragments.cuh"

constexpr int block_m = Config::block_m, block_n = Config::block_n, block_k = Config::block_k;
constexpr int warps_m = Config::warps_m, warps_n = Config::warps_n;
constexpr int threads = 32 * warps_m * warps_n;
constexpr int tiles_m = block_m / warps_m / 8;   // 8-token MMA tiles of a warp
constexpr int tiles_n = block_n / warps_n / 16;  // 16-row MMA tiles of a warp
constexpr int num_stages = Config::num_stages;
static_assert(block_m % (8 * warps_m) == 0, "a warp owns whole 8-token tiles");
static_assert(block_n % (16 * warps_n) == 0, "a warp owns whole 16-row tiles");
static_assert(num_stages >= 2, "the ring needs a stage to fill while another is read");

// One set of accumulators holds the sums over all of K: one scale a row, or weights that have taken
// theirs.
constexpr bool of_span = grouping == scaled_spans, scaled = grouping == scaled_weights || of_span;
constexpr bool direct = grouping == channel || scaled;
static_assert(of_span || !same<W, e2m1>::value, "the scales of blocks are for their codes");
constexpr bool sums_of_x = has_zeros && !scaled;
// Then 16-bit weights are decoded while those before them are multiplied (gemm_ahead.cuh), unless
// their zero points need sums of x.
constexpr bool decodes_ahead = direct && X::bits == 16 && !sums_of_x;

constexpr bool wide_steps = grouping <= tile_groups && block_k >= 128;
using F = Fragments<X, W, wide_steps>;
constexpr int steps = block_k / F::step_k;  // of a tile of K
// Scales that weights of a row take there; those of a step, of which a lane takes one
constexpr int step_scales = of_span ? span_k / block_size<Scale> : 1;
constexpr int tile_scales = of_span ? steps * step_scales : 1;
static_assert(steps % 2 == 0, "two register buffers take turns");

// Which row of W is which row of an MMA is free: a lane's rows, lane / 4 and lane / 4 + 8 of each
// MMA tile, are lane_rows neighbours in W, so that it writes neighbours in the output.
constexpr int lane_rows = 2 * tiles_n;

// A group of one tile sums less than 2^22, so an integer sum that starts at the bits of 1.5 * 2^23
// is a float that needs a subtraction, not a conversion.
constexpr bool biased = grouping == tile_groups && same<Acc, int>::value;
static_assert(!biased || block_k <= 128, "|sum| <= 2^14 * 128 must stay below 2^22");

// What the accumulators of a group start from
struct Start {
  Acc v[4];
  __device__ __forceinline__ Start() {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int bits = 0;
      if (biased)
        asm volatile("mov.b32 %0, 0x4b400000;" : "=r"(bits));  // opaque: kept in registers
      v[e] = bits;
    }
  }
};
__device__ __forceinline__ float group_value(Acc v) {
  if constexpr (biased)
    return __int_as_float(v) - 12582912.f;
  else
    return value(v);
}

// fp32 values a thread owns of the block's tile: total[n tile][m tile][4], and row sums for a_zero
struct Totals {
  float y[tiles_n][tiles_m][4];
  float w[has_a_zero ? tiles_n : 1][2];
};

// The accumulators of the group being summed
struct Sums {
  Acc y[tiles_n][tiles_m][4];
  Acc x[sums_of_x ? tiles_m : 1][4];   // ones @ X: per token
  Acc w[has_a_zero ? tiles_n : 1][4];  // W @ ones: per row
};

template <class T> __device__ __forceinline__ void clear(T& values) {
  u32* words = reinterpret_cast<u32*>(&values);
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 4); ++i) words[i] = 0;
}

// Values made anew where they are needed: the main loop has no registers to keep them for what
// comes after it, and the compiler would.
__device__ __forceinline__ int anew(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Scales and zero points of a thread's rows, group after group
struct GroupScales {
  float s[tiles_n][2], z[tiles_n][2];
  const Scale* scale;  // of the thread's first row, inside the matrix
  const Zero* zero;
  u32 last;  // how many rows lie beyond it

  __device__ __forceinline__ GroupScales(const Params& p, i64 row0, int lane, i64 group) {
    const i64 row = min(row0 + lane / 4 * lane_rows, p.n - 1);
    last = anew(int(min(p.n - 1 - row, i64(block_n))));
    scale = static_cast<const Scale*>(p.scales) + row * p.scale_row + group * p.scale_group;
    zero = static_cast<const Zero*>(p.zeros) + row * p.zero_row + group * p.zero_group;
  }
  __device__ __forceinline__ void load(const Params& p) {
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const u32 beyond = min(u32(2 * i + h), last);
        s[i][h] = in_units_of_scale(scale[beyond * p.scale_row]);
        if constexpr (has_zeros) z[i][h] = in_units_of_zero(zero[beyond * p.zero_row]);
      }
  }
  __device__ __forceinline__ void load_next(const Params& p) {
    scale += p.scale_group;
    zero += p.zero_group;
    load(p);
  }
};

// What the sums of weights decoded ahead stand for, where no scale took it in
template <class F> constexpr float sum_unit() {
  if constexpr (fp8_takes_scales)
    return fp8_unit;
  else if constexpr (decodes_ahead && (!scaled || split_scales || W::bits == 8))
    return F::unit;
  else
    return 1.f;
}

// total += s * (sums - z * xsum), and the same for the rows' own sums; `count` k entered the sums.
// One set of accumulators needs no running total: then it is total = ...
__device__ __forceinline__ void flush(Totals& total, const Sums& sum, const GroupScales& g,
                                      int count) {
#pragma unroll
  for (int i = 0; i < tiles_n; ++i) {
#pragma unroll
    for (int j = 0; j < tiles_m; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float v = group_value(sum.y[i][j][e]) * sum_unit<F>();
        if constexpr (sums_of_x) v -= g.z[i][e / 2] * group_value(sum.x[j][e % 2]);
        if constexpr (!scaled) v *= g.s[i][e / 2];
        total.y[i][j][e] = direct ? v : total.y[i][j][e] + v;
      }
    if constexpr (has_a_zero)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float v = group_value(sum.w[i][2 * h]) * (P::unit_w / P::unit);
        if constexpr (has_zeros) v -= g.z[i][h] * float(count);
        v *= g.s[i][h];
        total.w[i][h] = direct ? v : total.w[i][h] + v;
      }
  }
}

__device__ __forceinline__ int tiles_of_k(i64 k_begin, i64 k_end) {
  return int((k_end - k_begin + block_k - 1) / block_k);
}

// Where this block's tile begins. Concurrent blocks share what they read: strips of `strip` token
// tiles, all rows of W in each.
struct Place {
  i64 m0, n0;
  __device__ __forceinline__ Place(const Params& p) {
    constexpr int strip = 2048 / block_m;
    const int tiles_of_m = anew(int((p.m + block_m - 1) / block_m)),
              tiles_of_n = anew(int((p.n + block_n - 1) / block_n)), tile = anew(tile_of_block(p)),
              first_m = tile / (strip * tiles_of_n) * strip,
              width = min(strip, tiles_of_m - first_m), within = tile - first_m * tiles_of_n;
    m0 = i64(first_m + within % width) * block_m;
    n0 = i64(within / width) * block_n;
  }
};

// What the epilogue needs of each token and each row, in shared memory behind the ring
struct Vectors {
  static constexpr float unit = same<W, e2m1>::value ? block_unit<Scale> : 1.f;  // of the sums
  float factor[block_m], a_zero[block_m], bias[block_n];  // factor: unit * alpha * a_scale

  __device__ __forceinline__ void fill(const Params& p, i64 n0, i64 m0) {
    const float alpha = alpha_of(p) * unit;
#pragma unroll 1
    for (int i = threadIdx.x; i < block_m; i += threads) {
      const i64 m = min(m0 + i, p.m - 1);
      factor[i] = alpha * a_scale_of(p, m);
      a_zero[i] = a_zero_of(p, m);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < block_n; i += threads)
      bias[i] = n0 + i < p.n ? bias_of(p, n0 + i) : 0.f;
  }
};
