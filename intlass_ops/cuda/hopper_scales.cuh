// Scales and zero points of hopper.cu in groups: how a consumer reads them, and what becomes of an
// accumulator with them. What weights do with theirs in registers is in hopper_weights.cuh, how they come
// there in hopper_staged.cuh.
#pragma once
#include "hopper_weights.cuh"

// Scales and zero points of a thread's rows for the groups of one tile of K, as stored: converting
// them is left until they are used, so that nothing waits for their way from memory.
struct TileScales {
  Scale s[tiles_n][flushes][2];
  Zero z[has_zeros ? tiles_n : 1][flushes][2];
};

// Where a tile of K lies that is counted on beyond the last one
__device__ __forceinline__ int place_of(int kt, int k_tiles) {
  return rest_by_k && kt >= k_tiles ? kt - k_tiles : kt;
}

// Where a thread's rows have scales or zero points; groups come one after another.
template <class T> struct GroupReader {
  const char* rows[tiles_n][2];
  i64 near, far;  // bytes to a next tile of K as few groups on as can be, and one more

  __device__ __forceinline__ void start(const void* values, i64 row_stride, i64 group_stride,
                                        i64 row0, i64 last_row, int group, int whole) {
    const i64 group_bytes = group_stride * i64(sizeof(T));
    near = whole * group_bytes, far = near + flushes * group_bytes;
    if constexpr (flushes == 1 && !direct)
      pin(near), pin(far);  // else there are no registers for them
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        rows[i][h] = static_cast<const char*>(values) + group * group_bytes +
                     min(row0 + i * 64 + h * 8, last_row) * row_stride * i64(sizeof(T));
  }
  __device__ __forceinline__ T read(int i, int h, i64 ahead) const {
    return reinterpret_cast<const T*>(rows[i][h])[ahead];
  }
  __device__ __forceinline__ void move(i64 bytes) {
#pragma unroll
    for (int i = 0; i < tiles_n; ++i) rows[i][0] += bytes, rows[i][1] += bytes;
  }
};
struct ScaleReader {
  GroupReader<Scale> scales;
  GroupReader<Zero> zeros;
  // Tiles of K: of a group, left of this one, and to a consumer's next one less whole groups
  int tiles_per_group, tiles_left, tiles_beyond;

  __device__ __forceinline__ ScaleReader(const Params& p, i64 row0, int lane, int kt) {
    // whole groups per tile or whole tiles per group: config.why_not_hopper
    tiles_per_group = flushes > 1 ? 1 : int((min(p.group_size, p.k) + block_k - 1) / block_k);
    tiles_left = tiles_per_group - kt % tiles_per_group;
    tiles_beyond = (stride - 1) % tiles_per_group + 1;
    const int group = kt / tiles_per_group * flushes;
    const int whole = (stride - 1) / tiles_per_group * flushes;
    row0 += lane / 4;
    scales.start(p.scales, p.scale_row, p.scale_group, row0, p.n - 1, group, whole);
    if constexpr (has_zeros)
      zeros.start(p.zeros, p.zero_row, p.zero_group, row0, p.n - 1, group, whole);
  }
  // The groups of the tile of K that the reader is at
  __device__ __forceinline__ void read(const Params& p, TileScales& to, int groups_left) const {
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int f = 0; f < flushes; ++f) {
          // past the last group the sums are zero, and must meet a number
          const int group = min(f, groups_left - 1);
          to.s[i][f][h] = scales.read(i, h, group * p.scale_group);
          if constexpr (has_zeros) to.z[i][f][h] = zeros.read(i, h, group * p.zero_group);
        }
  }
  // From behind the last tile of K to the first
  __device__ __forceinline__ void rewind(int k_tiles) {
    const int groups = k_tiles / tiles_per_group;
    tiles_left = tiles_per_group;
    scales.move(-groups * scales.far);
    if constexpr (has_zeros) zeros.move(-groups * zeros.far);
  }
  // To the consumer's next tile of K
  __device__ __forceinline__ void advance() {
    tiles_left -= stride > 1 ? tiles_beyond : 1;
    const bool ends = tiles_left <= 0;
    if (ends) tiles_left += tiles_per_group;
    if (ends || stride > 1) {  // else near is 0
      scales.move(ends ? scales.far : scales.near);
      if constexpr (has_zeros) zeros.move(ends ? zeros.far : zeros.near);
    }
  }
};

