// y[m, n] = alpha * sum_k x[m, k] * w[n, k] for FP4 weights in blocks with a scale each: MXFP4 (32 k,
// e8m0) and NVFP4 (16 k, e4m3), and activations in the same format or in bf16 or fp16.
//
// Without FP4 units the codes become what older tensor cores multiply: 2 * e2m1 is an integer in
// [-12, 12], so an MX block of both operands is one exact int8 MMA; beside 16-bit activations e2m1
// becomes bf16 or fp16. A block's sum enters the fp32 total with its scales. NVFP4 totals carry the
// error of their sum along (Kahan), and the warps meet in double: the result of two FP4 operands is
// the exact one, rounded once.
//
// For few tokens, as skinny.cu: no ring, a lane loads its words of W straight into registers. Warps
// share out K in chunks of 128, which is four spans of 32 k; of a span lane%4 holds a word of eight k.
#include "memory.cuh"

struct e2m1 { static constexpr int bits = 4; };
struct e8m0;
struct e4m3;

using X = Config::x_kind;
using Out = Config::out_type;
constexpr bool fp4_x = same<X, e2m1>::value, mx = same<Config::scale_kind, e8m0>::value;
constexpr int warps = Config::warps, threads = 32 * warps, unroll = Config::unroll;
constexpr int tiles_m = Config::tiles_m, tiles_n = Config::tiles_n;
constexpr int rows = 16 * tiles_n, tokens = 8 * tiles_m;
constexpr int chunk_k = 128, spans = chunk_k / span_k;
constexpr int groups_per_span = mx ? 1 : 2, scale_words = groups_per_span;  // four groups a word
constexpr int x_words = X::bits / 4;                                        // of a lane's eight k
constexpr bool compensated = fp4_x && !mx;

struct Params {
  const char *x, *w;
  const unsigned char *x_scales, *w_scales;
  const float* alpha;
  void* out;
  i64 m, n, k, x_stride, w_stride;     // strides in bytes
  i64 x_scale_stride, w_scale_stride;  // bytes of a row of scales; blocked: tiles of a row
};

// ---- codes to fragments -----------------------------------------------------------------------

// 0x00 where a nibble of the low half of `v` has its top bit set, else 0x7f: PRMT replaces a byte by
// its sign there
__device__ __forceinline__ u32 not_negative(u32 v) {
  u32 d;
  asm("prmt.b32 %0, %1, %1, %2;" : "=r"(d) : "r"(0x7f7f7f7f), "r"(v));
  return d;
}

// Four e2m1 codes in the low half of `v` to bytes of 2 * value, which PRMT looks up by nibbles
__device__ __forceinline__ u32 four_bytes(u32 v) {
  const u32 index = v & 0x7777;
  const u32 plus = __byte_perm(0x43424140, 0x4c484644, index);   // 64 + 2 * value
  const u32 minus = __byte_perm(0x3d3e3f40, 0x34383a3c, index);  // 64 - 2 * value
  const u32 positive = not_negative(v);
  return (((plus & positive) | (minus & ~positive)) + 0x40404040) ^ 0x80808080;
}

// Code j of each half word to bf16 or fp16: sign and "eem" move to where the type has its sign, the
// low exponent bits and the first bit of its mantissa, subnormals included; a factor rebiases.
template <int j> __device__ __forceinline__ u32 two_floats(u32 v) {
  constexpr int to_sign = 12 - 4 * j, to_rest = (same<X, bf16>::value ? 6 : 9) - 4 * j;
  constexpr u32 rest = same<X, bf16>::value ? 0x01c001c0 : 0x0e000e00;
  const u32 sign = v << to_sign, moved = to_rest >= 0 ? v << (to_rest & 31) : v >> (-to_rest & 31);
  const u32 bits = and_or(moved, rest, sign & 0x80008000);
  constexpr u32 rebias = same<X, bf16>::value ? 0x7e807e80 : 0x74007400;  // 2^126, 2^14
  return fma2<X>(bits, rebias, 0x80008000);
}

struct IntSpan : IntPair {
  static constexpr int zero = 0x4b400000;  // as a float 1.5 * 2^23: integers added show as numbers
  static __device__ __forceinline__ A w(u32 lo, u32 hi) {
    return {{four_bytes(lo), four_bytes(hi), four_bytes(lo >> 16), four_bytes(hi >> 16)}};
  }
  static __device__ __forceinline__ B x(const u32 (&v)[1]) {
    return {{four_bytes(v[0]), four_bytes(v[0] >> 16)}};
  }
  // of the numbers themselves, a quarter: near the top of e8m0 there is no room for more
  static __device__ __forceinline__ float value(int d) {
    return __int_as_float(d) * 0.25f - 3145728.f;
  }
};

