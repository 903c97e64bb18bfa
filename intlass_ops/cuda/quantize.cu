// Symmetric and asymmetric quantisation of segments x[s, :] that share one scale (formulas in
// reference.py: quantization_parameters, quantize, quantize_full_range), alone or behind what a
// transformer puts before it, rounded to x's type as the modules do:
//
//     none          x
//     rms_norm      x / sqrt(mean(x^2) + eps) * weight, computed in fp32, rounded once
//     rounded_norm  the same, rounded before it is multiplied by weight too
//     silu_mul      round(silu(x)) * other, rounded
//
// `threads_per_segment` threads read a segment once, keep it in registers, reduce its range, and write
// its codes: one read, one write. Three ways to go about it:
//
//     ahead        of many segments a block takes one after the other, the next one already on its
//                  way to shared memory
//     not ahead    a block for each; with chunks == 0 a segment is too long for the registers and is
//                  read again
//     cluster > 1  few long segments: a cluster of blocks shares each (sm_90 and up)
#include "quantize_segment.cuh"

// ---- codes -------------------------------------------------------------------------------------
// reference.uniform: lowbias32 of index and reference.seed_key
__device__ __forceinline__ float uniform(unsigned long long seed, unsigned long long index) {
  u32 h = u32(index) ^ (u32(index >> 32) * 0x9E3779B9u) ^ u32(seed);
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  h = h ^ (h >> 16) ^ u32(seed >> 32);
  return float(h >> 8) * 0x1p-24f;
}

// Quotients by a divisor, from its reciprocal in two parts: as good as rounded ones to the nearest
// integer below 256, whatever is divided, unless the divisor's mantissa is all ones (tests/test_quotients.py).
struct Divider {
  float high, low;

  __device__ __forceinline__ float of(float v) const { return __fmaf_rn(v, high, v * low); }
};
__device__ __forceinline__ Divider divider(float d) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  r = __fmaf_rn(__fmaf_rn(-r, d, 1.f), r, r);  // rounded to nearest
  return {r, __fmaf_rn(-r, d, 1.f) * r};
}
constexpr Divider by_levels = {float(1. / levels), float(1. / levels - double(float(1. / levels)))};

// round(x / scale) + zero
struct QuotientCoder {
  static constexpr float magic = 0x1.8p23f;  // adding it rounds to an integer, ties to even
  float scale, zero = 0.f;
  Divider by_scale;
  bool plain;  // no NaN, infinity or subnormal anywhere near

  __device__ __forceinline__ QuotientCoder(const Range& range) {
    const float span = symmetric ? range.high : range.high - range.low;
    plain = span > 0x1p-90f && span < 0x1p100f;
    if (plain) {
      scale = by_levels.of(span);
      by_scale = divider(scale);
      if constexpr (!symmetric) {
        const float low = paired ? by_scale.of(range.low) : __fdiv_rn(range.low, scale);
        zero = low_code - rintf(low);
      }
      if constexpr (stochastic) plain = false;
      if constexpr (!paired) plain &= (~__float_as_uint(scale) & 0x7fffff) != 0;
    } else {
      scale = span == 0.f ? 1.f : nan_max(__fdiv_rn(span, levels), 0x1p-149f);
      if constexpr (!symmetric) zero = low_code - rintf(__fdiv_rn(range.low, scale));
    }
    if constexpr (!symmetric) {
      zero = zero != zero ? low_code * 0.f : zero;
      zero = fminf(fmaxf(zero, low_code), high_code);
    }
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
  // In the lowest bytes; signed INT4 plus 8
  __device__ __forceinline__ void codes(u32 (&c)[vector], const Vector& x, unsigned long long seed,
                                        i64 index) const {
    constexpr int offset = symmetric && bits == 4 ? 8 : 0;
    if (plain) {
#pragma unroll
      for (int e = 0; e < vector; ++e) {
        float y = by_scale.of(x[e]) + (magic + offset);
        if constexpr (!symmetric) y = fminf(fmaxf(y + zero, magic + low_code), magic + high_code);
        c[e] = __float_as_uint(y);
      }
    } else {
#pragma unroll
      for (int e = 0; e < vector; ++e) c[e] = exact(x[e], seed, index + e) + offset;
    }
  }
};

// round(x * (1 / scale)) of a scale in the type of x: each step rounds as PyTorch's own kernels do.
// The largest quotients are 127.5, or about, which is 128; in fp16, whose smallest scales have a bit
// or two, 159.
struct FullRangeCoder {
  static constexpr float magic = QuotientCoder::magic, zero = 0.f;
  float scale, reciprocal;
  u32 most, least;  // pairs of what has the codes 127 and -128, or is as good
  bool plain;       // no NaN or infinity

