// Symmetric and asymmetric quantisation of segments x[s, :] that share one scale (formulas in
// reference.py: quantization_parameters, quantize), alone or behind what a transformer puts before
// it, rounded to x's type as the modules do:
//
//     none       x
//     rms_norm   x / sqrt(mean(x^2) + eps) * weight, computed in fp32, rounded once
//     silu_mul   round(silu(x)) * other, rounded
//
// `threads_per_segment` threads read a segment once, keep it in registers, reduce its range, and write
// its codes: one read, one write. Segments too long for the registers (chunks == 0) are read again.
#include "memory.cuh"

struct Params {
  const void* x;
  const void* other;  // rms_norm: weight [length] or null. silu_mul: factor [segments, length]
  void* q;
  float* scale;
  int* zero;
  unsigned long long seed;
  i64 segments, length, x_stride, other_stride;  // of rows, in elements
  double eps;
};

using T = Config::x_type;
constexpr int vector = Config::vector;  // elements of one load: 8, or 2 where rows are not aligned
constexpr int group = Config::threads_per_segment, threads = Config::threads;
constexpr int chunks = Config::chunks;  // vectors of a thread, 0: any number
constexpr int bits = Config::bits;
constexpr bool symmetric = Config::symmetric, stochastic = Config::stochastic;
enum Before { none, rms_norm, silu_mul };
constexpr int before = Config::before;
constexpr float qmax = bits == 8 ? 127.f : 7.f;
constexpr float levels = symmetric ? qmax : float((1 << bits) - 1);
constexpr float low_code = symmetric ? -qmax : (bits == 8 ? -128.f : 0.f);
constexpr float high_code = symmetric ? qmax : (bits == 8 ? 127.f : 15.f);
static_assert(threads % group == 0 && group % 32 == 0, "whole warps share a segment");

struct Vector { T v[vector]; };

template <bool streamed = true>
__device__ __forceinline__ Vector load(const T* p, i64 i, i64 length) {
  Vector r;
  if constexpr (vector * sizeof(T) >= 16) {
    if (i < length) {
      const int4* from = reinterpret_cast<const int4*>(p + i);
#pragma unroll
      for (int c = 0; c < int(vector * sizeof(T) / 16); ++c)
        reinterpret_cast<int4*>(r.v)[c] = streamed ? __ldcs(from + c) : __ldg(from + c);
      return r;
    }
  }
#pragma unroll
  for (int e = 0; e < vector; ++e) r.v[e] = i + e < length ? p[i + e] : T(0.f);
  return r;
}

