// A segment of quantize.cu on its way: how its threads load it, and how they find its range.
#pragma once
#include "hopper.cuh"

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
constexpr int cluster = Config::cluster;
constexpr bool ahead = Config::ahead;
constexpr int bits = Config::bits;
constexpr bool symmetric = Config::symmetric, stochastic = Config::stochastic;
constexpr bool full_range = Config::full_range;
constexpr bool lanes = Config::lanes;  // of each 32 codes the even ones first (packing.py)
enum Before { none, rms_norm, silu_mul, rounded_norm };
constexpr bool rounded = Config::before == rounded_norm;
constexpr int before = rounded ? int(rms_norm) : Config::before;
constexpr float qmax = bits == 8 ? 127.f : 7.f;
constexpr float levels = symmetric ? qmax : float((1 << bits) - 1);
constexpr float low_code = symmetric ? -qmax : (bits == 8 ? -128.f : 0.f);
constexpr float high_code = symmetric ? qmax : (bits == 8 ? 127.f : 15.f);
constexpr bool paired = sizeof(T) == 2;  // two values in a word
template <bool first, class A, class B> struct Choose { using type = A; };
template <class A, class B> struct Choose<false, A, B> { using type = B; };
using Kind = typename Choose<same<T, __half>::value, fp16, bf16>::type;
static_assert(threads % group == 0 && group % 32 == 0, "whole warps share a segment");
static_assert(!ahead || (chunks > 0 && vector == 8 && paired), "vectors of 16 bytes");
static_assert(!lanes || (bits == 8 && vector == 8), "a quad of threads has 32 codes");
static_assert(!full_range || (bits == 8 && symmetric && !stochastic), "as torchao has it");
static_assert(cluster == 1 || (threads == group && !ahead), "a cluster has one segment");

// ---- vectors -----------------------------------------------------------------------------------
struct Vector {
  static constexpr int words = vector * sizeof(T) / 4;
  u32 w[words];

  __device__ __forceinline__ float operator[](int e) const {
    if constexpr (same<T, float>::value) return __uint_as_float(w[e]);
    if constexpr (same<T, __nv_bfloat16>::value)
      return __uint_as_float(e % 2 ? w[e / 2] & 0xffff0000 : w[e / 2] << 16);
    return as_float(__ushort_as_half((unsigned short)(e % 2 ? w[e / 2] >> 16 : w[e / 2])));
  }
  // Elements e and e + 1, rounded
  __device__ __forceinline__ void set(int e, float a, float b) {
    if constexpr (paired)
      w[e / 2] = halves<Kind>(a, b);
    else
      w[e] = __float_as_uint(a), w[e + 1] = __float_as_uint(b);
  }
};

template <bool streamed = true>
__device__ __forceinline__ Vector load(const T* p, i64 i, i64 length) {
  Vector r;
  if constexpr (vector == 8) {
    if (i < length) {
      const int4* from = reinterpret_cast<const int4*>(p + i);
#pragma unroll
      for (int c = 0; c < Vector::words / 4; ++c)
        reinterpret_cast<int4*>(r.w)[c] = streamed ? __ldcs(from + c) : __ldg(from + c);
      return r;
    }
  }
  T v[vector];
#pragma unroll
  for (int e = 0; e < vector; ++e) v[e] = i + e < length ? p[i + e] : T(0.f);
  memcpy(r.w, v, sizeof(v));
  return r;
}

// ---- the next segment, on its way --------------------------------------------------------------
// Shared memory, of which a thread reads what it has copied itself
extern __shared__ __align__(16) char smem[];
constexpr int operands = before == silu_mul ? 2 : 1;
constexpr int vector_bytes = threads * 16, operand_bytes = chunks * vector_bytes;

struct Ahead {
  const T* from[operands];
  i64 step[operands], stride;
  i64 left;  // segments from the next one on
  u32 to;
  bool whole;  // the last vector exists