  __device__ __forceinline__ FullRangeCoder(const Range& range) {
    const float quotient = range.high * float(1. / 127.5);  // a division by a number, in PyTorch
    Vector in_type;
    in_type.set(0, quotient, quotient);
    scale = nan_max(in_type[0], 0x1p-23f);
    reciprocal = __frcp_rn(scale);
    in_type.set(0, 127.f * scale, 127.f * scale), most = in_type.w[0];
    in_type.set(0, -128.f * scale, -128.f * scale), least = in_type.w[0];
    plain = range.high <= 0x1.fffffep127f;
  }
  __device__ __forceinline__ void codes(u32 (&c)[vector], const Vector& x, unsigned long long,
                                        i64) const {
    Vector v = x;
    if constexpr (paired) {
#pragma unroll
      for (u32& w : v.w) {
        w = of_pairs<false>(w, most);
        if constexpr (same<T, __half>::value) w = of_pairs<true>(w, least);
      }
    }
#pragma unroll
    for (int e = 0; e < vector; ++e) {
      float y = __fmul_rn(v[e], reciprocal) + magic;
      if constexpr (!paired) y = fminf(y, magic + 127.f);
      c[e] = __float_as_uint(y);
    }
    if (plain) return;
#pragma unroll
    for (int e = 0; e < vector; ++e)
      if (const float y = x[e] * reciprocal; y != y) c[e] = 0;
  }
};
using Coder = Choose<full_range, FullRangeCoder, QuotientCoder>::type;

__device__ __forceinline__ u32 four_bytes(int a, int b, int c, int d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// `exists`: whether the vector is one of the segment's. All lanes of a warp come here, if they make lanes.
__device__ __forceinline__ void store(const Params& p, i64 segment, i64 i, const Vector& x,
                                      const Coder& coder, bool exists) {
  if (!lanes && !exists) return;
  u32 c[vector];
  coder.codes(c, x, p.seed, segment * p.length + i);
  if constexpr (lanes) {
    // A quad has 32 k. Each lane gives its neighbour four codes for four others, and stores the even ones of
    // both, or the odd ones: lanes 1 and 2 each where the other's neighbours lie.
    const u32 even = four_bytes(c[0], c[2], c[4], c[6]), odd = four_bytes(c[1], c[3], c[5], c[7]);
    const int quarter = threadIdx.x % 4;
    const bool stores_odd = quarter % 2;
    const u32 own = stores_odd ? odd : even;
    const u32 others = __shfl_xor_sync(~0u, stores_odd ? even : odd, 1);
    const i64 place = i + (quarter == 1 ? 8 : quarter == 2 ? -8 : 0);
    if (exists)
      *reinterpret_cast<uint2*>(static_cast<char*>(p.q) + segment * p.length + place) =
          stores_odd ? uint2{others, own} : uint2{own, others};
  } else if constexpr (bits == 8) {
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
    constexpr u32 flip = symmetric ? 0x88888888 : 0;
    if constexpr (vector == 8) {
      const u32 even = four_bytes(c[0], c[2], c[4], c[6]), odd = four_bytes(c[1], c[3], c[5], c[7]);
      *reinterpret_cast<u32*>(q) = (even + odd * 16) ^ flip;
    } else {
      const u32 second = i + 1 < p.length ? c[1] & 15 : flip & 15;
      *q = (unsigned char)(((c[0] & 15) | second << 4) ^ flip);
    }
  }
}

// ---- what comes before -------------------------------------------------------------------------
__device__ __forceinline__ float silu(float v) { return __fdiv_rn(v, 1.f + expf(-v)); }
// The same of every bf16 value from -87 on, once it is rounded to bf16 (tests/test_quantize_after.py)
__device__ __forceinline__ float fast_silu(float v) {
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v * -0x1.715476p0f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.f + e));
  return v * r;
}

