// FP4 codes (e2m1) and the scales of their blocks, MXFP4 (32 k, e8m0) and NVFP4 (16 k, e4m3), as bf16
// fragments: a code times its scale has at most six significant bits, so bf16 holds it exactly, and
// what remains of a product is done by the kernels of 16-bit operands.
//
// A code s e e m becomes a number by moving: s to the sign of a bf16, e e m to the low exponent bits
// and the first bit of its mantissa, subnormals included. That is 2^-126 of its value, and factors
// put it right: 2^126 times the scale, divided by a constant `unit` that leaves room for all scales.
// Of two NVFP4 operands fp16 holds the numbers too, 2^-14 of their value: fewer instructions.
#pragma once
#include "memory.cuh"

struct e2m1 { static constexpr int bits = 4; };

struct e8m0 { unsigned char code; };

// What codes become: the type of the activations, if these are no codes themselves
template <class X, class Scale> struct DecodedAs { using type = X; };
template <class Scale> struct DecodedAs<e2m1, Scale> { using type = bf16; };
template <> struct DecodedAs<e2m1, e4m3> { using type = fp16; };
using Number = typename DecodedAs<Config::x_kind, Config::scale_type>::type;
constexpr bool of_fp16 = same<Number, fp16>::value;

// Of each format of scales; any other one is no scale of blocks
template <class Scale> constexpr int block_size = 32;
template <> constexpr int block_size<e4m3> = 16;
template <class Scale> constexpr float block_unit = 1.f;
template <> constexpr float block_unit<e8m0> = 32.f;  // numbers from 2^-128 to 6 * 2^127 have room
template <> constexpr float block_unit<e4m3> = of_fp16 ? 16384.f : 256.f;  // 448 * 2^126 / 256 fits

// No sum meets these: codes take them
__device__ __forceinline__ float as_float(e8m0) { return 1.f; }
__device__ __forceinline__ float as_float(e4m3) { return 1.f; }

constexpr u32 minus_zeros = 0x80008000;  // with which an FMA multiplies: sm_80 has no bf16 product
constexpr u32 not_numbers = of_fp16 ? 0x7e007e00 : 0x7fc07fc0;

// What the moved bits of codes are multiplied by: 2^126 times the scale, over the unit. That has no
// room for e8m0's scales above 64, which are `wide`: a second factor takes 2^121 of it.
struct Factor {
  u32 value;  // the same bf16 twice
  bool wide;
};
template <class Scale> __device__ __forceinline__ u32 scaled_codes(u32 moved, Factor factor) {
  if constexpr (of_fp16) return mul2<fp16>(moved, factor.value);
  if (same<Scale, e8m0>::value && factor.wide)
    moved = fma2<bf16>(moved, 0x7c007c00, minus_zeros);  // 2^121
  return fma2<bf16>(moved, factor.value, minus_zeros);
}

// One that is not: 2^121 times the scale of so small a code
constexpr int largest_narrow = 133;
__device__ __forceinline__ u32 narrow_factor(u32 code) { return code * 0x00800080u + 0x3c803c80u; }
// A wide factor: of the scale in one byte of a word. A scale that is no number does not show.
__device__ __forceinline__ u32 e8m0_factor(u32 word, int byte) {
  constexpr u32 smallest = 0x00400040;  // 2^-127 is subnormal
  return __vmaxu2(__byte_perm(word, 0, 0x4040 + byte * 0x0101) * 128, smallest);
}
__device__ __forceinline__ Factor wide_factor(unsigned char code) {
  return {code == 255 ? not_numbers : e8m0_factor(code, 0), true};
}
// The factors of two scales
__device__ __forceinline__ u32 e4m3_factors(unsigned short codes) {
#if __CUDA_ARCH__ >= 890
  u32 v;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(v) : "h"(codes));
  if constexpr (of_fp16) return v;
  const float2 f = __half22float2(reinterpret_cast<const __half2&>(v));
  constexpr float lift = 332306998946228968225951765070086144.f;  // 2^118
  return halves<bf16>(f.x * lift, f.y * lift);
#else  // exponent and mantissa in place of bf16's, 2^120 too small, subnormals included
  const u32 two = __byte_perm(codes, 0, 0x4140);
  const u32 bits = (two & 0x007f007f) * (of_fp16 ? 128 : 16) + (two & 0x00800080) * 256;
  constexpr u32 half_way = 0x7b007b00;  // 2^119
  const u32 f = of_fp16
                    ? mul2<fp16>(bits, 0x5c005c00)  // 2^8
                    : fma2<bf16>(fma2<bf16>(bits, half_way, minus_zeros), half_way, minus_zeros);
  const u32 ones = (two & 0x007f007f) + 0x00010001;  // 0x80: no number
  return ones & 0x00800080 ? not_numbers : f;
#endif
}

