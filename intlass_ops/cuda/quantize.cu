// Symmetric and asymmetric quantisation of segments x[s, :] that share one scale (formulas in
// reference.py: quantization_parameters, quantize). `threads_per_segment` threads read a segment
// once, keep it in registers, reduce its range, and write its codes: one read, one write. Segments
// too long for the registers (chunks == 0) are read twice.
#include "memory.cuh"

struct Params {
  const void* x;
  void* q;
  float* scale;
  int* zero;
  unsigned long long seed;
  i64 segments, length;
};

using T = Config::x_type;
constexpr int vector = Config::vector;  // elements of one load: 8, or 2 where rows are not aligned
constexpr int group = Config::threads_per_segment, threads = Config::threads;
constexpr int chunks = Config::chunks;  // vectors of a thread, 0: any number
constexpr int bits = Config::bits;
constexpr bool symmetric = Config::symmetric, stochastic = Config::stochastic;
constexpr float qmax = bits == 8 ? 127.f : 7.f;
constexpr float levels = symmetric ? qmax : float((1 << bits) - 1);
constexpr float low_code = symmetric ? -qmax : (bits == 8 ? -128.f : 0.f);
constexpr float high_code = symmetric ? qmax : (bits == 8 ? 127.f : 15.f);
static_assert(threads % group == 0 && group % 32 == 0, "whole warps share a segment");

struct Vector { T v[vector]; };

__device__ __forceinline__ Vector load(const T* p, i64 i, i64 length) {
  Vector r;
  if constexpr (vector * sizeof(T) >= 16) {
    if (i < length) {
      const int4* from = reinterpret_cast<const int4*>(p + i);
#pragma unroll
      for (int c = 0; c < int(vector * sizeof(T) / 16); ++c)
        reinterpret_cast<int4*>(r.v)[c] = __ldcs(from + c);
      return r;
    }
  }
#pragma unroll
  for (int e = 0; e < vector; ++e) r.v[e] = i + e < length ? p[i + e] : T(0.f);
  return r;
}

// max and min that let NaN through
__device__ __forceinline__ float nan_max(float a, float b) { return a != a || a > b ? a : b; }
__device__ __forceinline__ float nan_min(float a, float b) { return a != a || a < b ? a : b; }

struct Range {
  float low = 0.f, high = 0.f;  // symmetric: high alone, of |x|

  __device__ __forceinline__ void add(const Vector& r) {
#pragma unroll
    for (int e = 0; e < vector; ++e) {
      const float v = as_float(r.v[e]);
      high = nan_max(symmetric ? fabsf(v) : v, high);
      if constexpr (!symmetric) low = nan_min(v, low);
    }
  }
  __device__ __forceinline__ void merge(float other_low, float other_high) {
    high = nan_max(other_high, high);
    if constexpr (!symmetric) low = nan_min(other_low, low);
  }
  // over the threads of the segment; every thread gets the result
  __device__ __forceinline__ void reduce() {
#pragma unroll
    for (int d = 16; d; d /= 2) merge(__shfl_xor_sync(~0u, low, d), __shfl_xor_sync(~0u, high, d));
    if constexpr (group > 32) {
      __shared__ float lows[threads / 32], highs[threads / 32];
      const int warp = threadIdx.x / 32, first = warp / (group / 32) * (group / 32);
      lows[warp] = low;
      highs[warp] = high;
      __syncthreads();
#pragma unroll
      for (int w = 0; w < group / 32; ++w) merge(lows[first + w], highs[first + w]);
    }
  }
};

// reference.uniform: lowbias32 of index and reference.seed_key
__device__ __forceinline__ float uniform(unsigned long long seed, unsigned long long index) {
  u32 h = u32(index) ^ (u32(index >> 32) * 0x9E3779B9u) ^ u32(seed);
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  h = h ^ (h >> 16) ^ u32(seed >> 32);
  return float(h >> 8) * 0x1p-24f;
}

__device__ __forceinline__ int code(float v, float scale, float zero, const Params& p, i64 index) {
  float r = __fdiv_rn(v, scale);
  if constexpr (stochastic) {
    const float below = floorf(r);
    r = below + (uniform(p.seed, index) < r - below ? 1.f : 0.f);
  } else {
    r = rintf(r);
  }
  r += zero;
  if (r != r) return 0;
  return int(fminf(fmaxf(r, low_code), high_code));
}

__device__ __forceinline__ void store(const Params& p, i64 segment, i64 i, const Vector& r,
                                      float scale, float zero) {
  if (i >= p.length) return;
  int c[vector];
#pragma unroll
  for (int e = 0; e < vector; ++e)
    c[e] =
        i + e < p.length ? code(as_float(r.v[e]), scale, zero, p, segment * p.length + i + e) : 0;
  if constexpr (bits == 8) {
    signed char* q = static_cast<signed char*>(p.q) + segment * p.length + i;
    if constexpr (vector == 8) {
      char4 lo = {(signed char)c[0], (signed char)c[1], (signed char)c[2], (signed char)c[3]};
      char4 hi = {(signed char)c[4], (signed char)c[5], (signed char)c[6], (signed char)c[7]};
      reinterpret_cast<char4*>(q)[0] = lo;
      reinterpret_cast<char4*>(q)[1] = hi;
    } else {
#pragma unroll
      for (int e = 0; e < vector; ++e)
        if (i + e < p.length) q[e] = (signed char)c[e];
    }
  } else {
    unsigned char* q = static_cast<unsigned char*>(p.q) + segment * ((p.length + 1) / 2) + i / 2;
    u32 word = 0;
#pragma unroll
    for (int e = 0; e < vector; ++e) word |= u32(c[e] & 15) << (4 * e);
    if constexpr (vector == 8)
      *reinterpret_cast<u32*>(q) = word;
    else
      *q = (unsigned char)word;
  }
}

extern "C" __global__ void __launch_bounds__(threads) quantize(const __grid_constant__ Params p) {
  const i64 segment = i64(blockIdx.x) * (threads / group) + threadIdx.x / group;
  const bool exists = segment < p.segments;
  const T* x = static_cast<const T*>(p.x) + (exists ? segment : 0) * p.length;
  const i64 first = threadIdx.x % group * vector, step = group * vector;

  Range range;
  Vector kept[chunks ? chunks : 1];
  if constexpr (chunks > 0) {
#pragma unroll
    for (int c = 0; c < chunks; ++c) kept[c] = load(x, first + c * step, p.length);
#pragma unroll
    for (int c = 0; c < chunks; ++c) range.add(kept[c]);
  } else {
    for (i64 i = first; i < p.length; i += step) range.add(load(x, i, p.length));
  }
  range.reduce();
  if (!exists) return;

  const float span = symmetric ? range.high : range.high - range.low;
  const float scale = span == 0.f ? 1.f : nan_max(__fdiv_rn(span, levels), 0x1p-149f);
  float zero = 0.f;
  if constexpr (!symmetric) {
    zero = low_code - rintf(__fdiv_rn(range.low, scale));
    zero = zero != zero ? low_code * 0.f : zero;
    zero = fminf(fmaxf(zero, low_code), high_code);
  }
  if (threadIdx.x % group == 0) {
    p.scale[segment] = scale;
    if constexpr (!symmetric) p.zero[segment] = int(zero);
  }
  if constexpr (chunks > 0) {
#pragma unroll
    for (int c = 0; c < chunks; ++c) store(p, segment, first + c * step, kept[c], scale, zero);
  } else {
    for (i64 i = first; i < p.length; i += step)
      store(p, segment, i, load(x, i, p.length), scale, zero);
  }
}
