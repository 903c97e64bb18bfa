// NF4 codes as 16-bit fragments: sixteen numbers looked up by PRMT, whose selectors are the codes themselves.
//
// A PRMT picks four of eight bytes. So of four codes, in half a word, two of them find the lower bytes of the
// numbers, as if the codes were below eight and as if they were above, two the upper bytes; the top bits of
// the codes choose; and two more bring both bytes together: eleven instructions, the pairs in the order of k.
#pragma once
#include "operands.cuh"

// NF4 rounded to X's type, intlass_ops/nf4.py: entries four at a time, their lower bytes and their upper ones
template <class X> struct Nf4Table;
template <> struct Nf4Table<bf16> {
  static constexpr u32 low[4] = {0xca063280, 0x00ba3d92, 0xad7c25a3, 0x803910e2};
  static constexpr u32 high[4] = {0xbebfbfbf, 0x00bdbebe, 0x3e3e3e3d, 0x3f3f3f3e};
};
template <> struct Nf4Table<fp16> {
  static constexpr u32 low[4] = {0x52339200, 0x00d4ea8d, 0x68e02618, 0x00c9800d};
  static constexpr u32 high[4] = {0xb6b8b9bc, 0x00adb1b4, 0x3533312d, 0x3c393837};
};

// Where `mask` has ones those of b, elsewhere those of a
__device__ __forceinline__ u32 choose(u32 mask, u32 b, u32 a) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(d) : "r"(mask), "r"(b), "r"(a));
  return d;
}
// The numbers of four codes, from the lower half of a word. `below`: the codes without their top bits there.
// `above`: a byte of ones for each that has it.
template <class X> __device__ __forceinline__ void four_numbers(u32 (&f)[2], u32 below, u32 above) {
  using T = Nf4Table<X>;
  const u32 low = choose(above, __byte_perm(T::low[2], T::low[3], below),
                         __byte_perm(T::low[0], T::low[1], below));
  const u32 high = choose(above, __byte_perm(T::high[2], T::high[3], below),
                          __byte_perm(T::high[0], T::high[1], below));
  f[0] = __byte_perm(low, high, 0x5140);
  f[1] = __byte_perm(low, high, 0x7362);
}
constexpr u32 below_eight = 0x77777777;
template <class X> __device__ __forceinline__ void four_numbers(u32 (&f)[2], u32 codes) {
  four_numbers<X>(f, codes & below_eight, with_signs(codes << 4, codes, 0xd9c8));
}
template <class X> __device__ __forceinline__ void eight_numbers(u32 (&f)[2][2], u32 codes) {
  const u32 below = codes & below_eight, even = codes << 4;
  four_numbers<X>(f[0], below, with_signs(even, codes, 0xd9c8));
  four_numbers<X>(f[1], below >> 16, with_signs(even, codes, 0xfbea));
}

// What they are multiplied by to be the weights, as for other codes (operands.cuh): nothing
struct Nf4Codes {
  static constexpr u32 factors = 0;
  static constexpr float unit = 1.f;
};

// Pairs (k0,k1) (k2,k3) | (k4,k5) (k6,k7): activations as they are
template <class X> struct Nf4Pair : Float16Pair<X> {
  using typename Float16Pair<X>::A;
  using typename Float16Pair<X>::B;
  static __device__ __forceinline__ A w(const u32 (&lo)[1], const u32 (&hi)[1]) {
    u32 l[2][2], h[2][2];
    eight_numbers<X>(l, lo[0]);
    eight_numbers<X>(h, hi[0]);
    return {{{l[0][0], h[0][0], l[0][1], h[0][1]}, {l[1][0], h[1][0], l[1][1], h[1][1]}}};
  }
  static __device__ __forceinline__ B x(const u32 (&v)[4]) {
    return {{{v[0], v[1]}, {v[2], v[3]}}};
  }
};
template <> struct Pair<bf16, nf4> : Nf4Pair<bf16> {};
template <> struct Pair<fp16, nf4> : Nf4Pair<fp16> {};
