// A weight of x @ w from its nibble, as transposed.cu and transposed_wgmma.cu multiply by it.
#pragma once
#include "memory.cuh"

using X = Config::x_kind;
constexpr bool has_zeros = Config::has_zeros;  // of x's type, with unsigned codes

// The weights of two rows from their nibbles, which lie at bits 0 and 16
__device__ __forceinline__ u32 decoded(u32 nibbles, u32 s, u32 z) {
  using C = half_words<X>;
  constexpr u32 flip = C::magic ^ (has_zeros ? 0u : 0x00080008u);
  constexpr u32 minus_zero = 0x80008000u;
  u32 q = and_xor(nibbles, 0x000f000f, flip);
  if constexpr (has_zeros)
    q = fma2<X>(z, C::minus_one, fma2<X>(q, C::one, C::magic | minus_zero));
  else
    q = fma2<X>(q, C::one, C::minus_offset4);
  return fma2<X>(q, s, minus_zero);
}
