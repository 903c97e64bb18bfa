// What the two kernels for few tokens share: how a lane's words of W are decoded, and the units of
// the sums that come of it.
#pragma once
#include "problem.cuh"

using D = FewShifts<X, W>;  // the fragments of P, decoded with fewer instructions
constexpr int tiles_n = Config::tiles_n, rows = 16 * tiles_n;
constexpr int chunk_k = 512 / W::bits;                   // k of 64 bytes of a row
constexpr int lane_k = chunk_k / 4, spans = lane_k / 8;  // k of a lane, in words of eight
constexpr int passes = Config::groups_per_chunk;         // groups a chunk holds, at least one
constexpr bool grouped = grouping != channel;
static_assert(!has_a_zero, "a zero point of the activations needs row sums, which gemm.cu forms");
// Zero points that are bytes leave the codes as these become fragments: exact, and free. Others
// multiply sums of x.
constexpr bool zeros_in_codes = has_zeros && W::bits == 4 && X::bits == 16 && sizeof(Zero) == 1;
constexpr bool zeros_in_sums = has_zeros && !zeros_in_codes;
static_assert(passes == 1 || passes == 2 || passes == 4, "a group is whole lanes of a chunk");

// D::unit, split so that the largest scale does not overflow: what exceeds 1 multiplies the sums.
constexpr float lift = D::unit > 1.f ? D::unit : 1.f, unit = D::unit / lift;
template <class Number> __device__ __forceinline__ float lifted(Number sum) {
  return lift == 1.f ? value(sum) : value(sum) * lift;
}
__device__ __forceinline__ float scale_in_units(Scale s) { return as_float(s) * unit; }
__device__ __forceinline__ float zero_in_units(Zero z) {
  return (as_float(z) - code_offset<W>)*(D::unit_x / unit);
}

// The type and the value of `first` or of `second`
template <bool pick_first, class First, class Second> struct Select {
  using type = First;
  static __device__ __forceinline__ First of(First first, Second) { return first; }
};
template <class First, class Second> struct Select<false, First, Second> {
  using type = Second;
  static __device__ __forceinline__ Second of(First, Second second) { return second; }
};
// Grouped: fp32 totals. One scale a row: the accumulators, so that integers are summed exactly; the
// scale comes after.
using Sum = typename Select<grouped, float, Acc>::type;

// An output from its sum over all of K and, for zero points, the sum of its activations.
__device__ __forceinline__ void finish(const Params& p, i64 n, int m, Sum y, Acc sum_x,
                                       float factor) {
  float v = grouped ? value(y) : lifted(y);
  if constexpr (!grouped) {
    if constexpr (zeros_in_sums)
      v -= zero_in_units(static_cast<const Zero*>(p.zeros)[n * p.zero_row]) * value(sum_x);
    // an empty sum is zero, whatever the scale
    v = p.k ? v * scale_in_units(static_cast<const Scale*>(p.scales)[n * p.scale_row]) : 0.f;
  }
  store_rounded(static_cast<Out*>(p.out) + m * p.n + n, v * factor + bias_of(p, n));
}