__device__ __forceinline__ void silu_times(Vector& x, const Vector& other) {
  bool fast = same<T, __nv_bfloat16>::value;
  if constexpr (same<T, __nv_bfloat16>::value) {
    Vector least = x;
#pragma unroll
    for (int w = 1; w < Vector::words; ++w) least.w[0] = of_pairs<false>(least.w[0], x.w[w]);
    fast = !(least[0] < -87.f || least[1] < -87.f);
  }
  if (fast) {
#pragma unroll
    for (int e = 0; e < vector; e += 2) x.set(e, fast_silu(x[e]), fast_silu(x[e + 1]));
  } else {
#pragma unroll
    for (int e = 0; e < vector; e += 2) x.set(e, silu(x[e]), silu(x[e + 1]));
  }
#pragma unroll
  for (int e = 0; e < vector; e += 2) x.set(e, x[e] * other[e], x[e + 1] * other[e + 1]);
}

__device__ __forceinline__ float sum_of_squares(const Vector& x) {
  float sum = 0.f;
#pragma unroll
  for (int e = 0; e < vector; ++e) sum = __fmaf_rn(x[e], x[e], sum);
  return sum;
}

// A norm's weight: ones if there is none. The ring's threads keep theirs as floats behind it.
__device__ __forceinline__ Vector weight_of(const Params& p, i64 i) {
  if (p.other) return load<false>(static_cast<const T*>(p.other), i, p.length);
  Vector ones;
#pragma unroll
  for (int e = 0; e < vector; e += 2) ones.set(e, 1.f, 1.f);
  return ones;
}
template <class Weight>
__device__ __forceinline__ void norm(Vector& x, float factor, const Weight& w) {
#pragma unroll
  for (int e = 0; e < vector; e += 2) {
    if constexpr (rounded) {
      x.set(e, x[e] * factor, x[e + 1] * factor);
      x.set(e, x[e] * w[e], x[e + 1] * w[e + 1]);
    } else {
      x.set(e, x[e] * factor * w[e], x[e + 1] * factor * w[e + 1]);
    }
  }
}

__device__ __forceinline__ void swap(u32& a, u32& b) {
  const u32 t = a;
  a = b, b = t;
}

#if __CUDA_ARCH__ >= 900
#define CLUSTERS __cluster_dims__(cluster, 1, 1)
#else
#define CLUSTERS
#endif