  __device__ __forceinline__ Ahead(const Params& p, i64 segment, i64 stride, int first, u32 to)
      : stride(stride),
        left(p.segments - segment),
        to(to),
        whole(first + (chunks - 1) * group * vector < p.length) {
    from[0] = static_cast<const T*>(p.x) + segment * p.x_stride + first;
    step[0] = stride * p.x_stride;
    if constexpr (operands == 2) {
      from[1] = static_cast<const T*>(p.other) + segment * p.other_stride + first;
      step[1] = stride * p.other_stride;
    }
  }
  __device__ __forceinline__ void fill() {
    if (left > 0) {
#pragma unroll
      for (int o = 0; o < operands; ++o) {
#pragma unroll
        for (int c = 0; c < chunks; ++c)
          cp_async_16(to + o * operand_bytes + c * vector_bytes, from[o] + c * group * vector,
                      c == chunks - 1 && !whole);
        from[o] += step[o];
      }
    }
    cp_async_commit();
    left -= stride;
  }
  __device__ __forceinline__ Vector taken(int operand, int c) const {
    Vector r;
    load_words<4>(r.w, to + operand * operand_bytes + c * vector_bytes);
    return r;
  }
};

// ---- over a segment ----------------------------------------------------------------------------
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
// The same of two values in a word each
template <bool larger> __device__ __forceinline__ u32 of_pairs(u32 a, u32 b) {
  u32 d;
  if constexpr (same<T, __half>::value && larger)
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  else if constexpr (same<T, __half>::value)
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  else if constexpr (larger)
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  else
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ void store_shared(u32 at, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}
__device__ __forceinline__ float load_shared(u32 at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(u32 at, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}
__device__ __forceinline__ void load_shared(float (&v)[8], u32 at, int apart) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v[4 * i]), "=f"(v[4 * i + 1]), "=f"(v[4 * i + 2]), "=f"(v[4 * i + 3])
                 : "r"(at + i * apart)
                 : "memory");
}

// A word of shared memory of another block of the cluster
__device__ __forceinline__ void store_remote(u32 smem, int rank, float v) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.f32 [remote], %2;\n}" ::"r"(smem),
      "r"(rank), "f"(v)
      : "memory");
}

struct Sum {
  static __device__ __forceinline__ float over_warp(float v) {
#pragma unroll
    for (int d = 16; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
    return v;
  }
};
struct Largest {  // of what is not negative: NaN has the largest bits
  static __device__ __forceinline__ float over_warp(float v) {
    return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(v)));
  }
};

// Combine a value over the threads of a segment, the same in all of them. Two calls in a row must not
// share `slots`.
constexpr int warps = threads / 32, group_warps = group / 32;
constexpr int slots_bytes = (warps + cluster) * 4;  // of a warp, of a block of the cluster
template <class Combine> __device__ __forceinline__ float over_segment(float v, u32 slots) {
  v = Combine::over_warp(v);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if constexpr (group_warps > 1) {
    store_shared(slots + warp * 4, v);
    __syncthreads();
    const int first = warp / group_warps * group_warps;
    v = Combine::over_warp(lane < group_warps ? load_shared(slots + (first + lane) * 4) : 0.f);
  }
  if constexpr (cluster > 1) {
    slots += warps * 4;
    if (threadIdx.x < cluster) store_remote(slots + cluster_rank() * 4, threadIdx.x, v);
    cluster_sync();
    v = Combine::over_warp(lane < cluster ? load_shared(slots + lane * 4) : 0.f);
  }
  return v;
}

struct Range {
  float low = 0.f, high = 0.f;
  u32 lows = 0, highs = 0;  // of pairs

  __device__ __forceinline__ void add(const Vector& x) {
    if constexpr (paired) {
#pragma unroll
      for (u32 w : x.w) highs = of_pairs<true>(highs, w), lows = of_pairs<false>(lows, w);
    } else {
#pragma unroll
      for (int e = 0; e < vector; ++e) high = nan_max(high, x[e]), low = nan_min(low, x[e]);
    }
  }
  __device__ __forceinline__ void reduce(u32 slots) {
    if constexpr (paired) {
      Vector v;
      v.w[0] = highs, high = nan_max(v[0], v[1]);
      v.w[0] = lows, low = nan_min(v[0], v[1]);
    }
    if constexpr (symmetric) {
      high = over_segment<Largest>(nan_max(high, -low), slots);
    } else {
      high = over_segment<Largest>(high, slots);
      low = -over_segment<Largest>(fabsf(low), slots + slots_bytes);  // -0 has large bits
    }
  }
};
