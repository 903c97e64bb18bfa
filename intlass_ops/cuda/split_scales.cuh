// Scales and zero points of groups that bf16 has not the bits for, for weights under bf16 activations that
// take their scales: each as two numbers of bf16, side by side in a word.
//
//     scale = high + low, within 2^-15 of it (of an fp16 one nothing is lost)
//     code - zero = (code - near) - (zero - near), `near` a multiple of 1/16, so the first is exact
//     weight = fma(code - near, high, fma(code - near, low, rest)),  rest = -(zero - near) * scale
//
// The last FMA rounds as a dequantised model does, to within 2^-8 of the weight; what comes before adds no more
// than 2^-14 of it, and 2^-12 of the scale where zero points are no integers. (Beyond 16, `near` keeps
// but 8 bits of a zero point, and beyond 128 the difference from it is rounded too.)
#pragma once
#include "problem.cuh"

template <class T> constexpr bool is_float = same<T, float>::value || same<T, __half>::value;
constexpr bool split_scales = (grouping == scaled_weights || grouping == scaled_spans) &&
                              same<X, bf16>::value && !same<W, e2m1>::value &&
                              (!same<Scale, __nv_bfloat16>::value || (has_zeros && is_float<Zero>));

// FP8 codes under bf16 that take scales are left as they were moved: the scale has the factor, less what leaves
// room for scales below 2^40. Sums are too small by that.
constexpr bool fp8_takes_scales = (grouping == scaled_weights || grouping == scaled_spans) &&
                                  same<X, bf16>::value && same<W, e4m3>::value;
constexpr float fp8_unit = fp8_takes_scales ? 4294967296.f : 1.f;                       // 2^32
constexpr float scale_factor = fp8_takes_scales ? 309485009821345068724781056.f : 1.f;  // 2^88

// One of the two in a word, twice: instructions of bf16 pairs read either half so, without a PRMT
__device__ __forceinline__ u32 low_twice(u32 v) {
  u32 d;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l};}" : "=r"(d) : "r"(v));
  return d;
}
__device__ __forceinline__ u32 high_twice(u32 v) {
  u32 d;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h};}" : "=r"(d) : "r"(v));
  return d;
}
__device__ __forceinline__ float upper_bits(float v) {
  return __uint_as_float(__float_as_uint(v) & 0xffff0000);
}

// The scale: high and low
__device__ __forceinline__ u32 split_scale(float scale) {
  const float high = upper_bits(scale);
  return halves<bf16>(high, scale - high);
}
// Minus the zero point, in units of what a code of 1 is: minus `near`, and the rest
__device__ __forceinline__ u32 split_offset(float offset, float unit, float scale) {
  if (!is_float<Zero> && !same<Zero, __nv_bfloat16>::value) return halves<bf16>(offset, 0.f);
  const float step = 1.5f * (1 << 23) / 16 * unit;  // beside it, floats are multiples of unit / 16
  const float near = upper_bits(offset + step - step);
  return halves<bf16>(near, (offset - near) * scale);
}
// Two codes less `near`, times what the scale is split into
__device__ __forceinline__ u32 times_split(u32 codes, u32 scale, u32 offset) {
  const u32 low = high_twice(scale);
  const u32 rest = has_zeros ? fma2<bf16>(codes, low, high_twice(offset)) : mul2<bf16>(codes, low);
  return fma2<bf16>(codes, low_twice(scale), rest);
}
