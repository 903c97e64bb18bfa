// What becomes of an accumulator of hopper.cu with its group's scales and zero points. What they are is in
// hopper_weights.cuh, how they come there in hopper_staged.cuh.
#pragma once
#include "hopper_weights.cuh"

// Where a tile of K lies that is counted on beyond the last one
__device__ __forceinline__ int place_of(int kt, int k_tiles) {
  return rest_by_k && kt >= k_tiles ? kt - k_tiles : kt;
}

// total += s * (acc - z * xsum)
__device__ __forceinline__ void flush(float (&total)[values], const Acc (&acc)[acc_values],
                                      const SumScale (&rows)[2], u32 sums, int lane) {
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
      if constexpr (has_zeros) v -= rows[e / 2].values[1] * x[e % 2];
      total[j * 4 + e] += rows[e / 2].values[0] * v;
    }
  }
}

// Whether one of a thread's two rows is NaN, as a scale that was none makes all of it: for two tokens, as
// one may be NaN itself, of the first ones, which are loaded
template <class T> __device__ __forceinline__ bool rows_are_nan(const T (&acc)[acc_values]) {
  const float low = fminf(acc[0], acc[1]), high = fminf(acc[2], acc[3]);
  return low != low || high != high;
}

// A register of the A operand for a step of 16 k from k on: two neighbours of the row's first or second eight,
// with scales of any size
__device__ __forceinline__ u32 two_weights(const Params& p, i64 row, int k, int eight,
                                           int quarter) {
  const char* codes = p.w + row * p.w_stride;
  const int first = k + quarter * 2 + eight * 8;
  if constexpr (block_fp4) {
    const unsigned char scale = static_cast<const unsigned char*>(
        p.scales)[scale_at<Config::blocked>(row, p.scale_row, k / block_size<Scale>)];
    u32 f[4];
    if constexpr (lane_order) {  // nibbles i and i + 4 of the lane's word of 32 k
      const u32 word = reinterpret_cast<const u32*>(codes + k / 32 * 16)[quarter];
      eight_codes<Scale>(word >> (k % 32 / 8 + eight) * 4 & 0x000f000f, wide_factor(scale), f);
    } else {
      const u32 two = static_cast<unsigned char>(codes[first / 2]);
      eight_codes<Scale>((two & 0xf) | two >> 4 << 16, wide_factor(scale), f);
    }
    return f[0];
  } else {
    const int two = codes[first / 2];
    const float scale = as_float(static_cast<const Scale*>(
        p.scales)[row * p.scale_row + k / int(p.group_size) * p.scale_group]);
    return halves<X>(float(two << 28 >> 28) * scale, float(two << 24 >> 28) * scale);
  }
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
      for (int r = 0; r < 4; ++r)
        a[r] = two_weights(p, min(row0 + quad + r % 2 * 8, p.n - 1), k, r / 2, lane % 4);
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
