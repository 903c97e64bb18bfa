// From products to scales and codes: the formulas of fused_quantize.py.
//
// A group's scale comes from its largest magnitude or from its spread; quotients are rounded as if
// they were divisions.
#pragma once
#include "rotate_units.cuh"

// ---- scales ------------------------------------------------------------------------------------
struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Largest {  // lets NaN through
  __device__ __forceinline__ float operator()(float a, float b) const {
    float d;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
  }
};
// What the scale depends on: the largest magnitude, or the sum of squares
using Combine = typename Choose<quest, Sum, Largest>::type;

template <int lanes, class C> __device__ __forceinline__ float over_lanes(float v, C combine) {
#pragma unroll
  for (int d = 1; d < lanes; d *= 2) v = combine(v, __shfl_xor_sync(~0u, v, d));
  return v;
}

// One value for the group from the lanes that share it, of row lane / 4 in even lanes and of row
// lane / 4 + 8 in odd ones.
template <int lanes, class C>
__device__ __forceinline__ float share(const float (&v)[2], bool odd, C combine) {
  float own = combine(odd ? v[1] : v[0], __shfl_xor_sync(~0u, odd ? v[0] : v[1], 1));
  if constexpr (lanes == 4) own = combine(own, __shfl_xor_sync(~0u, own, 2));
  return own;
}

// About 1 / d, of what is neither subnormal nor near it
__device__ __forceinline__ float reciprocal_of(float d) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  return r;
}

// 1 / d in two parts, and with it x / d rounded to nearest. `first`: 1 / d to nearest, or about that if d
// is as short as e4m3: quotients then keep a 30th of a unit away from where rounding changes.
struct Reciprocal {
  float high, low;

  __device__ __forceinline__ Reciprocal(float d, float first)
      : high(first), low(__fmaf_rn(-first, d, 1.f) * first) {}
  __device__ __forceinline__ float times(float x) const { return __fmaf_rn(x, high, x * low); }
};
template <int d> __device__ __forceinline__ float divided_by(float x) {
  const Reciprocal r(d, 1.f / d);
  return x < __int_as_float(0x7f800000) ? r.times(x) : x;
}

// A group's scale: codes round x * factor / divisor.
struct Scale {
  float divisor, reciprocal;  // of nv, the reciprocal of eight times that
  bool boosted;
};

// The reciprocals of subnormal scales would overflow: these scales grow, and the values with them.
constexpr float boost = 0x1p120f;

__device__ __forceinline__ Scale divide_by(float scale) {
  const bool boosted = scale < 0x1p-100f;
  const float divisor = boosted ? scale * boost : scale;
  return {divisor, __frcp_rn(divisor), boosted};
}
__device__ __forceinline__ float integer_scale(const Params& p, float stat, float count) {
  float scale;
  if constexpr (quest)
    scale = p.spread * __fsqrt_rn(__fdiv_rn(stat, count));
  else
    scale = divided_by<format == int8 ? 127 : 7>(stat);
  return scale == 0.f ? 1.f : scale;
}

// The scales of two rows that neighbours share, each of whom has worked out one
__device__ __forceinline__ void swap_rows(Scale& even, Scale& odd, const Scale& own, bool is_odd) {
  const float divisor = __shfl_xor_sync(~0u, own.divisor, 1);
  const float reciprocal = format == mx ? 0.f : __shfl_xor_sync(~0u, own.reciprocal, 1);
  even = {is_odd ? divisor : own.divisor, is_odd ? reciprocal : own.reciprocal};
  odd = {is_odd ? own.divisor : divisor, is_odd ? own.reciprocal : reciprocal};
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ float e4m3_value(unsigned short code) {
  u32 halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(code));
  return __half2float(__ushort_as_half((unsigned short)halves));
}
#endif

