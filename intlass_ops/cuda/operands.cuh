// Operand kinds, and how the bytes of a row become tensor-core fragments.
//
// Every kernel computes D[n, m] = W[n, k] * X[m, k] with the weights as the MMA's A operand
// (16 rows of n) and the activations as B (8 tokens), so a small M wastes nothing.
//
// Both operands lie in memory as the user stores them: rows along k, INT4 two to a byte. A lane
// owns EIGHT CONSECUTIVE k of each 32-wide span:
//
//        span of 32 k:  | lane%4 = 0 | lane%4 = 1 | lane%4 = 2 | lane%4 = 3 |
//                         k 0..7       k 8..15      k 16..23     k 24..31
//
// which is one 32-bit word of INT4, two of INT8, four of bf16. An MMA sums over k in whatever order
// its fragments hold, as long as W and X agree; `Pair` chooses, for each pair of kinds, an order
// that both sides reach with the fewest instructions. Signed codes come out of every path:
// s4 as it is, u4 as q - 8 (the epilogue knows and shifts the zero point).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned int u32;

struct bf16 { static constexpr int bits = 16; };
struct fp16 { static constexpr int bits = 16; };
struct s8 { static constexpr int bits = 8; };
struct s4 { static constexpr int bits = 4; };
struct u4 { static constexpr int bits = 4; };
// weights whose codes index sixteen numbers, lut4.cuh
struct nf4 { static constexpr int bits = 4; };
struct iq4nl { static constexpr int bits = 4; };
struct fp4 { static constexpr int bits = 4; };
struct bnbfp4 { static constexpr int bits = 4; };
struct e4m3 {  // FP8 weights, and scales of NVFP4
  static constexpr int bits = 8;
  unsigned char code;
};

template <class A, class B> struct same { static constexpr bool value = false; };
template <class A> struct same<A, A> { static constexpr bool value = true; };

constexpr int span_k = 32;  // k of one span: the granularity of fragments and of group boundaries

// Words (32 bits) a lane owns of one span of a kind.
template <class Kind> constexpr int span_words = Kind::bits / 4;
// Bytes a row holds of one span.
template <class Kind> constexpr int span_bytes = span_k * Kind::bits / 8;

