// Codes of a table as 16-bit fragments: sixteen numbers looked up by PRMT, whose selectors are the codes
// themselves.
//
// A PRMT picks four of eight bytes. So of four codes, in half a word, two of them find the lower bytes of the
// numbers, as if the codes were below eight and as if they were above, two the upper bytes; the top bits of
// the codes choose; and two more bring both bytes together: eleven instructions, the pairs in the order of k.
#pragma once
#include "operands.cuh"

// Of weights of kind W, rounded to X's type, intlass_ops/lut4.py: entries four at a time, their lower bytes and
// their upper ones
template <class W, class X> struct Lut4Table;
template <> struct Lut4Table<nf4, bf16> {
  static constexpr u32 low[4] = {0xca063280, 0x00ba3d92, 0xad7c25a3, 0x803910e2};
  static constexpr u32 high[4] = {0xbebfbfbf, 0x00bdbebe, 0x3e3e3e3d, 0x3f3f3f3e};
};
template <> struct Lut4Table<nf4, fp16> {
  static constexpr u32 low[4] = {0x52339200, 0x00d4ea8d, 0x68e02618, 0x00c9800d};
  static constexpr u32 high[4] = {0xb6b8b9bc, 0x00adb1b4, 0x3533312d, 0x3c393837};
};
template <> struct Lut4Table<iq4nl, bf16> {
  static constexpr u32 low[4] = {0x82a6d0fe, 0x20b00c44, 0x18c85080, 0xe2b28a54};
  static constexpr u32 high[4] = {0xc2c2c2c2, 0xc1c1c2c2, 0x4241413f, 0x42424242};
};
template <> struct Lut4Table<iq4nl, fp16> {
  static constexpr u32 low[4] = {0x103080f0, 0x00806020, 0xc0408000, 0x109050a0};
  static constexpr u32 high[4] = {0xd4d5d6d7, 0xc9cdd0d2, 0x504e4a3c, 0x57555452};
};
template <> struct Lut4Table<fp4, bf16> {
  static constexpr u32 low[4] = {0xc0800000, 0xc0804000, 0xc0800000, 0xc0804000};
  static constexpr u32 high[4] = {0x3f3f3f00, 0x40404040, 0xbfbfbf00, 0xc0c0c0c0};
};
template <> struct Lut4Table<fp4, fp16> {
  static constexpr u32 low[4] = {0x00000000, 0x00000000, 0x00000000, 0x00000000};
  static constexpr u32 high[4] = {0x3e3c3800, 0x46444240, 0xbebcb800, 0xc6c4c2c0};
};
template <> struct Lut4Table<bnbfp4, bf16> {
  static constexpr u32 low[4] = {0x40008000, 0x4000c080, 0x40008000, 0x4000c080};
  static constexpr u32 high[4] = {0x43433f00, 0x42424242, 0xc3c3bf00, 0xc2c2c2c2};
};
template <> struct Lut4Table<bnbfp4, fp16> {
  static constexpr u32 low[4] = {0x00000000, 0x00000000, 0x00000000, 0x00000000};
  static constexpr u32 high[4] = {0x5a583c00, 0x52505654, 0xdad8bc00, 0xd2d0d6d4};
};

// Where `mask` has ones those of b, elsewhere those of a
__device__ __forceinline__ u32 choose(u32 mask, u32 b, u32 a) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(d) : "r"(mask), "r"(b), "r"(a));
  return d;
}
// The numbers of four codes, from the lower half of a word. `below`: the codes without their top bits there.
// `above`: a byte of ones for each that has it.
template <class X, class W>
__device__ __forceinline__ void four_numbers(u32 (&f)[2], u32 below, u32 above) {
  using T = Lut4Table<W, X>;
  const u32 low = choose(above, __byte_perm(T::low[2], T::low[3], below),
                         __byte_perm(T::low[0], T::low[1], below));
  const u32 high = choose(above, __byte_perm(T::high[2], T::high[3], below),
                          __byte_perm(T::high[0], T::high[1], below));
  f[0] = __byte_perm(low, high, 0x5140);
  f[1] = __byte_perm(low, high, 0x7362);
}
constexpr u32 below_eight = 0x77777777;
template <class X, class W> __device__ __forceinline__ void four_numbers(u32 (&f)[2], u32 codes) {
  four_numbers<X, W>(f, codes & below_eight, with_signs(codes << 4, codes, 0xd9c8));
}
template <class X, class W>
__device__ __forceinline__ void eight_numbers(u32 (&f)[2][2], u32 codes) {
  const u32 below = codes & below_eight, even = codes << 4;
  four_numbers<X, W>(f[0], below, with_signs(even, codes, 0xd9c8));
  four_numbers<X, W>(f[1], below >> 16, with_signs(even, codes, 0xfbea));
}

// What they are multiplied by to be the weights, as for other codes (operands.cuh): nothing
struct Lut4Codes {
  static constexpr u32 factors = 0;
  static constexpr float unit = 1.f;
};

// Pairs (k0,k1) (k2,k3) | (k4,k5) (k6,k7): activations as they are
template <class X, class W> struct Lut4Pair : Float16Pair<X> {
  using typename Float16Pair<X>::A;
  using typename Float16Pair<X>::B;
  static __device__ __forceinline__ A w(const u32 (&lo)[1], const u32 (&hi)[1]) {
    u32 l[2][2], h[2][2];
    eight_numbers<X, W>(l, lo[0]);
    eight_numbers<X, W>(h, hi[0]);
    return {{{l[0][0], h[0][0], l[0][1], h[0][1]}, {l[1][0], h[1][0], l[1][1], h[1][1]}}};
  }
  static __device__ __forceinline__ B x(const u32 (&v)[4]) {
    return {{{v[0], v[1]}, {v[2], v[3]}}};
  }
};
template <class X> struct Pair<X, nf4> : Lut4Pair<X, nf4> {};
template <class X> struct Pair<X, iq4nl> : Lut4Pair<X, iq4nl> {};
template <class X> struct Pair<X, fp4> : Lut4Pair<X, fp4> {};
template <class X> struct Pair<X, bnbfp4> : Lut4Pair<X, bnbfp4> {};

template <class W>
constexpr bool looks_up =
    same<W, nf4>::value || same<W, iq4nl>::value || same<W, fp4>::value || same<W, bnbfp4>::value;