// max and min that let NaN through
__device__ __forceinline__ float nan_max(float a, float b) {
  float d;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
__device__ __forceinline__ float nan_min(float a, float b) {
  float d;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

// Combine a value over the threads of the segment, in the same order in all of them.
template <class Combine> __device__ __forceinline__ float over_segment(float v, Combine combine) {
#pragma unroll
  for (int d = 16; d; d /= 2) v = combine(v, __shfl_xor_sync(~0u, v, d));
  if constexpr (group > 32) {
    __shared__ float warps[threads / 32];
    const int warp = threadIdx.x / 32, first = warp / (group / 32) * (group / 32);
    warps[warp] = v;
    __syncthreads();
    v = warps[first];
#pragma unroll
    for (int w = 1; w < group / 32; ++w) v = combine(v, warps[first + w]);
  }
  return v;
}

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
  __device__ __forceinline__ void reduce() {
    high = over_segment(high, [](float a, float b) { return nan_max(a, b); });
    if constexpr (!symmetric)
      low = over_segment(low, [](float a, float b) { return nan_min(a, b); });
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

// round(x / scale) + zero. Division costs more than everything else here, so quotients come from the
// reciprocal, and are divided after all where that might round to the other side.
struct Coder {
  static constexpr float magic = 0x1.8p23f;  // adding it rounds to an integer, ties to even
  float scale, zero, reciprocal;
  bool plain;  // no NaN, infinity or subnormal anywhere near

  __device__ __forceinline__ Coder(float scale, float zero) : scale(scale), zero(zero) {
    reciprocal = __frcp_rn(scale);
    plain = !stochastic && scale > 0x1p-100f && scale < 0x1p100f;
  }
  __device__ __forceinline__ int exact(float v, unsigned long long seed, i64 index) const {
    float r = __fdiv_rn(v, scale);
    if constexpr (stochastic) {
      const float below = floorf(r);
      r = below + (uniform(seed, index) < r - below ? 1.f : 0.f);
    } else {
      r = rintf(r);
    }
    r += zero;
    if (r != r) return 0;
    return int(fminf(fmaxf(r, low_code), high_code));
  }
  // Codes, of which only the low `bits` bits count.
  __device__ __forceinline__ void codes(int (&c)[vector], const Vector& x, unsigned long long seed,
                                        i64 index) const {
    bool sure = plain;
#pragma unroll
    for (int e = 0; e < vector; ++e) {
      const float v = as_float(x.v[e]), rounded = __fmaf_rn(v, reciprocal, magic);
      // |quotient| < 256 is off by less than 1e-4
      sure &= fabsf(__fmaf_rn(v, reciprocal, magic - rounded)) < 0.4999f;
      c[e] = __float_as_int(rounded);
      if constexpr (!symmetric)
        c[e] = min(max(c[e] - __float_as_int(magic) + int(zero), int(low_code)), int(high_code));
    }
    if (sure) return;
#pragma unroll
    for (int e = 0; e < vector; ++e) c[e] = exact(as_float(x.v[e]), seed, index + e);
  }
};

__device__ __forceinline__ u32 four_bytes(int a, int b, int c, int d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

__device__ __forceinline__ void store(const Params& p, i64 segment, i64 i, const Vector& r,
                                      const Coder& coder) {
  if (i >= p.length) return;
  int c[vector];
  coder.codes(c, r, p.seed, segment * p.length + i);
  if constexpr (bits == 8) {
    signed char* q = static_cast<signed char*>(p.q) + segment * p.length + i;
    if constexpr (vector == 8) {
      const uint2 words = {four_bytes(c[0], c[1], c[2], c[3]), four_bytes(c[4], c[5], c[6], c[7])};
      *reinterpret_cast<uint2*>(q) = words;
    } else {
#pragma unroll
      for (int e = 0; e < vector; ++e)
        if (i + e < p.length) q[e] = (signed char)c[e];
    }
  } else {
    unsigned char* q = static_cast<unsigned char*>(p.q) + segment * ((p.length + 1) / 2) + i / 2;
    u32 word = 0;
#pragma unroll
    for (int e = 0; e < vector; ++e)
      if (vector == 8 || i + e < p.length) word |= u32(c[e] & 15) << (4 * e);
    if constexpr (vector == 8)
      *reinterpret_cast<u32*>(q) = word;
    else
      *q = (unsigned char)word;
  }
}

__device__ __forceinline__ T rounded(float v) {
  T r;
  store_rounded(&r, v);
  return r;
}

// What comes before, for a vector of the segment.
struct Stage {
  const T* other;
  float factor = 1.f;  // rms_norm: 1 / sqrt(mean(x^2) + eps)

  // What the vector at i is combined with
  __device__ __forceinline__ Vector second(i64 i, i64 length) const {
    if constexpr (before == rms_norm) return other ? load<false>(other, i, length) : Vector{};
    if constexpr (before == silu_mul) return load(other, i, length);
    return Vector{};
  }
  __device__ __forceinline__ void apply(Vector& x, const Vector& w) const {
    if constexpr (before == rms_norm) {
#pragma unroll
      for (int e = 0; e < vector; ++e) {
        const float v = as_float(x.v[e]) * factor;
        x.v[e] = rounded(other ? v * as_float(w.v[e]) : v);
      }
    } else if constexpr (before == silu_mul) {
#pragma unroll
      for (int e = 0; e < vector; ++e) {
        const float v = as_float(x.v[e]);
        x.v[e] = rounded(as_float(rounded(__fdiv_rn(v, 1.f + expf(-v)))) * as_float(w.v[e]));
      }
    }
  }
};

__device__ __forceinline__ float sum_of_squares(const Vector& x) {
  float sum = 0.f;
#pragma unroll
  for (int e = 0; e < vector; ++e) sum = __fmaf_rn(as_float(x.v[e]), as_float(x.v[e]), sum);
  return sum;
}

extern "C" __global__ void __launch_bounds__(threads, 1)
    quantize(const __grid_constant__ Params p) {
  wait_for_predecessors();
  launch_dependents();  // only now: early_launch.py
  const i64 segment = i64(blockIdx.x) * (threads / group) + threadIdx.x / group;
  const bool exists = segment < p.segments;
  const T* x = static_cast<const T*>(p.x) + (exists ? segment : 0) * p.x_stride;
  const i64 first = threadIdx.x % group * vector, step = group * vector;
  Stage stage{static_cast<const T*>(p.other)};
  if constexpr (before == silu_mul) stage.other += (exists ? segment : 0) * p.other_stride;

  Range range;
  constexpr bool early = chunks <= 2;  // more have not the registers
  Vector kept[chunks ? chunks : 1], second[chunks ? chunks : 1];
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    kept[c] = load(x, first + c * step, p.length);
    if (early) second[c] = stage.second(first + c * step, p.length);
  }
  if constexpr (before == rms_norm) {
    float squares = 0.f;
#pragma unroll
    for (int c = 0; c < chunks; ++c) squares += sum_of_squares(kept[c]);
    if constexpr (chunks == 0)
      for (i64 i = first; i < p.length; i += step)
        squares += sum_of_squares(load<false>(x, i, p.length));
    squares = over_segment(squares, [](float a, float b) { return a + b; });
    const float mean = __fdiv_rn(squares, float(p.length));
    stage.factor = __fdiv_rn(1.f, __fsqrt_rn(mean + float(p.eps)));
  }
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    stage.apply(kept[c], early ? second[c] : stage.second(first + c * step, p.length));
    range.add(kept[c]);
  }
  if constexpr (chunks == 0)
    for (i64 i = first; i < p.length; i += step) {
      Vector v = load<false>(x, i, p.length);
      stage.apply(v, stage.second(i, p.length));
      range.add(v);
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
  const Coder coder(scale, zero);
#pragma unroll
  for (int c = 0; c < chunks; ++c) store(p, segment, first + c * step, kept[c], coder);
  if constexpr (chunks == 0)
    for (i64 i = first; i < p.length; i += step) {
      Vector v = load(x, i, p.length);
      stage.apply(v, stage.second(i, p.length));
      store(p, segment, i, v, coder);
    }
}