extern "C" __global__ void CLUSTERS __launch_bounds__(threads, Config::blocks_per_sm)
    quantize(const __grid_constant__ Params p) {
  if constexpr (cluster > 1) cluster_arrive();
  wait_for_predecessors();
  launch_dependents();  // only now: early_launch.py
  constexpr int per_block = threads / group;
  constexpr int step = cluster * group * vector;
  const i64 stride = i64(gridDim.x) / cluster * per_block;
  i64 segment = i64(blockIdx.x) / cluster * per_block + threadIdx.x / group;
  const int first = (blockIdx.x % cluster * group + threadIdx.x % group) * vector;
  const u32 own = smem_address(smem) + threadIdx.x * 16, weights = own + operands * operand_bytes;
  if constexpr (ahead && before == rms_norm) {
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      const Vector w = weight_of(p, first + c * step);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_shared(weights + (2 * c + half) * vector_bytes, w[4 * half], w[4 * half + 1],
                     w[4 * half + 2], w[4 * half + 3]);
    }
  }
  Ahead next(p, segment, stride, first, own);
  if constexpr (ahead) next.fill();

  // Two sets, which segments take in turns: some threads may still read the one before
  __shared__ __align__(16) char all_slots[2][3 * slots_bytes];
  u32 slots = smem_address(all_slots), other_slots = slots + 3 * slots_bytes;
  asm volatile("" : "+r"(slots), "+r"(other_slots));  // worked out once
  const bool whole = first + (chunks - 1) * step < p.length;
  for (; segment - threadIdx.x / group < p.segments; segment += stride) {
    const bool exists = per_block == 1 || segment < p.segments;
    const T* x = static_cast<const T*>(p.x) + (exists ? segment : 0) * p.x_stride;
    const T* other = static_cast<const T*>(p.other) + (exists ? segment : 0) * p.other_stride;
    const auto second = [&](i64 i) {
      if constexpr (before == rms_norm) return weight_of(p, i);
      if constexpr (before == silu_mul) return load(other, i, p.length);
      return Vector{};
    };
    constexpr bool early = chunks <= 2;  // more have not the registers
    Vector kept[chunks ? chunks : 1], with[chunks ? chunks : 1];
    if constexpr (ahead) cp_async_wait<0>();
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      if constexpr (ahead) {
        kept[c] = next.taken(0, c);
        if constexpr (before == silu_mul) with[c] = next.taken(1, c);
      } else {
        kept[c] = load(x, first + c * step, p.length);
        if constexpr (early) with[c] = second(first + c * step);
      }
    }
    if constexpr (cluster > 1) cluster_wait();  // the others are there
    if constexpr (ahead) next.fill();

    float factor = 1.f;
    if constexpr (before == rms_norm) {
      float squares = 0.f;
#pragma unroll
      for (int c = 0; c < chunks; ++c) squares += sum_of_squares(kept[c]);
      if constexpr (chunks == 0)
        for (i64 i = first; i < p.length; i += step)
          squares += sum_of_squares(load<false>(x, i, p.length));
      const float mean =
          __fdiv_rn(over_segment<Sum>(squares, slots + 2 * slots_bytes), float(p.length));
      factor = __fdiv_rn(1.f, __fsqrt_rn(mean + float(p.eps)));
    }
    const auto prepare = [&]([[maybe_unused]] Vector& v, const Vector& w) {
      if constexpr (before == rms_norm) norm(v, factor, w);
      if constexpr (before == silu_mul) silu_times(v, w);
    };
    Range range;
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      if constexpr (ahead && before == rms_norm) {
        float w[8];
        load_shared(w, weights + 2 * c * vector_bytes, vector_bytes);
        norm(kept[c], factor, w);
      } else {
        if constexpr (!ahead && !early) with[c] = second(first + c * step);
        prepare(kept[c], with[c]);
      }
      range.add(kept[c]);
    }
    if constexpr (chunks == 0)
      for (i64 i = first; i < p.length; i += step) {
        Vector v = load<false>(x, i, p.length);
        prepare(v, second(i));
        range.add(v);
      }
    range.reduce(slots);
    swap(slots, other_slots);
    if (!exists) continue;

    const Coder coder(range);
    if (first == 0) {
      p.scale[segment] = coder.scale;
      if constexpr (!symmetric) p.zero[segment] = int(coder.zero);
    }
#pragma unroll
    for (int c = 0; c < chunks; ++c)
      store(p, segment, first + c * step, kept[c], coder, c < chunks - 1 || whole);
    if constexpr (chunks == 0)
      for (i64 i = first; i - (lanes ? first % 256 : 0) < p.length; i += step) {
        Vector v = load(x, i, p.length);
        prepare(v, second(i));
        store(p, segment, i, v, coder, !lanes || i < p.length);
      }
  }
}
