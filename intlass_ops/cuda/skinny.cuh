// What the two kernels for few tokens share: how a lane's words of W are decoded, and the units of
// the sums that come of it.
#pragma once
#include "epilogue.cuh"

// FP4 takes the scale of its block as it becomes a fragment
template <class X> struct FewShifts<X, e2m1> : Pair<X, e2m1> {
  using Row = Factor;  // of a block
  static __device__ __forceinline__ Row zero(float) { return {}; }
  static __device__ __forceinline__ typename Pair<X, e2m1>::A w(const u32 (&lo)[1], Row lo_factor,
                                                                const u32 (&hi)[1], Row hi_factor) {
    return Pair<X, e2m1>::template w<Scale>(lo[0], lo_factor, hi[0], hi_factor);
  }
};
using D = FewShifts<X, W>;  // the fragments of P, decoded with fewer instructions
constexpr int tiles_n = Config::tiles_n, rows = 16 * tiles_n;
constexpr int chunk_k = 512 / W::bits;                   // k of 64 bytes of a row
constexpr int lane_k = chunk_k / 4, spans = lane_k / 8;  // k of a lane, in words of eight
constexpr int passes = Config::groups_per_chunk;         // groups a chunk holds, at least one
// FP4 takes its blocks' scales as it becomes fragments, and one sum goes on for all of K
constexpr bool scaled = same<W, e2m1>::value, fp4_x = same<X, e2m1>::value;
constexpr bool grouped = grouping != channel && !scaled;
static_assert(scaled == (grouping == scaled_weights), "of all weights, FP4 alone takes its scales");
static_assert(!has_a_zero, "a zero point of the activations needs row sums, which gemm.cu forms");
// Zero points that are bytes leave the codes as these become fragments: exact, and free. Others
// multiply sums of x.
constexpr bool zeros_in_codes = has_zeros && W::bits == 4 && X::bits == 16 && sizeof(Zero) == 1;
constexpr bool zeros_in_sums = has_zeros && !zeros_in_codes;
static_assert(passes == 1 || passes == 2 || passes == 4, "a group is whole lanes of a chunk");

// D::unit, split so that the largest scale does not overflow: what exceeds 1 multiplies the sums.
constexpr float lift = D::unit > 1.f ? D::unit : 1.f, unit = D::unit / lift;
__device__ __forceinline__ float scale_in_units(Scale s) { return as_float(s) * unit; }
__device__ __forceinline__ float zero_in_units(Zero z) {
  return (as_float(z) - code_offset<W>)*(1 / D::unit_w);
}

// Whatever zero points come to
__device__ __forceinline__ float zero_of_codes(Zero z) {
  return zeros_in_codes ? as_float(z) : zero_in_units(z);
}

// Of FP4: the scales of a lane's k of a chunk, and what the sums are too small by
using LaneScales = SpanScales<Scale>;
constexpr int chunk_scales = scale_step<Config::blocked, Scale>(chunk_k);  // bytes to the next ones
constexpr float sum_unit = (scaled ? block_unit<Scale> : 1.f) * (fp4_x ? block_unit<Scale> : 1.f);
__device__ __forceinline__ const unsigned char* lane_scales(const void* scales, i64 row, i64 stride,
                                                            int quarter) {
  return static_cast<const unsigned char*>(scales) +
         scale_at<Config::blocked>(row, stride, quarter * LaneScales::count);
}
__device__ __forceinline__ LaneScales load_scales_of(const unsigned char* from, int chunk) {
  return *reinterpret_cast<const LaneScales*>(from + i64(chunk) * chunk_scales);
}
template <class Scale> __device__ __forceinline__ Factor block_factor(unsigned char code) {
  if constexpr (scaled)
    return SpanScales<Scale>{code}.factor(0, true);
  else
    return {};
}
// Whether a lane of the warp has a wide one: a branch that all take, since one in the midst of the work
// costs more than it saves
__device__ __forceinline__ bool any_wide(bool mine) {
  if constexpr (scaled && same<Scale, e8m0>::value)
    return __any_sync(~0u, mine);
  else
    return false;
}
// An activation's fragment from its words
template <class Pair>
__device__ __forceinline__ typename Pair::B token_fragment(const u32 (&v)[span_words<X>],
                                                           Factor factor) {
  if constexpr (fp4_x)
    return Pair::template x<Scale>(v[0], factor);
  else
    return Pair::x(v);
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
__device__ __forceinline__ void finish(const Params& p, u32 n, u32 m, Sum y, Acc sum_x,
                                       float factor) {
  float v = value(y);
  if constexpr (!grouped && zeros_in_sums)
    v -= zero_in_units(static_cast<const Zero*>(p.zeros)[n * p.zero_row]) * value(sum_x);
  v *= lift;
  if constexpr (!grouped) {
    if constexpr (!scaled)  // an empty sum is zero, whatever the scale
      v = p.k ? v * scale_in_units(static_cast<const Scale*>(p.scales)[n * p.scale_row]) : 0.f;
  }
  const Out residual = Config::residual ? *residual_at(p, m, n) : Out();
  store_rounded(static_cast<Out*>(p.out) + m * p.n + n, output(v, factor, bias_of(p, n), residual));
}
