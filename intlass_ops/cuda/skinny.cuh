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
// Other codes may too: the difference from the zero point, times the scale, each rounded to X's type (as in
// gemm_ahead.cuh and hopper_weights.cuh)
template <class X, class W> struct ScaledCodes : FewShifts<X, W> {
  using Codes = FewShifts<X, W>;
  static constexpr float unit = 1.f;  // the scale has that of the codes
  // fp16 has no room for a fraction beside the 1024 that codes lose: it is subtracted by itself
  static constexpr bool fractions = has_zeros && same<X, fp16>::value &&
                                    (same<Zero, __half>::value || same<Zero, __nv_bfloat16>::value);
  struct Row : Codes::Row { u32 scale, minus_zero; };
  static __device__ __forceinline__ Row zero(float) { return {}; }
  static __device__ __forceinline__ Row row_of(Scale s, Zero z) {
    const float in_units = as_float(s) * Codes::unit, lost = has_zeros ? as_float(z) : 8.f;
    return {Codes::zero(fractions ? 0.f : lost), halves<X>(in_units, in_units),
            halves<X>(-lost, -lost)};
  }
  static __device__ __forceinline__ u32 take(u32 codes, const Row& row) {
    if constexpr (fractions) codes = fma2<X>(codes, half_words<X>::one, row.minus_zero);
    return mul2<X>(codes, row.scale);
  }
  template <int words>
  static __device__ __forceinline__ typename Pair<X, W>::A w(const u32 (&lo)[words], Row lo_row,
                                                             const u32 (&hi)[words], Row hi_row) {
    typename Pair<X, W>::A a = Codes::w(lo, lo_row, hi, hi_row);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      a.r[i / 4][i % 4] = take(a.r[i / 4][i % 4], i % 2 ? hi_row : lo_row);
    return a;
  }
};
constexpr bool fp4_w = same<W, e2m1>::value, fp4_x = same<X, e2m1>::value;
// Weights take their scales as they become fragments, and one sum goes on for all of K
constexpr bool scaled = grouping == scaled_weights;
constexpr bool grouped = grouping != channel && !scaled;
static_assert(scaled || !fp4_w, "the scales of blocks are for their codes");
static_assert(!has_a_zero, "a zero point of the activations needs row sums, which gemm.cu forms");

// The fragments of P, decoded with fewer instructions
template <bool> struct Decoder { using type = FewShifts<X, W>; };
template <> struct Decoder<true> { using type = ScaledCodes<X, W>; };
using D = Decoder<scaled && !fp4_w>::type;
constexpr int tiles_n = Config::tiles_n, rows = 16 * tiles_n;
constexpr int chunk_k = 512 / W::bits;                   // k of 64 bytes of a row
constexpr int lane_k = chunk_k / 4, spans = lane_k / 8;  // k of a lane, in words of eight
constexpr int chunk_groups = Config::groups_per_chunk;   // that a chunk holds, at least one
static_assert(chunk_groups == 1 || chunk_groups == 2 || chunk_groups == 4,
              "a group is whole lanes of a chunk");
