// A weight of x @ w from its nibble, as transposed.cu and transposed_wgmma.cu multiply by it.
#pragma once
#include "memory.cuh"

using X = Config::x_kind;
constexpr bool has_zeros = Config::has_zeros;  // of x's type, with unsigned codes
constexpr float unit = Nibbles<X>::unit;       // what sums are too small by

// What `decoded` takes of two rows' zero points
__device__ __forceinline__ u32 prepared(u32 zeros) {
  return same<X, bf16>::value ? mul2<X>(zeros, 0xbc80bc80) : zeros;  // -1 / unit
}

// The weights of two rows, over `unit`, from a byte of each, which half of a word has twice: q - z and
// its product with s, each rounded to X's type.
template <bool odd> __device__ __forceinline__ u32 decoded(u32 bytes, u32 s, u32 z) {
  using N = Nibbles<X>;
  constexpr u32 nibble = odd ? 0x00f000f0 : 0x000f000f, eight = odd ? 0x00800080 : 0x00080008;
  constexpr u32 factor = (odd ? N::factors >> 16 : N::factors & 0xffff) * 0x10001u;
  constexpr u32 minus_8 = (odd ? N::minus_8 >> 16 : N::minus_8 & 0xffff) * 0x10001u;
  u32 q = and_xor(bytes, nibble, N::magic ^ (has_zeros ? 0u : eight));
  if constexpr (!has_zeros) {
    q = fma2<X>(q, factor, minus_8);
  } else if constexpr (same<X, bf16>::value) {
    q = fma2<X>(q, factor, z);
  } else {  // a fraction as zero point, less 1024, would be rounded
    constexpr u32 minus_0 = odd ? 0xd400d400 : 0xe400e400;
    q = fma2<X>(z, half_words<X>::minus_one, fma2<X>(q, factor, minus_0));
  }
  return mul2<X>(q, s);
}