template <class T> struct FloatSpan : Int4Float16Pair<T, s4> {  // its order of k, and its x
  static constexpr float zero = 0.f;
  static __device__ __forceinline__ typename Float16Pair<T>::A w(u32 lo, u32 hi) {
    return {{{two_floats<0>(lo), two_floats<0>(hi), two_floats<1>(lo), two_floats<1>(hi)},
             {two_floats<2>(lo), two_floats<2>(hi), two_floats<3>(lo), two_floats<3>(hi)}}};
  }
  static __device__ __forceinline__ float value(float d) { return d; }
};

template <class T> struct SpanOf { using type = FloatSpan<T>; };
template <> struct SpanOf<e2m1> { using type = IntSpan; };
using Span = SpanOf<X>::type;

// ---- scales -------------------------------------------------------------------------------------

// Scale `i` of a word of four
__device__ __forceinline__ float scale_value(u32 word, int i) {
  const u32 code = __byte_perm(word, 0, 0x4440 + i);
  if constexpr (mx) {
    return __uint_as_float(code == 255 ? 0x7fc00000u : code ? code << 23 : 1u << 22);
  } else {  // in the place of fp16's bits, 2^8 too small, subnormals included
    const u32 bits = (code & 0x80) << 8 | (code & 0x7f) << 7;
    const float v = __half2float(__ushort_as_half(static_cast<unsigned short>(bits))) * 256.f;
    return (code & 0x7f) == 0x7f ? __uint_as_float(0x7fc00000u) : v;
  }
}

// Codes of groups first, first + 1, ... + 3 of a row, zero where the row has ended: what lies there in
// a blocked layout may be anything.
template <bool blocked, bool words>
__device__ __forceinline__ u32 four_scales(const unsigned char* scales, i64 row, i64 stride,
                                           int first, int groups) {
  if (first >= groups) return 0;
  u32 v = 0;
  if constexpr (
      blocked) {  // tiles of 128 rows by 4 groups: (row % 32) * 16 + (row / 32) * 4 + group
    const i64 tile = (row >> 7) * stride + (first >> 2);
    v = *reinterpret_cast<const u32*>(scales + tile * 512 + (row & 31) * 16 + ((row >> 5) & 3) * 4);
  } else if constexpr (words) {
    return *reinterpret_cast<const u32*>(scales + row * stride + first);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (first + i < groups) v |= u32(scales[row * stride + first + i]) << (8 * i);
  }
  return first + 4 <= groups ? v : v & ((1u << (8 * (groups - first))) - 1);
}

// ---- the sum ------------------------------------------------------------------------------------

struct Total {
  float sum = 0.f, error = 0.f;  // what the sum has too much
  __device__ __forceinline__ void add(float v, float w_scale, float x_scale) {
    if constexpr (!fp4_x) {
      sum += v * w_scale;
    } else if constexpr (mx) {  // the smaller first: quarters of 2^-127 are still exact
      float low, high;
      asm("min.NaN.f32 %0, %1, %2;" : "=f"(low) : "f"(w_scale), "f"(x_scale));
      asm("max.NaN.f32 %0, %1, %2;" : "=f"(high) : "f"(w_scale), "f"(x_scale));
      sum += (v * low) * high;
    } else {
      const float y = v * (w_scale * x_scale) - error;
      const float t = sum + y;
      error = (t - sum) - y;
      sum = t;
    }
  }
  __device__ __forceinline__ double value() const {
    return compensated ? double(sum) - double(error) : double(sum);
  }
};

__device__ __forceinline__ void load_words(u32 (&v)[1], const char* from, bool inside) {
  v[0] = inside ? __ldg(reinterpret_cast<const u32*>(from)) : 0;
}
__device__ __forceinline__ void load_words(u32 (&v)[4], const char* from, bool inside) {
  const uint4 t = inside ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
  v[0] = t.x, v[1] = t.y, v[2] = t.z, v[3] = t.w;
}

// What a lane needs of one chunk, in flight before any of it is used
struct Chunk {
  u32 w[tiles_n][2][spans][1], x[tiles_m][spans][x_words];
  u32 w_scales[tiles_n][2][scale_words], x_scales[fp4_x ? tiles_m : 1][2][scale_words];
};

