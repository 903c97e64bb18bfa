// FP4 activations of skinny_held.cu: how they come into registers, and when two MXFP4 operands are
// fp16, which takes fewer instructions to make than bf16 (fp4.cuh).
//
// fp16 has room for 25 binades of scales. W's numbers are half of their values then, and may have
// scales from 2^-22 to 2^2; those of X are 2^-9 of theirs, with scales from 2^-14 to 2^10. Products
// come to bf16's unit. A warp that meets other scales goes on with bf16.
#pragma once
#include "skinny.cuh"

constexpr int tokens = Config::tokens, tiles_m = (tokens + column_tokens - 1) / column_tokens;
constexpr int warp_chunks = Config::warp_chunks;
typedef typename P::B Fragments[warp_chunks][spans][tiles_m];

using BlockScales = SpanScales<Scale>;
constexpr bool may_be_fp16 = Config::fp16_codes;
static_assert(!may_be_fp16 || (fp4_x && same<Scale, e8m0>::value), "two MXFP4 operands");
constexpr int least_of_w = 105, least_of_x = 113;  // codes of the smallest scales

template <class Scales> __device__ __forceinline__ bool fits_fp16(Scales scales, int least) {
  if constexpr (same<Scales, SpanScales<e8m0>>::value) return u32(scales.codes - least) <= 24;
  return false;
}
template <class Scales> __device__ __forceinline__ void raise(Scales& scales, int least) {
  if constexpr (same<Scales, SpanScales<e8m0>>::value) scales.codes = max(int(scales.codes), least);
}
template <class Scales>
__device__ __forceinline__ Factor fp16_factor(const Scales& scales, int least) {
  if constexpr (same<Scales, SpanScales<e8m0>>::value)
    return {(scales.codes - least + 6) * 0x04000400u, false};
  return {};
}

// What makes such numbers, as WithFactors (skinny.cuh) and Fp4Pair (fp4.cuh) make bf16
struct Fp16Codes : Float16Pair<fp16> {
  using Row = Factor;
  static __device__ __forceinline__ Row zero(float) { return {}; }
  static __device__ __forceinline__ void row(u32 w, Factor factor, u32 (&f)[4]) {
    constexpr u32 sign = 0x80808080, rest = 0x0e0e0e0e;
    const u32 even = and_or(w << 4, sign, w << 1 & rest), odd = and_or(w, sign, w >> 3 & rest);
    f[0] = mul2<fp16>(__byte_perm(even, 0, 0x2404), factor.value);
    f[1] = mul2<fp16>(__byte_perm(odd, 0, 0x2404), factor.value);
    f[2] = mul2<fp16>(even & 0xff00ff00, factor.value);
    f[3] = mul2<fp16>(odd & 0xff00ff00, factor.value);
  }
  static __device__ __forceinline__ A w(const u32 (&lo)[1], Row lo_factor, const u32 (&hi)[1],
                                        Row hi_factor) {
    u32 l[4], h[4];
    row(lo[0], lo_factor, l);
    row(hi[0], hi_factor, h);
    return {{{l[0], h[0], l[1], h[1]}, {l[2], h[2], l[3], h[3]}}};
  }
};

// `count` words that have their scales in common
template <int count> struct Fp4Words {
  u32 v[count][1];
  BlockScales scales;

  // Whether they can be fp16. The scale of zeros may be any small one.
  __device__ __forceinline__ bool prepare(bool inside) {
    u32 any = 0;
#pragma unroll
    for (int t = 0; t < count; ++t) {
      if (!inside) v[t][0] = 0;
      any |= v[t][0] & 0x77777777;
    }
    if (any == 0) raise(scales, least_of_x);
    return fits_fp16(scales, least_of_x);
  }
  // The fragment of word t, which is number `span` of its lane's spans
  template <bool as_fp16, class B>
  __device__ __forceinline__ void make(B& x, int t, int span) const {
    if constexpr (as_fp16)
      Fp16Codes::row(v[t][0], fp16_factor(scales, least_of_x), reinterpret_cast<u32(&)[4]>(x));
    else
      x = token_fragment<P>(v[t], scales.factor(span * BlockScales::count / spans, true));
  }
};

// X of four tokens at least: what a lane itself needs
struct OwnFp4 {
  Fp4Words<spans> words[warp_chunks][tiles_m];

