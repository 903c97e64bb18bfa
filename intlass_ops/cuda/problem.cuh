// What one GEMM is, for every kernel family: its parameters, its types, its scales.
#pragma once
#include "expert_tile.cuh"
#include "fp4.cuh"
#include "lut4.cuh"

// [M, N] of the output's type; rows start aligned to 16 bytes, and end where 32 more could be read.
// Kernels that add none know nothing of it.
template <bool> struct Residual {
  const void* residual;
  i64 residual_row;  // elements
};
template <> struct Residual<false> {
  static constexpr const void* residual = nullptr;
  static constexpr i64 residual_row = 0;
};

// Weights [experts, N, ...] (experts.cuh): the others' pointers and strides are of the first expert then,
// and of all tokens.
template <bool> struct Experts {};
template <> struct Experts<true> {
  const ExpertTile* tiles;
  i64 together;  // tiles of tokens whose blocks are neighbours, where each has blocks of its own
  i64 w_expert, scale_expert, zero_expert, bias_expert,
      alpha_expert;  // bytes from one to the next
};
// Configurations of kernels that know of none do not say so.
template <class Config, class = int> struct HasExperts { static constexpr bool value = false; };
template <class Config> struct HasExperts<Config, decltype(int(Config::experts))> {
  static constexpr bool value = Config::experts;
};
constexpr bool of_experts = HasExperts<Config>::value;

struct Params : Residual<Config::residual>, Experts<of_experts> {
  const char *x, *w;
  const void *scales, *zeros, *a_scale, *a_zero, *alpha, *bias;
  void* out;
  float* workspace;                 // split_k > 1: [tiles, split_k, values of a block]
  int* arrivals;                    // split_k > 1: one zero per tile, left at zero
  i64 m, n, k, x_stride, w_stride;  // strides in bytes
  i64 group_size, scale_row, scale_group, zero_row,
      zero_group;  // strides in elements, 0 to broadcast
  i64 a_scale_row, a_zero_row, bias_dtype, alpha_dtype, a_scale_dtype, a_zero_dtype;
};

using X = Config::x_kind;
using W = Config::w_kind;
using P = Pair<X, W>;
using Acc = typename P::Acc;
using Scale = Config::scale_type;
using Zero = Config::zero_type;
using Out = Config::out_type;
constexpr bool has_zeros = Config::has_zeros, has_a_zero = Config::has_a_zero;

// channel: one scale a row, applied after all of K. tile: groups of whole block_k. span: groups of
// whole spans. straddling: a group may end inside a span (group_size 16, 48, ...). scaled_weights:
// each weight takes its scale before it is multiplied, in groups of whole tiles; scaled_spans: of one span.
// column_groups: see skinny.cuh
enum Grouping {
  channel,
  tile_groups,
  span_groups,
  straddling_groups,
  scaled_weights,
  column_groups,
  scaled_spans
};
constexpr int grouping = Config::grouping;

// Scale and zero point in the units of the accumulators: total += s * (acc - z * xsum). The units are
// powers of two, so nothing is rounded; u4 reaches the MMA as q - 8.
__device__ __forceinline__ float in_units_of_scale(Scale s) { return as_float(s) * P::unit; }
__device__ __forceinline__ float in_units_of_zero(Zero z) {
  return (as_float(z) - code_offset<W>)*(1 / P::unit);
}
__device__ __forceinline__ float scale_of(const Params& p, i64 row, i64 group) {
  return in_units_of_scale(
      static_cast<const Scale*>(p.scales)[row * p.scale_row + group * p.scale_group]);
}
__device__ __forceinline__ float zero_of(const Params& p, i64 row, i64 group) {
  return in_units_of_zero(
      static_cast<const Zero*>(p.zeros)[row * p.zero_row + group * p.zero_group]);
}
__device__ __forceinline__ float alpha_of(const Params& p) {
  return p.alpha ? load_as_float(p.alpha, 0, p.alpha_dtype) : 1.f;
}
__device__ __forceinline__ float a_scale_of(const Params& p, i64 m) {
  if constexpr (same<X, e2m1>::value) return 1.f;  // those of its blocks are in the sums
  return p.a_scale ? load_as_float(p.a_scale, m * p.a_scale_row, p.a_scale_dtype) : 1.f;
}
__device__ __forceinline__ float a_zero_of(const Params& p, i64 m) {
  return has_a_zero ? load_as_float(p.a_zero, m * p.a_zero_row, p.a_zero_dtype) - code_offset<X>
                    : 0.f;
}
__device__ __forceinline__ float bias_of(const Params& p, i64 n) {
  return p.bias ? load_as_float(p.bias, n, p.bias_dtype) : 0.f;
}

// An accumulator as a number: exact per group, and rounded to odd where int32 exceeds 24 bits
__device__ __forceinline__ float value(float v) { return v; }
__device__ __forceinline__ float value(int v) {
  return grouping == channel ? to_float_odd(v) : float(v);
}