// Groups within a chunk have sums of their own in one of two ways, and each lane fetches the scale of the
// group that its 16 bytes lie in.
// Few tokens: a column of x has the k of one token and one group, zeros for the others, so that those of
// a product are the sums of each group, and a lane's own belong to its group. Eight hold so many tokens:
constexpr bool in_columns = grouping == column_groups;
constexpr int column_tokens = in_columns ? 8 / chunk_groups : 8;
// More tokens, INT4: a lane takes one word of each of its quad's 16 bytes, so that a span, the words of one
// number, lies in one group. Words and scales are handed round by shared memory.
constexpr bool spread = grouped && !in_columns && chunk_groups > 1;
static_assert(!spread || W::bits == 4, "16 bytes of INT8 are half a span");
constexpr bool own_group = in_columns || spread;
constexpr int group_spans = spread ? spans / chunk_groups : spans;  // of a group in a chunk
// Where a lane's words lie in a chunk: the first k, and from one to the next
__device__ __forceinline__ int first_k(int quarter) { return quarter * (spread ? 8 : lane_k); }
constexpr int word_k = spread ? 32 : 8;
// Where the lanes of a warp leave their 16 bytes of eight rows, and which of them each gives ldmatrix the
// address of: those that are written or read at once are in all banks
__device__ __forceinline__ int place_of(int row, int quarter) {
  return quarter * 8 + (row ^ 2 * quarter);
}
__device__ __forceinline__ int own_place(int lane) {
  return spread ? place_of(lane / 4, lane % 4) : lane;
}
// Spans that a lane has words and scales of at a time: 16 tokens leave registers for fewer
template <int tiles_m> constexpr int spans_at_once = spread && tiles_m > 1 ? spans / 2 : spans;
template <int at_once> __device__ __forceinline__ int read_place(int lane) {
  if constexpr (!spread) return lane;
  return at_once == 4 ? place_of(lane % 8, lane / 8)
                      : lane / 16 * 32 + place_of(lane % 8, lane / 8 % 2);
}
// A lane's words of piece i from span t on, or of two pieces together. `from`: its read_place of the first.
template <int at_once, int count>
__device__ __forceinline__ void load_piece(u32 (&v)[count][4], const char* from, int i, int t) {
  if constexpr (!spread) {
    load_shared(v[i], from + i * 512);
  } else if constexpr (at_once == 4) {
    load_matrices<4>(v[i], smem_address(from + i * 512));
  } else if (i % 2 == 0) {
    u32 r[4];
    const u32 at = smem_address(from + i * 512);
    load_matrices<4>(r, t ? (at ^ 64) + 256 : at);  // place_of two quarters further
#pragma unroll
    for (int h = 0; h < 4; ++h) v[i + h / 2][t + h % 2] = r[h];
  }
}
__device__ __forceinline__ int first_group(int chunk) {
  return chunk_groups > 1 ? chunk * chunk_groups : chunk / Config::chunks_per_group;
}
__device__ __forceinline__ int group_of_lane(int quarter) {  // of a chunk's
  return quarter / (4 / chunk_groups);
}
__device__ __forceinline__ int token_of_column(int tile, int column) {
  return tile * column_tokens + (in_columns ? column % column_tokens : column);
}
// Whether the column of x that a lane's fragments are of has the lane's k
__device__ __forceinline__ bool has_column(int lane) {
  return lane / 4 / column_tokens == group_of_lane(lane % 4);
}
// Zero points that are bytes leave the codes as these become fragments: exact, and free. So do all of
// codes that take their scales. Others multiply sums of x.
constexpr bool zeros_in_codes =
    has_zeros && W::bits == 4 && X::bits == 16 && (scaled || sizeof(Zero) == 1);
constexpr bool zeros_in_sums = has_zeros && !zeros_in_codes;

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

// The scales of a lane's k of a chunk: of FP4, or of the group that they lie in
template <class D> struct GroupScale {
  static constexpr int count = 1;
  Scale s = {};
  Zero z = {};
  __device__ __forceinline__ bool wide() const { return false; }
  __device__ __forceinline__ typename D::Row factor(int, bool) const { return D::row_of(s, z); }
};
template <bool> struct ScalesOfLane { using type = SpanScales<Scale>; };
template <> struct ScalesOfLane<true> { using type = GroupScale<D>; };
using LaneScales = ScalesOfLane<scaled && !fp4_w>::type;