  template <class Share> __device__ __forceinline__ OwnFp4(const Params& p, const Share& share) {
    const int lane = threadIdx.x % 32, quarter = lane % 4;
#pragma unroll
    for (int j = 0; j < tiles_m; ++j) {
      const i64 token = min(i64(j * 8 + lane / 4), p.m - 1);
      const unsigned char* scales = lane_scales(p.a_scale, token, p.a_scale_row, quarter);
#pragma unroll
      for (int c = 0; c < warp_chunks; ++c) {
        const char* from = p.x + token * p.x_stride + (share.chunk + c) * 64 + quarter * 16;
        load_global(reinterpret_cast<u32(&)[spans]>(words[c][j].v), from);
        words[c][j].scales = load_scales_of(scales, share.chunk + c);
      }
    }
  }
  __device__ __forceinline__ bool prepare(bool inside) {
    bool fit = true;
#pragma unroll
    for (int c = 0; c < warp_chunks; ++c)
#pragma unroll
      for (int j = 0; j < tiles_m; ++j) fit &= words[c][j].prepare(inside);
    return fit;
  }
  template <bool as_fp16> __device__ __forceinline__ void make(Fragments& x, char*) const {
#pragma unroll
    for (int c = 0; c < warp_chunks; ++c)
#pragma unroll
      for (int j = 0; j < tiles_m; ++j)
#pragma unroll
        for (int t = 0; t < spans; ++t) words[c][j].template make<as_fp16>(x[c][t][j], t, t);
  }
};

// Of fewer, which all eight lanes of a quarter would need: each makes some, and they exchange them by
// way of a stage of the ring where no W is under way yet
struct SharedFp4 {
  static constexpr int count = tokens * warp_chunks / 2;
  Fp4Words<1> words[count > 0 ? count : 1];

  template <class Share> __device__ __forceinline__ SharedFp4(const Params& p, const Share& share) {
    const int lane = threadIdx.x % 32, i = lane % 16;
#pragma unroll
    for (int u = 0; u < count; ++u) {
      const int at = u * 2 + lane / 16, chunk = share.chunk + at / tokens;
      const i64 token = min(i64(at % tokens), p.m - 1);
      load_global(words[u].v[0], p.x + token * p.x_stride + chunk * 64 + i * 4);
      words[u].scales = load_scales_of(lane_scales(p.a_scale, token, p.a_scale_row, i / 4), chunk);
    }
  }
  __device__ __forceinline__ bool prepare(bool inside) {
    bool fit = true;
#pragma unroll
    for (int u = 0; u < count; ++u) fit &= words[u].prepare(inside);
    return fit;
  }
  template <bool as_fp16> __device__ __forceinline__ void make(Fragments& x, char* staged) const {
    const int lane = threadIdx.x % 32, m = min(lane / 4, tokens - 1);
    auto at = [&](int row, int i) {  // the 16 bytes of a word; those read at once are in all banks
      return staged + (row * 16 + (i ^ (i >> 3 | (tokens > 1 ? row % 2 : 0) << 1))) * 16;
    };
#pragma unroll
    for (int u = 0; u < count; ++u) {
      typename P::B made;
      words[u].template make<as_fp16>(made, 0, lane % 4);
      *reinterpret_cast<uint4*>(at(u * 2 + lane / 16, lane % 16)) =
          reinterpret_cast<const uint4&>(made);
    }
    __syncwarp();
#pragma unroll
    for (int c = 0; c < warp_chunks; ++c)
#pragma unroll
      for (int t = 0; t < spans; ++t)
        load_shared(reinterpret_cast<u32(&)[4]>(x[c][t][0]), at(c * tokens + m, lane % 4 * 4 + t));
    __syncwarp();
  }
};

// True if they are fp16
template <class Words>
__device__ __forceinline__ bool make_fragments(Fragments& x, Words& words, bool inside,
                                               char* staged) {
  const bool fit = words.prepare(inside);
  if constexpr (may_be_fp16)
    if (__all_sync(~0u, fit)) {
      words.template make<true>(x, staged);
      return true;
    }
  words.template make<false>(x, staged);
  return false;
}

// fp16's that are bf16's from now on
template <class Fragments> __device__ __forceinline__ void widen(Fragments& x) {
  constexpr float factor = 16.f;  // from 2^-9 of the values to a 32nd
#pragma unroll
  for (int i = 0; i < warp_chunks * spans * tiles_m * 4; ++i) {
    u32& pair = reinterpret_cast<u32*>(x)[i];
    const float2 f = __half22float2(reinterpret_cast<const __half2&>(pair));
    pair = halves<bf16>(f.x * factor, f.y * factor);
  }
}