// `stat`: the largest magnitude or the standard deviation. `code`: the scale's byte
__device__ __forceinline__ Scale fp4_scale(const Params& p, float stat, u32& code) {
  if constexpr (format == mx) {
    const float base = __fadd_rn(quest ? p.spread * stat : stat, 1e-8f);
    const u32 exponent = __float_as_uint(base) & 0x7f800000;  // infinity for NaN too
    code = exponent >> 23;
    return {__uint_as_float(exponent), 0.f};
  } else {
    // infinity may become NaN here
    float base = quest ? p.spread * stat : Reciprocal(6.f, 1.f / 6).times(stat);
    if constexpr (Config::scaled) base *= p.global_scale;
    const float infinity = __int_as_float(0x7f800000);
    const bool finite = base < infinity;
#if __CUDA_ARCH__ >= 900
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %1;" : "=h"(pair) : "f"(base));
    code = pair & 255;
    const float value = e4m3_value(pair);
#else
    base = fminf(base, 448.f);
    // e4m3 has steps of 2^-9 below 2^-6, above of an eighth of the binade; adding 1.5 * 2^23 of
    // them rounds.
    const u32 field = max(__float_as_uint(base) >> 23, 121u);
    const float magic = __uint_as_float((field + 20) << 23 | 0x400000);
    const float value = __fadd_rn(__fadd_rn(base, magic), -magic);
    code = value >= 0x1p-6f ? (__float_as_uint(value) >> 20) - 960 : u32(value * 512.f);
#endif
    code = finite ? code : 127;
    // a scale too small for e4m3 stands for a group of zeros
    const bool zero = value == 0.f;
    return {finite ? (zero ? 1.f : value) : infinity, zero ? 0.f : reciprocal_of(8.f * value)};
  }
}

// ---- codes -------------------------------------------------------------------------------------
constexpr float magic = 0x1.8p23f;  // adding it rounds to an integer, ties to even
constexpr float qmax = format == int8 ? 127.f : 7.f;

// The lowest bytes of four floats
__device__ __forceinline__ u32 low_bytes(float a, float b, float c, float d) {
  return __byte_perm(__byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040),
                     __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040), 0x5410);
}
// Byte 3 of each: their signs, as bytes of all ones or zeros
__device__ __forceinline__ u32 signs(float a, float b, float c, float d) {
  u32 ab, cd;
  asm("prmt.b32 %0, %1, %2, 0x00fb;" : "=r"(ab) : "f"(a), "f"(b));
  asm("prmt.b32 %0, %1, %2, 0x00fb;" : "=r"(cd) : "f"(c), "f"(d));
  return __byte_perm(ab, cd, 0x5410);
}

// A code of e2m1, in the low bits of a float, from an eighth of its magnitude, of 8 at most. Rounding
// with the step of a lower binade gives a code that is no smaller, and so does a higher one's: the
// least of three is right. In the third line's binade only 4 and 6 are left: a slope of .3 has the
// same tie between them at 5 and does not reach 7.5 before 8. Floats of one sign compare as integers
// do, of which Hopper takes three at a time.
__device__ __forceinline__ float e2m1(float eighth) {
  constexpr float slope = 8 * 0x1.333332p-2f;  // below .3, but the float after 5 gives 1.5 and more
  const int lines[] = {__float_as_int(__fmaf_rn(eighth, 16.f, magic)),
                       __float_as_int(__fmaf_rn(eighth, 8.f, magic + 2.f)),
                       __float_as_int(__fmaf_rn(eighth, slope, magic + 5.f))};
  return __int_as_float(min(min(lines[0], lines[1]), lines[2]));
}

// The codes of a lane's eight values of a row: two words of bytes, one of four bits.
struct Codes {
  u32 word[2];
  u32 kept;
};