// What FP4's sums are too small by, and where its scales lie
constexpr float sum_unit = (fp4_w ? block_unit<Scale> : 1.f) * (fp4_x ? block_unit<Scale> : 1.f);
constexpr int chunk_scales = scale_step<Config::blocked, Scale>(chunk_k);  // bytes to the next ones
__device__ __forceinline__ const unsigned char* lane_scales(const void* scales, i64 row, i64 stride,
                                                            int quarter) {
  return static_cast<const unsigned char*>(scales) +
         scale_at<Config::blocked>(row, stride, quarter * SpanScales<Scale>::count);
}
template <class Scales = SpanScales<Scale>>
__device__ __forceinline__ Scales load_scales_of(const unsigned char* from, int chunk) {
  return *reinterpret_cast<const Scales*>(from + i64(chunk) * chunk_scales);
}
// Where the scales of a row lie for a lane, which has a quarter of each chunk
template <class Scales> struct RowOfScales {
  const unsigned char* blocks;

  __device__ __forceinline__ RowOfScales() {}
  __device__ __forceinline__ RowOfScales(const Params& p, i64 row, int quarter)
      : blocks(lane_scales(p.scales, row, p.scale_row, quarter)) {}
  __device__ __forceinline__ Scales load(const Params&, int chunk) const {
    return load_scales_of(blocks, chunk);
  }
  __device__ __forceinline__ void prefetch(const Params&, int chunk) const {
    prefetch_l2(blocks + i64(chunk) * chunk_scales);
  }
};
template <class D> struct RowOfScales<GroupScale<D>> {
  const Scale* s;
  const Zero* z;

  __device__ __forceinline__ RowOfScales() {}
  __device__ __forceinline__ RowOfScales(const Params& p, i64 row, int quarter) {
    const int group = group_of_lane(quarter);
    s = static_cast<const Scale*>(p.scales) + row * p.scale_row + group * p.scale_group;
    if constexpr (has_zeros)
      z = static_cast<const Zero*>(p.zeros) + row * p.zero_row + group * p.zero_group;
  }
  __device__ __forceinline__ GroupScale<D> load(const Params& p, int chunk) const {
    GroupScale<D> v;
    v.s = s[first_group(chunk) * int(p.scale_group)];
    if constexpr (has_zeros) v.z = z[first_group(chunk) * int(p.zero_group)];
    return v;
  }
  __device__ __forceinline__ void prefetch(const Params& p, int chunk) const {
    prefetch_l2(s + first_group(chunk) * int(p.scale_group));
  }
};
using ScaleRow = RowOfScales<LaneScales>;
template <class Scale> __device__ __forceinline__ Factor block_factor(unsigned char code) {
  if constexpr (fp4_x)
    return SpanScales<Scale>{code}.factor(0, true);
  else
    return {};
}
// Whether a lane of the warp has a wide one: a branch that all take, since one in the midst of the work
// costs more than it saves
__device__ __forceinline__ bool any_wide(bool mine) {
  if constexpr (same<Scale, e8m0>::value)
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

// What the lane of the quad has that fetched it for piece i: each its own, where it has a group to itself
__device__ __forceinline__ float from_quad(float v, int i, int lane) {
  return in_columns ? v : __shfl_sync(~0u, v, lane / 4 * 4 + i % 4);
}
// Where groups are spread, a lane leaves what it has fetched for eight rows in shared memory, and reads what
// its quad has left, for some spans
constexpr int left_floats = spread ? 32 * (1 + has_zeros) : 0;
template <class D>
__device__ __forceinline__ void leave_scales(float* left, Scale s, Zero z, int lane) {
  left[lane] = scale_in_units(s);
  if constexpr (zeros_in_codes)
    left[32 + lane] = __uint_as_float(D::zero(as_float(z)).bottom);
  else if constexpr (has_zeros)
    left[32 + lane] = zero_in_units(z);
}
template <int tiles_m> struct QuadScales {
  float s[4], z[4];  // of a chunk's 16-byte pieces

  __device__ __forceinline__ void load(const float* left, int t, int lane) {
    load(s, left + lane / 4 * 4, t);
    if constexpr (has_zeros) load(z, left + 32 + lane / 4 * 4, t);
  }
  // All at first, or with 16 tokens, which leave too few registers, one at a time
  static __device__ __forceinline__ void load(float (&v)[4], const float* from, int t) {
    if constexpr (tiles_m > 1)
      v[t] = static_cast<const volatile float*>(from)[t];
    else if (t == 0)
      load_shared(reinterpret_cast<u32(&)[4]>(v), reinterpret_cast<const char*>(from));
  }
};
// What codes lose as they become fragments, from a zero point as it was fetched or left
template <class D> __device__ __forceinline__ typename D::Row row_zero(float z) {
  if constexpr (spread && zeros_in_codes)
    return D::of_bottom(__float_as_uint(z));
  else
    return D::zero(zeros_in_codes ? z : 8.f);
}

// The sums of a token over the groups of each chunk, which lie in lanes of a quad
template <int tokens, int tiles_m, class T>
__device__ __forceinline__ void add_columns(T (&total)[tiles_n][tiles_m][4]) {
  if constexpr (in_columns)
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int j = 0; j < tiles_m; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
          for (int step = 4 / chunk_groups; step < 4 && e % 2 < tokens; step *= 2)
            total[i][j][e] += __shfl_xor_sync(~0u, total[i][j][e], step);
}

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