extern "C" __global__ void __launch_bounds__(threads, Config::blocks_per_sm)
    fp4(const __grid_constant__ Params p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quarter = lane % 4;
  const i64 n0 = i64(blockIdx.x) * rows, m0 = i64(blockIdx.y) * tokens;
  const int k = int(p.k), chunks = (k + chunk_k - 1) / chunk_k, groups = k / (mx ? 32 : 16);

  auto load_chunk = [&](Chunk& c, int chunk) {
    const int k0 = chunk * chunk_k + quarter * 8;
    const int group = chunk * (4 * scale_words);
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const i64 row =
            min(n0 + i * 16 + h * 8 + lane / 4, p.n - 1);  // a repeated row is not stored
#pragma unroll
        for (int t = 0; t < spans; ++t)
          load_words(c.w[i][h][t], p.w + row * p.w_stride + (k0 + t * span_k) / 2,
                     k0 + t * span_k < k);
#pragma unroll
        for (int s = 0; s < scale_words; ++s)
          c.w_scales[i][h][s] = four_scales<Config::blocked, Config::scale_words_aligned>(
              p.w_scales, row, p.w_scale_stride, group + 4 * s, groups);
      }
#pragma unroll
    for (int j = 0; j < tiles_m; ++j) {
      const i64 token = min(m0 + j * 8 + lane / 4, p.m - 1);
#pragma unroll
      for (int t = 0; t < spans; ++t)
        load_words(c.x[j][t], p.x + token * p.x_stride + (k0 + t * span_k) * X::bits / 8,
                   k0 + t * span_k < k);
      if constexpr (fp4_x)
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int s = 0; s < scale_words; ++s)
            c.x_scales[j][e][s] = four_scales<Config::blocked, Config::scale_words_aligned>(
                p.x_scales, min(m0 + j * 8 + quarter * 2 + e, p.m - 1), p.x_scale_stride,
                group + 4 * s, groups);
    }
  };

  Total total[tiles_n][tiles_m][4];
  auto use_chunk = [&](const Chunk& c) {
#pragma unroll
    for (int t = 0; t < spans; ++t) {
      typename Span::A a[tiles_n];
      typename Span::B b[tiles_m];
#pragma unroll
      for (int i = 0; i < tiles_n; ++i) a[i] = Span::w(c.w[i][0][t][0], c.w[i][1][t][0]);
#pragma unroll
      for (int j = 0; j < tiles_m; ++j) b[j] = Span::x(c.x[j][t]);
#pragma unroll
      for (int g = 0; g < groups_per_span; ++g) {
        const int group = t * groups_per_span + g;
#pragma unroll
        for (int j = 0; j < tiles_m; ++j) {
          // half of the lanes hold a group of 16
          const typename Span::B mine = mx ? b[j] : masked(b[j], quarter / 2 == g);
#pragma unroll
          for (int i = 0; i < tiles_n; ++i) {
            typename Span::Acc d[4] = {Span::zero, Span::zero, Span::zero, Span::zero};
            Span::mma(d, a[i], mine);
#pragma unroll
            for (int e = 0; e < 4; ++e)
              total[i][j][e].add(
                  Span::value(d[e]), scale_value(c.w_scales[i][e / 2][group / 4], group % 4),
                  fp4_x ? scale_value(c.x_scales[fp4_x ? j : 0][e % 2][group / 4], group % 4)
                        : 1.f);
          }
        }
      }
    }
  };

  for (int chunk0 = warp * unroll; chunk0 < chunks; chunk0 += warps * unroll) {
    Chunk c[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) load_chunk(c[u], chunk0 + u);  // past the end: zeros
#pragma unroll
    for (int u = 0; u < unroll; ++u) use_chunk(c[u]);
  }

  __shared__ double partial[warps][tokens][rows];
#pragma unroll
  for (int i = 0; i < tiles_n; ++i)
#pragma unroll
    for (int j = 0; j < tiles_m; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        partial[warp][j * 8 + quarter * 2 + e % 2][i * 16 + e / 2 * 8 + lane / 4] =
            total[i][j][e].value();
  __syncthreads();
  const double alpha = p.alpha ? double(*p.alpha) : 1.0;
#pragma unroll 1
  for (int i = threadIdx.x; i < tokens * rows; i += threads) {
    const i64 m = m0 + i / rows, n = n0 + i % rows;
    if (m >= p.m || n >= p.n) continue;
    double y = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) y += partial[w][i / rows][i % rows];
    y *= alpha;
    // rounded to odd, so that the rounding to a narrower type is the only one
    float f = same<Out, float>::value ? float(y) : __double2float_rz(y);
    if (!same<Out, float>::value && double(f) != y) f = __int_as_float(__float_as_int(f) | 1);
    store_rounded(static_cast<Out*>(p.out) + m * p.n + n, f);
  }
}