// `parts` of the eight have scales of their own.
template <int parts>
__device__ __forceinline__ Codes codes_of(const Params& p, float (&x)[8],
                                          const Scale (&scale)[parts]) {
  const float infinity = __int_as_float(0x7f800000);
  Codes r{};
  float y[8];
#pragma unroll
  for (int part = 0; part < parts; ++part) {
    const Scale& s = scale[part];
    const int from = 8 / parts * part, to = from + 8 / parts;
    if constexpr (integers) {
      u32 clipped = 0;
      if (s.boosted) {  // such scales are coarse
#pragma unroll
        for (int i = from; i < to; ++i) {
          x[i] *= boost;
          if constexpr (Config::mask) clipped |= u32(fabsf(x[i]) >= (qmax + .5f) * s.divisor) << i;
          x[i] = fminf(fmaxf(x[i], -qmax * s.divisor), qmax * s.divisor);
        }
      }
      const Reciprocal reciprocal(s.divisor, s.reciprocal);
#pragma unroll
      for (int i = from; i < to; ++i) {
        y[i] = reciprocal.times(x[i]);
        if constexpr (Config::mask) r.kept |= u32(fabsf(y[i]) < qmax + .5f) << i;
        if constexpr (quest) y[i] = fminf(fmaxf(y[i], -qmax), qmax);
        y[i] = __fadd_rn(y[i], bits == 8 ? magic : magic + 8.f);
      }
      r.kept &= ~clipped;
    } else if constexpr (format == mx) {
      // the divisor is a power of two, and so is its reciprocal
      const float reciprocal =
          __uint_as_float(max(0x7f000000u - __float_as_uint(s.divisor), 1u << 22));
#pragma unroll
      for (int i = from; i < to; ++i) {
        const float t = quest ? x[i] : 3.f * x[i];
        if constexpr (Config::mask)
          r.kept |= u32(fabsf(t) * reciprocal < (quest ? 6.f : 18.f)) << i;
        y[i] = e2m1(__saturatef(fabsf(t) * (.125f * reciprocal)));
      }
    } else {
      if constexpr (Config::scaled) {
#pragma unroll
        for (int i = from; i < to; ++i) x[i] *= p.global_scale;
      }
      const Reciprocal reciprocal(8.f * s.divisor, s.reciprocal);  // of an eighth
#pragma unroll
      for (int i = from; i < to; ++i) {
        const float eighth = __saturatef(reciprocal.times(fabsf(x[i])));
        if constexpr (Config::mask) r.kept |= u32(eighth < .75f) << i;
        y[i] = e2m1(eighth);
      }
    }
  }
  if constexpr (bits == 8) {
    r.word[0] = low_bytes(y[0], y[1], y[2], y[3]);
    r.word[1] = low_bytes(y[4], y[5], y[6], y[7]);
  } else {
    u32 even = low_bytes(y[0], y[2], y[4], y[6]), odd = low_bytes(y[1], y[3], y[5], y[7]);
    if constexpr (parts == 2) even &= 0x0f0f0f0f, odd &= 0x0f0f0f0f;  // NaN would spill over
    r.word[0] = even + odd * 16;
    if constexpr (integers)
      r.word[0] ^= 0x88888888;
    else
      r.word[0] |= (signs(x[0], x[2], x[4], x[6]) & 0x08080808) |
                   (signs(x[1], x[3], x[5], x[7]) & 0x80808080);
  }
  // where the scale is not finite, codes are zeros
#pragma unroll
  for (int part = 0; part < parts; ++part) {
    if (scale[part].divisor < infinity) continue;
    if (bits == 8 && parts == 2)
      r.word[part] = 0;
    else
      r.word[0] &= parts == 1 ? 0 : part ? 0x0000ffff : 0xffff0000, r.word[1] = 0;
#pragma unroll
    for (int i = 8 / parts * part; i < 8 / parts * (part + 1); ++i) {
      // an integer is 0 then, which is in range
      const bool kept = integers && scale[part].divisor == infinity && fabsf(x[i]) < infinity;
      r.kept = (r.kept & ~(1u << i)) | u32(kept) << i;
    }
  }
  return r;
}