// (a & b) ^ c in one LOP3
__device__ __forceinline__ u32 and_xor(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// (a & b) | c in one LOP3
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// (a ^ b) & c in one LOP3
__device__ __forceinline__ u32 xor_and(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0x28;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

template <class X> __device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  if constexpr (same<X, bf16>::value)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

template <class X> __device__ __forceinline__ u32 mul2(u32 a, u32 b) {
  u32 d;
  if constexpr (same<X, bf16>::value)
#if __CUDA_ARCH__ >= 900
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
    d = fma2<X>(a, b, 0x80008000);  // minus zero keeps the sign of a product that is zero
#endif
  else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// Two numbers of X's type in a word, rounded to it
template <class X> __device__ __forceinline__ u32 halves(float low, float high) {
  u32 d;
  if constexpr (same<X, bf16>::value)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// 16-bit constants, twice in a word
template <class X> struct half_words;
template <> struct half_words<bf16> {
  static constexpr u32 one = 0x3f803f80, minus_one = 0xbf80bf80;
  static constexpr u32 magic = 0x43004300;  // 128: adding an integer below 128 sets low bits
  static constexpr u32 minus_offset4 = 0xc308c308;  // -(128 + 8)
};
template <> struct half_words<fp16> {
  static constexpr u32 one = 0x3c003c00, minus_one = 0xbc00bc00;
  static constexpr u32 magic = 0x64006400;          // 1024
  static constexpr u32 minus_offset4 = 0xe408e408;  // -(1024 + 8)
};

__device__ __forceinline__ void mma_16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2],
                                          bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2],
                                          fp16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_16832(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_16832(int (&d)[4], const u32 (&a)[2], const u32 b) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s4.s4.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// One span of 32 k. `w` turns a lane's words of rows r and r + 8 into A fragments, `x` its words of
// a token into B fragments, `mma` accumulates; `ones_w` / `ones_x` are fragments of ones, with which
// the same MMA sums activations per token and weights per row. `unit` is what one accumulator step
// stands for (codes kept in the high nibble are 16 times their value).
template <class X, class W> struct Pair;

// ---- 16-bit activations: two m16n8k16 a span -------------------------------------------------
template <class X> struct Float16Pair {
  using Acc = float;
  struct A { u32 r[2][4]; };
  struct B { u32 r[2][2]; };
  static constexpr float unit = 1.f, unit_w = 1.f;
  static __device__ __forceinline__ void mma(float (&d)[4], const A& a, const B& b) {
    mma_16816(d, a.r[0], b.r[0], X{});
    mma_16816(d, a.r[1], b.r[1], X{});
  }
  static __device__ __forceinline__ A ones_w() {
    constexpr u32 o = half_words<X>::one;
    return {{{o, o, o, o}, {o, o, o, o}}};
  }
  static __device__ __forceinline__ B ones_x() {
    constexpr u32 o = half_words<X>::one;
    return {{{o, o}, {o, o}}};
  }
};

// INT4 weights: nibble j of each half word, so pairs (k0,k4) (k1,k5) | (k2,k6) (k3,k7)
template <class X, class W> struct Int4Float16Pair : Float16Pair<X> {
  using typename Float16Pair<X>::A;
  using typename Float16Pair<X>::B;
  static __device__ __forceinline__ void row(u32 w, u32 (&f)[4]) {
    using C = half_words<X>;
    constexpr u32 flip = C::magic ^ (same<W, s4>::value ? 0x00080008u : 0u);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      f[j] = fma2<X>(and_xor(w >> (4 * j), 0x000f000f, flip), C::one, C::minus_offset4);
  }
  static __device__ __forceinline__ A w(const u32 (&lo)[1], const u32 (&hi)[1]) {
    u32 l[4], h[4];
    row(lo[0], l);
    row(hi[0], h);
    return {{{l[0], h[0], l[1], h[1]}, {l[2], h[2], l[3], h[3]}}};
  }
  static __device__ __forceinline__ B x(const u32 (&v)[4]) {
    return {{{__byte_perm(v[0], v[2], 0x5410), __byte_perm(v[0], v[2], 0x7632)},
             {__byte_perm(v[1], v[3], 0x5410), __byte_perm(v[1], v[3], 0x7632)}}};
  }
};
template <> struct Pair<bf16, s4> : Int4Float16Pair<bf16, s4> {};
template <> struct Pair<bf16, u4> : Int4Float16Pair<bf16, u4> {};
template <> struct Pair<fp16, s4> : Int4Float16Pair<fp16, s4> {};
template <> struct Pair<fp16, u4> : Int4Float16Pair<fp16, u4> {};

// FP8 codes become floats of X by moving, from half words that have the code in the lower byte and its sign in
// all of the upper one: exponent and mantissa go to the low bits of X's exponent and the high ones of its
// mantissa, subnormals included, and a factor does the rest. Exact; the two codes that are no numbers
// become 480.
template <class X>
constexpr u32 fp8_factor = same<X, bf16>::value ? 0x7b807b80 : 0x5c005c00;  // 2^120, 2^8
// Such half words: of two bytes of two words (__byte_perm brings no signs)
__device__ __forceinline__ u32 with_signs(u32 w, u32 next, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(w), "r"(next), "r"(selector));
  return d;
}
template <class X> __device__ __forceinline__ u32 moved_fp8(u32 halves) {
  return same<X, bf16>::value ? halves << 4 & 0x87f087f0 : halves << 7 & 0xbf80bf80;
}

// Weights of eight bits: bytes 0, 2 and 1, 3 of each word, so pairs (k0,k2) (k1,k3) | (k4,k6) (k5,k7)
template <class X, class W> struct ByteFloat16Pair : Float16Pair<X> {
  using typename Float16Pair<X>::A;
  using typename Float16Pair<X>::B;
  static __device__ __forceinline__ u32 even_bytes(u32 w) {
    using C = half_words<X>;
    if constexpr (same<X, bf16>::value) {
      // bf16 has seven mantissa bits: (128 + low seven bits) - (256 if negative else 128)
      return fma2<X>(and_or(w, 0x00800080, C::magic), C::minus_one,
                     and_or(w, 0x007f007f, C::magic));
    } else {
      return fma2<X>(and_xor(w, 0x00ff00ff, 0x64806480), C::one, 0xe480e480);  // 1152 + q - 1152
    }
  }
  static __device__ __forceinline__ u32 every_second(u32 w, bool odd) {
    if constexpr (same<W, e4m3>::value)
      return mul2<X>(moved_fp8<X>(with_signs(w, 0, odd ? 0xb391 : 0xa280)), fp8_factor<X>);
    else
      return even_bytes(odd ? w >> 8 : w);
  }
  static __device__ __forceinline__ A w(const u32 (&lo)[2], const u32 (&hi)[2]) {
    A a;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      a.r[j][0] = every_second(lo[j], false);
      a.r[j][1] = every_second(hi[j], false);
      a.r[j][2] = every_second(lo[j], true);
      a.r[j][3] = every_second(hi[j], true);
    }
    return a;
  }
  static __device__ __forceinline__ B x(const u32 (&v)[4]) {
    return {{{__byte_perm(v[0], v[1], 0x5410), __byte_perm(v[0], v[1], 0x7632)},
             {__byte_perm(v[2], v[3], 0x5410), __byte_perm(v[2], v[3], 0x7632)}}};
  }
};
template <> struct Pair<bf16, s8> : ByteFloat16Pair<bf16, s8> {};
template <> struct Pair<fp16, s8> : ByteFloat16Pair<fp16, s8> {};
template <> struct Pair<bf16, e4m3> : ByteFloat16Pair<bf16, e4m3> {};
template <> struct Pair<fp16, e4m3> : ByteFloat16Pair<fp16, e4m3> {};

// INT4 codes become 16-bit floats where they are: one nibble at the bottom of a half word, another above
// it, and the factors of an FMA differ. fp16 has room for both below its implicit one. bf16 has not,
// but its subnormals and their next binade form one line, bits 0..7 times 2^-133, of which the FMA
// takes 2^6 away: `unit` is 64. What the FMA adds makes a code of `zero` 0: 8, or a row's zero point,
// exactly if it is an integer below 256. Factors: for above, for the bottom.
template <class X> struct Nibbles {  // of INT8 activations: none
  static constexpr u32 magic = 0, factors = 0, minus_8 = 0;
  static constexpr float unit = 1.f;
  static __device__ __forceinline__ float bottom(float) { return 0.f; }
  static __device__ __forceinline__ float above(float) { return 0.f; }
};
template <> struct Nibbles<bf16> {
  static constexpr u32 magic = 0, factors = 0x7d007f00, minus_8 = 0xbe00be00;  // 2^123, 2^127
  static constexpr float unit = 64.f;
  static __device__ __forceinline__ float bottom(float zero) { return zero * (-1 / unit); }
  static __device__ __forceinline__ float above(float zero) { return zero * (-1 / unit); }
};
template <> struct Nibbles<fp16> {
  static constexpr u32 magic = 0x64006400, factors = 0x2c003c00, minus_8 = 0xd480e408;  // 1 / 16, 1
  static constexpr float unit = 1.f;
  static __device__ __forceinline__ float bottom(float zero) { return -1024.f - zero; }
  static __device__ __forceinline__ float above(float zero) { return -64.f - zero; }
};

// Codes of eight bits in the lower bytes of half words; INT8's in the same way: all bits of a byte lie on that
// line. `selector`: the PRMT that brings the bytes b and b + 1 there.
template <class X, class W> struct Bytes : Nibbles<X> {
  static constexpr u32 factors = same<X, bf16>::value ? 0x7f007f00 : 0;  // 2^127
  static __device__ __forceinline__ constexpr u32 selector(u32 b) { return b | (b + 1) << 8; }
  static __device__ __forceinline__ u32 take(u32 w, u32 next, u32 selector) {
    return __byte_perm(w, next, selector);
  }
  static __device__ __forceinline__ u32 codes(u32 w, u32 factors) {
    if constexpr (!same<X, bf16>::value) return ByteFloat16Pair<X, W>::even_bytes(w);
    return fma2<X>(and_xor(w, 0x00ff00ff, 0x00800080), factors, 0xc000c000);  // less 128
  }
};
template <class X> struct Bytes<X, e4m3> : Nibbles<X> {
  static constexpr u32 factors = fp8_factor<X>;
  static constexpr float unit = 1.f;
  static __device__ __forceinline__ constexpr u32 selector(u32 b) {
    return b * 0x1111 + 0x9180;  // each followed by its sign
  }
  static __device__ __forceinline__ u32 take(u32 w, u32 next, u32 selector) {
    return with_signs(w, next, selector);
  }
  static __device__ __forceinline__ u32 codes(u32 w, u32 factors) {
    return mul2<X>(moved_fp8<X>(w), factors);
  }
};

// The same fragments with one shift a word instead of three
template <class X, class W> struct FewShifts : Pair<X, W> {
  struct Row {};
  static __device__ __forceinline__ Row zero(float) { return {}; }
  template <int words>
  static __device__ __forceinline__ typename Pair<X, W>::A w(const u32 (&lo)[words], Row,
                                                             const u32 (&hi)[words], Row) {
    return Pair<X, W>::w(lo, hi);
  }
};
template <class X, class W> struct FewShiftsInt4 : Pair<X, W> {
  using N = Nibbles<X>;
  static constexpr float unit = N::unit, unit_w = unit;
  struct Row { u32 bottom, above; };
  static __device__ __forceinline__ Row zero(float z) {
    const u32 bottom = halves<X>(N::bottom(z), N::bottom(z));
    return {bottom, same<X, bf16>::value ? bottom : halves<X>(N::above(z), N::above(z))};
  }
  static __device__ __forceinline__ Row of_bottom(u32 bottom) {  // of an integer
    return {bottom,
            same<X, bf16>::value ? bottom : fma2<X>(bottom, half_words<X>::one, 0x63806380)};
  }
  static __device__ __forceinline__ void row(u32 w, Row z, u32 (&f)[4]) {
    constexpr u32 flip = same<W, s4>::value ? 0x00080008u : 0u;
    constexpr u32 low = N::magic ^ flip, high = N::magic ^ (flip << 4);
    constexpr u32 low_factor = (N::factors & 0xffff) * 0x10001u;
    constexpr u32 high_factor = (N::factors >> 16) * 0x10001u;
    const u32 upper = w >> 8;
    f[0] = fma2<X>(and_xor(w, 0x000f000f, low), low_factor, z.bottom);
    f[1] = fma2<X>(and_xor(w, 0x00f000f0, high), high_factor, z.above);
    f[2] = fma2<X>(and_xor(upper, 0x000f000f, low), low_factor, z.bottom);
    f[3] = fma2<X>(and_xor(upper, 0x00f000f0, high), high_factor, z.above);
  }
  static __device__ __forceinline__ typename Pair<X, W>::A w(const u32 (&lo)[1], Row lo_zero,
                                                             const u32 (&hi)[1], Row hi_zero) {
    u32 l[4], h[4];
    row(lo[0], lo_zero, l);
    row(hi[0], hi_zero, h);
    return {{{l[0], h[0], l[1], h[1]}, {l[2], h[2], l[3], h[3]}}};
  }
};
template <> struct FewShifts<bf16, s4> : FewShiftsInt4<bf16, s4> {};
template <> struct FewShifts<bf16, u4> : FewShiftsInt4<bf16, u4> {};
template <> struct FewShifts<fp16, s4> : FewShiftsInt4<fp16, s4> {};
template <> struct FewShifts<fp16, u4> : FewShiftsInt4<fp16, u4> {};

// ---- integer activations: one m16n8k32 a span -----------------------------------------------
struct IntPair {
  using Acc = int;
  struct A { u32 r[4]; };
  struct B { u32 r[2]; };
  static __device__ __forceinline__ void mma(int (&d)[4], const A& a, const B& b) {
    mma_16832(d, a.r, b.r);
  }
  static __device__ __forceinline__ A ones_w() {
    return {{0x01010101, 0x01010101, 0x01010101, 0x01010101}};
  }
  static __device__ __forceinline__ B ones_x() { return {{0x01010101, 0x01010101}}; }
};

// Codes in the high nibble of a byte: a signed byte of 16 times the value. Even k, then odd k.
template <class Kind> __device__ __forceinline__ u32 even_nibbles(u32 w) {
  return xor_and(w << 4, same<Kind, u4>::value ? 0x80808080u : 0u, 0xf0f0f0f0);
}
template <class Kind> __device__ __forceinline__ u32 odd_nibbles(u32 w) {
  return xor_and(w, same<Kind, u4>::value ? 0x80808080u : 0u, 0xf0f0f0f0);
}

template <> struct Pair<s8, s8> : IntPair {
  static constexpr float unit = 1.f, unit_w = 1.f;
  static __device__ __forceinline__ A w(const u32 (&lo)[2], const u32 (&hi)[2]) {
    return {{lo[0], hi[0], lo[1], hi[1]}};
  }
  static __device__ __forceinline__ B x(const u32 (&v)[2]) { return {{v[0], v[1]}}; }
};

template <class W> struct Int4IntPair : IntPair {
  static constexpr float unit = 1.f / 16, unit_w = 1.f / 16;
  static __device__ __forceinline__ A w(const u32 (&lo)[1], const u32 (&hi)[1]) {
    return {{even_nibbles<W>(lo[0]), even_nibbles<W>(hi[0]), odd_nibbles<W>(lo[0]),
             odd_nibbles<W>(hi[0])}};
  }
  static __device__ __forceinline__ B x(const u32 (&v)[2]) {
    return {{__byte_perm(v[0], v[1], 0x6420), __byte_perm(v[0], v[1], 0x7531)}};
  }
};
template <> struct Pair<s8, s4> : Int4IntPair<s4> {};
template <> struct Pair<s8, u4> : Int4IntPair<u4> {};

// INT4 activations where tensor cores take none (sm_90 and newer), for kernels of few tokens: both
// operands' codes in the high nibbles of bytes. Others widen activations before (widen.cu).
template <class X, class W> struct WidenedInt4Pair : Int4IntPair<W> {
  static constexpr float unit = 1.f / 256;
  static __device__ __forceinline__ IntPair::B x(const u32 (&v)[1]) {
    return {{even_nibbles<X>(v[0]), odd_nibbles<X>(v[0])}};
  }
};

// Native INT4 (sm_80, sm_86, sm_89): fragments are the stored words, unsigned codes flipped to signed
template <class X, class W> struct NativeInt4Pair {
  using Acc = int;
  struct A { u32 r[2]; };
  struct B { u32 r; };
  static constexpr float unit = 1.f, unit_w = 1.f;
  template <class Kind> static __device__ __forceinline__ u32 sign(u32 v) {
    return same<Kind, u4>::value ? v ^ 0x88888888u : v;
  }
  static __device__ __forceinline__ A w(const u32 (&lo)[1], const u32 (&hi)[1]) {
    return {{sign<W>(lo[0]), sign<W>(hi[0])}};
  }
  static __device__ __forceinline__ B x(const u32 (&v)[1]) { return {sign<X>(v[0])}; }
  static __device__ __forceinline__ void mma(int (&d)[4], const A& a, const B& b) {
    mma_16832(d, a.r, b.r);
  }
  static __device__ __forceinline__ A ones_w() { return {{0x11111111, 0x11111111}}; }
  static __device__ __forceinline__ B ones_x() { return {0x11111111}; }
};

#if __CUDA_ARCH__ >= 900
template <class X, class W> using Int4Pair = WidenedInt4Pair<X, W>;
#else
template <class X, class W> using Int4Pair = NativeInt4Pair<X, W>;
#endif
template <> struct Pair<s4, s4> : Int4Pair<s4, s4> {};
template <> struct Pair<s4, u4> : Int4Pair<s4, u4> {};
template <> struct Pair<u4, s4> : Int4Pair<u4, s4> {};
template <> struct Pair<u4, u4> : Int4Pair<u4, u4> {};

// Keep a fragment only in the lanes of a group (k order above: lane%4 tells the eight k).
template <class A> __device__ __forceinline__ A masked(A a, bool keep) {
  u32* p = reinterpret_cast<u32*>(&a);
#pragma unroll
  for (int i = 0; i < int(sizeof(A) / 4); ++i) p[i] = keep ? p[i] : 0u;
  return a;
}

// What u4 codes lost when they became signed, to be added back through the zero point.
template <class Kind> constexpr float code_offset = same<Kind, u4>::value ? 8.f : 0.f;