// Scales or zero points of some rows' groups into L2, a sector at a time: many tiles of K take theirs from
// one, and the wait for it from memory would be longer than the work on a tile.
template <class T>
__device__ __forceinline__ void prefetch_groups(const void* values, i64 row_stride, int row,
                                                int end, int first, int last, int threads) {
#pragma unroll 1
  for (; row < end; row += threads) {
    const T* at = static_cast<const T*>(values) + row * row_stride;
    const T* to = at + last;
#pragma unroll 1
    for (at += first; at < to; at += 32 / sizeof(T)) prefetch_l2(at);
    prefetch_l2(to);
  }
}
// Those of all of a block's segments, by the warps beside the producer's
__device__ __forceinline__ void prefetch_scales(const Params& p, const Shares& shares,
                                                Schedule schedule = {}, int rows = block_n) {
  constexpr int threads = 96;
#pragma unroll 1
  for (Segment s; schedule.next(shares, s);) {
    int m0, n0;
    shares.locate(s.tile, m0, n0);
    s = s.of_block();
    if (rest_by_k && s.end > shares.k_tiles) s.begin = 0, s.end = shares.k_tiles;  // once round
    const int group_size = int(p.group_size), end = min(n0 + rows, int(p.n));
    const int first = s.begin * block_k / group_size;
    const int last = (min(s.end * block_k, int(p.k)) - 1) / group_size;
    const int row = n0 + int(threadIdx.x) % 128 - (128 - threads);
    if (p.scale_group == 1)
      prefetch_groups<Scale>(p.scales, p.scale_row, row, end, first, last, threads);
    if constexpr (has_zeros)
      if (p.zero_group == 1)
        prefetch_groups<Zero>(p.zeros, p.zero_row, row, end, first, last, threads);
  }
}

// total += s * (acc - z * xsum)
__device__ __forceinline__ void flush(float (&total)[values], const Acc (&acc)[acc_values],
                                      const Scale (&scales)[2], const Zero (&zeros)[2], u32 sums,
                                      int lane) {
  float s[2], z[2] = {0, 0};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    s[h] = in_units_of_scale(scales[h]) * code_unit;
    if constexpr (has_zeros) z[h] = in_units_of_zero(zeros[h]) * (1 / code_unit);
  }
#pragma unroll
  for (int j = 0; j < acc_values / 4; ++j) {
    float x[2] = {0, 0};
    if constexpr (has_zeros) {
      const float2 t = load_shared_float2(sums + (j * 8 + lane % 4 * 2) * 4);
      x[0] = t.x, x[1] = t.y;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float v = value(acc[j * 4 + e]);
      if constexpr (has_zeros) v -= z[e / 2] * x[e % 2];
      total[j * 4 + e] += s[e / 2] * v;
    }
  }
}

// Whether one of a thread's two rows is NaN, as a scale that was none makes all of it: for two tokens, as
// one may be NaN itself
template <class T> __device__ __forceinline__ bool rows_are_nan(const T (&acc)[acc_values]) {
  const float low = fminf(acc[0], acc[acc_values - 4]), high = fminf(acc[2], acc[acc_values - 2]);
  return low != low || high != high;
}

// What sum_fragments leaves in `acc`, for the 16 rows of a warp from row0 on and for scales of any size:
// each weight rounded by itself, operands straight from global memory. Groups are whole steps of 16 k.
template <class T>
__device__ __forceinline__ void sum_again(const Params& p, int k_tiles, const Segment& segment,
                                          i64 row0, int m0, int lane, T (&acc)[acc_values]) {
#pragma unroll
  for (int e = 0; e < acc_values; ++e) acc[e] = 0;
  const int quad = lane / 4, first_k = lane % 4 * 2;
#pragma unroll 1
  for (int kt = segment.begin; kt < segment.end; kt += stride)
#pragma unroll 1
    for (int k = place_of(kt, k_tiles) * block_k, end = min(k + block_k, int(p.k)); k < end;
         k += 16) {
      u32 a[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const i64 row = min(row0 + quad + r % 2 * 8, p.n - 1);
        const int codes = p.w[row * p.w_stride + (k + first_k + r / 2 * 8) / 2];
        const float scale = as_float(static_cast<const Scale*>(
            p.scales)[row * p.scale_row + k / int(p.group_size) * p.scale_group]);
        a[r] = halves<X>(float(codes << 28 >> 28) * scale, float(codes << 24 >> 28) * scale);
      }
      int token = m0 + quad;
      pin(token);  // else ptxas keeps an address a token, for which there are no registers
#pragma unroll
      for (int e = 0; e < acc_values; e += 4) {
        const i64 m = min(i64(token + e * 2), p.m - 1);
        const u32* x = reinterpret_cast<const u32*>(p.x + m * p.x_stride + (k + first_k) * 2);
        float d[4] = {float(acc[e]), float(acc[e + 1]), float(acc[e + 2]), float(acc[e + 3])};
        mma_16816(d, a, {x[0], x[4]}, X{});
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[e + i] = T(d[i]);
      }
    }
#pragma unroll
  for (int e = 0; e < acc_values; ++e) acc[e] *= 1 / weight_unit;
}