// One factor: of the scale in one byte of a word
__device__ __forceinline__ u32 e4m3_factor(u32 word, int byte) {
  return __byte_perm(e4m3_factors(__byte_perm(word, 0, 0x4440 + byte)), 0, 0x1010);
}

// A word of eight codes of one block: nibble j of each half word, as Int4Float16Pair orders them. Two
// copies of a nibble by one product: the upper has the sign in place, the lower the rest. fp16's
// lie in one byte, four at a time.
template <class Scale>
__device__ __forceinline__ void eight_codes(u32 w, Factor factor, u32 (&f)[4]) {
  if constexpr (of_fp16) {
    constexpr u32 sign = 0x80808080, rest = 0x0e0e0e0e;
    const u32 even = and_or(w << 4, sign, w << 1 & rest), odd = and_or(w, sign, w >> 3 & rest);
    f[0] = scaled_codes<Scale>(__byte_perm(even, 0, 0x2404), factor);
    f[1] = scaled_codes<Scale>(__byte_perm(odd, 0, 0x2404), factor);
    f[2] = scaled_codes<Scale>(even & 0xff00ff00, factor);
    f[3] = scaled_codes<Scale>(odd & 0xff00ff00, factor);
    return;
  }
  constexpr u32 kept = 0x81c081c0;
  const u32 upper = w >> 8;
  f[0] = scaled_codes<Scale>((w & 0x000f000f) * 0x1040 & kept, factor);
  f[1] = scaled_codes<Scale>((w & 0x00f000f0) * 0x0104 & kept, factor);
  f[2] = scaled_codes<Scale>((upper & 0x000f000f) * 0x1040 & kept, factor);
  f[3] = scaled_codes<Scale>((upper & 0x00f000f0) * 0x0104 & kept, factor);
}

// 16-bit activations, or such codes too
template <class X> struct Fp4Pair : Int4Float16Pair<X, s4> {
  using typename Int4Float16Pair<X, s4>::A;
  template <class Scale>
  static __device__ __forceinline__ A w(u32 lo, Factor lo_factor, u32 hi, Factor hi_factor) {
    u32 l[4], h[4];
    eight_codes<Scale>(lo, lo_factor, l);
    eight_codes<Scale>(hi, hi_factor, h);
    return {{{l[0], h[0], l[1], h[1]}, {l[2], h[2], l[3], h[3]}}};
  }
};
template <> struct Pair<bf16, e2m1> : Fp4Pair<bf16> {};
template <> struct Pair<fp16, e2m1> : Fp4Pair<fp16> {};  // of e4m3 scales, decoded before
template <> struct Pair<e2m1, e2m1> : Fp4Pair<Number> {
  template <class Scale> static __device__ __forceinline__ B x(u32 v, Factor factor) {
    u32 f[4];
    eight_codes<Scale>(v, factor, f);
    return {{{f[0], f[1]}, {f[2], f[3]}}};
  }
};

// Where the scale of a row's group lies. Plain: rows of `stride` bytes. Blocked: tiles of 128 rows by
// 4 groups, `stride` of them a row of tiles, and in a tile (row % 32) * 16 + row / 32 * 4 + group.
template <bool blocked> __device__ __forceinline__ i64 scale_at(i64 row, i64 stride, int group) {
  if constexpr (!blocked) return row * stride + group;
  const i64 tile = (row >> 7) * stride + (group >> 2);
  return tile * 512 + (row & 31) * 16 + (row >> 5 & 3) * 4 + (group & 3);
}
// From the scales of some k to those `k` further on, a multiple of four groups
template <bool blocked, class Scale> constexpr int scale_step(int k) {
  return k / block_size<Scale> * (blocked ? 128 : 1);
}

// The scales of 32 neighbouring k of a row, as stored: one load, and a factor for each. A factor is a
// wide one if the caller says so, as it must where a scale is.
template <class Scale> struct SpanScales {
  static constexpr int count = 1;
  __device__ __forceinline__ bool wide() const { return false; }
  __device__ __forceinline__ Factor factor(int, bool) const { return {}; }
};
template <> struct SpanScales<e8m0> {
  static constexpr int count = 1;
  unsigned char codes = 0;
  __device__ __forceinline__ bool wide() const { return codes > largest_narrow; }  // or no number
  __device__ __forceinline__ Factor factor(int, bool wide) const {
    if (!wide) return {narrow_factor(codes), false};
    return wide_factor(codes);
  }
};
template <> struct SpanScales<e4m3> {
  static constexpr int count = 2;
  unsigned short codes = 0;
  __device__ __forceinline__ bool wide() const { return false; }
  __device__ __forceinline__ Factor factor(int i, bool) const {
    return {__byte_perm(e4m3_factors(codes), 0, i ? 0x3232 : 0x1010), false};
  }
};
