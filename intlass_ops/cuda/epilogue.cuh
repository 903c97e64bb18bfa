// What becomes of complete sums, the same in every GEMM: factor and bias, activation, residual, in
// fp32, and the one rounding.
//     y = activation(sum * factor + bias) + residual
#pragma once
#include "problem.cuh"

enum Activation { no_activation, relu, silu, gelu, gelu_tanh };  // config/epilogue.py

// v / (1 + 2^-u): two units of 2^-22 off, and 0 where 2^-u overflows
__device__ __forceinline__ float times_logistic(float v, float u) {
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-u));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + power));
  return v * inverse;
}
// The normal distribution is a logistic function of an odd polynomial, whose coefficients were fitted
// to an error of 3e-8: half the price of erff. The others are such functions by definition.
__device__ __forceinline__ float activated(float v) {
  constexpr int which = Config::activation;
  static_assert(no_activation <= which && which <= gelu_tanh, "an activation that is known here");
  constexpr float log2e = 1.44269504f, slope = 2.30220819f;  // log2(e) * 2 * sqrt(2 / pi)
  if constexpr (which == relu) return v < 0.f ? 0.f : v;     // fmaxf would lose a NaN
  if constexpr (which == silu) return times_logistic(v, v * log2e);
  if constexpr (which == gelu_tanh)
    return times_logistic(v, v * (slope + slope * .044715f * v * v));
  if constexpr (which == gelu) {
    constexpr float c[] = {5.067548603e-09f,  -3.816399214e-07f, 1.143991813e-05f,
                           -1.595803042e-04f, -9.404854063e-05f, 1.048351228e-01f,
                           2.302209377e+00f};
    const float square = v * v;
    float sum = c[0];
#pragma unroll
    for (int i = 1; i < 7; ++i) sum = sum * square + c[i];
    return times_logistic(v, v * sum);
  }
  return v;
}
__device__ __forceinline__ float finished(float v, Out residual) {
  v = activated(v);
  return Config::residual ? v + as_float(residual) : v;
}
__device__ __forceinline__ float output(float sum, float factor, float bias, Out residual) {
  return finished(sum * factor + bias, residual);
}

__device__ __forceinline__ const Out* residual_at(const Params& p, i64 m, i64 n) {
  return static_cast<const Out*>(p.residual) + m * p.residual_row + n;
}

// That of a tile into the L2 cache, while the tile is being summed
template <int tokens, int rows, int threads>
__device__ __forceinline__ void prefetch_residual(const Params& p, i64 m0, i64 n0, int thread) {
  if constexpr (Config::residual) {
    constexpr int line = 128 / sizeof(Out), lines = (rows + line - 1) / line;
#pragma unroll 1
    for (int i = thread; i < tokens * lines; i += threads) {
      const i64 m = m0 + i / lines, n = n0 + i % lines * line;
      if (m < p.m && n < p.n) prefetch_l2(residual_at(p, m, n));
    }
  }
}
