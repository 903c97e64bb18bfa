// The fragments of gemm.cu: a step of k through the tensor cores with k in its stored order.
//
// `operands.cuh` permutes the activations to match cheaply decoded weights, which pays where few
// tokens meet each weight. Here many do, so the weights bear the cost: decoded in order, once for
// all the token tiles of a warp, they meet activations that go from shared memory to the MMA as
// they are. Two ways to read eight rows, by `matrix_w` and `matrix_x`:
//
//   ldmatrix     lane%4 holds word lane%4 of each 16-byte chunk: of INT4 eight k, of INT8 four
//   lane words   lane%4 holds the eight consecutive k from 8 * (lane%4), in `words` words
//
// `w` makes the A fragment of 16 rows from their words, `x` the B fragment of 8 tokens from theirs;
// `half` makes half of an A fragment of 16-bit floats, and these may take their row's scale.
#pragma once
#include "mma.cuh"
#include "split_scales.cuh"

// A step is `step_k` k and `parts` MMAs. `k_of` tells which sixteenth or eighth of k a register of
// A holds: its first k within the step.
template <class X, class W, bool wide> struct Fragments;

template <class X> struct Float16Fragments {
  static constexpr int step_k = 32, parts = 2, words_x = 4;
  static constexpr bool matrix_x = false;
  struct A { u32 r[8]; };
  struct B { u32 r[4]; };
  static __device__ __forceinline__ B x(const u32* v) { return {{v[0], v[1], v[2], v[3]}}; }
  static __device__ __forceinline__ A ones_w() {
    constexpr u32 o = half_words<X>::one;
    return {{o, o, o, o, o, o, o, o}};
  }
  static __device__ __forceinline__ B ones_x() {
    constexpr u32 o = half_words<X>::one;
    return {{o, o, o, o}};
  }
  static __device__ __forceinline__ void mma_part(int part, float (&d)[4], const A& a, const B& b,
                                                  const float* c) {
    mma(d, a.r + 4 * part, b.r + 2 * part, c, X{});
  }
  static __device__ __forceinline__ int k_of(int, int quarter) { return 8 * quarter; }
  // What turns a row's codes into weights, twice in a word: an addend that makes the zero point's
  // code 0, and the scale; or both as split_scales.cuh has them
  struct Row {
    u32 offset, scale;
    __device__ __forceinline__ u32 addend() const {
      return split_scales && has_zeros ? low_twice(offset) : offset;
    }
    __device__ __forceinline__ u32 times(u32 codes) const {
      return split_scales ? times_split(codes, scale, offset) : mul2<X>(codes, scale);
    }
  };
};

// INT4: bytes j of w and of w >> 4, spread to half words, are codes 2j and 2j + 1
template <class X, class W> struct Int4Float16Fragments : Float16Fragments<X> {
  static constexpr int words_w = 1;
  static constexpr bool matrix_w = true;
  static __device__ __forceinline__ void row(u32 w, u32 (&f)[4]) {
    using C = half_words<X>;
    constexpr u32 flip = C::magic ^ (same<W, s4>::value ? 0x00080008u : 0u);
    const u32 odd = w >> 4;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      f[j] = fma2<X>(and_xor(__byte_perm(w, odd, 0x4400 + 0x1111 * j), 0x000f000f, flip), C::one,
                     C::minus_offset4);
  }
  static __device__ __forceinline__ typename Float16Fragments<X>::A w(const u32* v) {
    u32 l[4], h[4];
    row(v[0], l);
    row(v[1], h);
    return {{l[0], h[0], l[1], h[1], l[2], h[2], l[3], h[3]}};
  }
  // With a shift less for each word, codes stay where they are in their bytes.
  using Row = typename Float16Fragments<X>::Row;
  static constexpr u32 factors = Nibbles<X>::factors;
  static constexpr float unit = Nibbles<X>::unit;
  static __device__ __forceinline__ Row plain() { return {Nibbles<X>::minus_8, 0}; }
  // Scale and zero point in X's type: half a word, or in the lower half what is added to a nibble at
  // the bottom
  static __device__ __forceinline__ u32 entry(float s) { return halves<X>(s * unit, 0.f); }
  static __device__ __forceinline__ u32 entry(float s, float zero) {
    return halves<X>(Nibbles<X>::bottom(zero), s * unit);
  }
  // From either, twice in a word
  static __device__ __forceinline__ Row row(u32 scale) { return {Nibbles<X>::minus_8, scale}; }
  static __device__ __forceinline__ Row row(u32 scale, u32 offset) {
    constexpr u32 higher = 0x63800000;  // fp16: the nibble above adds -64, the other -1024
    return {same<X, fp16>::value ? fma2<X>(offset, half_words<X>::one, higher) : offset, scale};
  }
  template <bool scaled>
  static __device__ __forceinline__ void half(u32 (&a)[4], const u32* v, int part, u32 factors,
                                              const Row (&rows)[2]) {
    constexpr u32 flip = Nibbles<X>::magic ^ (same<W, s4>::value ? 0x00800008u : 0u);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int byte = 2 * part + r / 2;
      const u32 nibbles = __byte_perm(v[r % 2], 0, byte * 0x101);
      const u32 code = fma2<X>(and_xor(nibbles, 0x00f0000f, flip), factors, rows[r % 2].addend());
      a[r] = scaled ? rows[r % 2].times(code) : code;
    }
  }
};

// FP4, which takes its scale as it becomes a fragment: the codes of a byte, each twice at the top of a byte,
// so that sign and rest are brought in place together (fp4.cuh).
struct Fp4Fragments : Int4Float16Fragments<bf16, s4> {
  static __device__ __forceinline__ u32 entry(e4m3 s) { return e4m3_factor(s.code, 0); }
  static __device__ __forceinline__ u32 entry(e8m0 s) { return wide_factor(s.code).value; }
  template <bool scaled>
  static __device__ __forceinline__ void half(u32 (&a)[4], const u32* v, int part, u32,
                                              const Row (&rows)[2]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const u32 w = v[r % 2];
      const int byte = 2 * part + r / 2;
      const u32 twice = __byte_perm(w << 4, w, byte * 0x11 | (byte + 4) * 0x1100);
      const u32 code = and_or(twice, 0x80008000, twice << 2 & 0x01c001c0);
      a[r] = scaled_codes<Scale>(code, Factor{rows[r % 2].scale, true});
    }
  }
};

// Of a table: half a word is half a fragment's row
template <class X, class W> struct Lut4Fragments : Float16Fragments<X>, Lut4Codes {
  static constexpr int words_w = 1;
  static constexpr bool matrix_w = true;
  using Row = typename Float16Fragments<X>::Row;
  static __device__ __forceinline__ typename Float16Fragments<X>::A w(const u32* v) {
    u32 l[2][2], h[2][2];
    eight_numbers<X, W>(l, v[0]);
    eight_numbers<X, W>(h, v[1]);
    return {{l[0][0], h[0][0], l[0][1], h[0][1], l[1][0], h[1][0], l[1][1], h[1][1]}};
  }
  static __device__ __forceinline__ Row plain() { return {0, 0}; }
  static __device__ __forceinline__ u32 entry(float s) { return halves<X>(s, 0.f); }
  static __device__ __forceinline__ Row row(u32 scale) { return {0, scale}; }
  template <bool scaled>
  static __device__ __forceinline__ void half(u32 (&a)[4], const u32* v, int part, u32,
                                              const Row (&rows)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      u32 f[2];
      four_numbers<X, W>(f, part ? v[h] >> 16 : v[h]);
#pragma unroll
      for (int i = 0; i < 2; ++i) a[2 * i + h] = scaled ? rows[h].times(f[i]) : f[i];
    }
  }
};

template <class X, class W> struct ByteFloat16Fragments : Float16Fragments<X> {
  using Codes = Bytes<X, W>;
  static constexpr int words_w = 2;
  static constexpr bool matrix_w = false;
  static __device__ __forceinline__ u32 bytes(u32 w, int j) {
    if constexpr (same<W, e4m3>::value) return Codes::take(w, 0, Codes::selector(2 * j));
    return __byte_perm(w, 0, j ? 0x4342 : 0x4140);
  }
  static __device__ __forceinline__ u32 pair(u32 w, int j) {
    if constexpr (same<W, e4m3>::value) return Codes::codes(bytes(w, j), factors);
    return ByteFloat16Pair<X, W>::even_bytes(bytes(w, j));
  }
  static __device__ __forceinline__ typename Float16Fragments<X>::A w(const u32* v) {
    const u32 *lo = v, *hi = v + 2;
    return {{pair(lo[0], 0), pair(hi[0], 0), pair(lo[0], 1), pair(hi[0], 1), pair(lo[1], 0),
             pair(hi[1], 0), pair(lo[1], 1), pair(hi[1], 1)}};
  }
  using Row = typename Float16Fragments<X>::Row;
  static constexpr u32 factors = Codes::factors;
  static constexpr float unit = Codes::unit;
  static __device__ __forceinline__ Row plain() { return {0, 0}; }
  static __device__ __forceinline__ u32 entry(float s) { return halves<X>(s * scale_factor, 0.f); }
  static __device__ __forceinline__ Row row(u32 scale) { return {0, scale}; }
  template <bool scaled>
  static __device__ __forceinline__ void half(u32 (&a)[4], const u32* v, int part, u32 factors,
                                              const Row (&rows)[2]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const u32 two = bytes(v[r % 2 * 2 + part], r / 2);
      const u32 code = scaled && fp8_takes_scales ? moved_fp8<X>(two) : Codes::codes(two, factors);
      a[r] = scaled ? rows[r % 2].times(code) : code;
    }
  }
};

struct IntFragments {
  static constexpr int step_k = 32, parts = 1;
  struct A { u32 r[4]; };
  struct B { u32 r[2]; };
  static __device__ __forceinline__ A ones_w() {
    return {{0x01010101, 0x01010101, 0x01010101, 0x01010101}};
  }
  static __device__ __forceinline__ B ones_x() { return {{0x01010101, 0x01010101}}; }
  static __device__ __forceinline__ void mma_part(int, int (&d)[4], const A& a, const B& b,
                                                  const int* c) {
    mma(d, a.r, b.r, c, s8{});
  }
  static __device__ __forceinline__ int k_of(int, int quarter) { return 8 * quarter; }
};

template <bool wide> struct Fragments<s8, s8, wide> : IntFragments {
  static constexpr int words_w = 2, words_x = 2;
  static constexpr bool matrix_w = true, matrix_x = true;
  static __device__ __forceinline__ A w(const u32* v) { return {{v[0], v[1], v[2], v[3]}}; }
  static __device__ __forceinline__ B x(const u32* v) { return {{v[0], v[1]}}; }
  static __device__ __forceinline__ int k_of(int reg, int) { return reg / 2 * 16; }
};

// INT4 weights: 16 times their value, interleaved to the order of k
template <class W> struct Int4Int8Fragments : IntFragments {
  static constexpr int words_w = 1, words_x = 2;
  static constexpr bool matrix_w = true, matrix_x = false;
  static __device__ __forceinline__ A w(const u32* v) {
    const u32 e0 = even_nibbles<W>(v[0]), o0 = odd_nibbles<W>(v[0]);
    const u32 e1 = even_nibbles<W>(v[1]), o1 = odd_nibbles<W>(v[1]);
    return {{__byte_perm(e0, o0, 0x5140), __byte_perm(e1, o1, 0x5140), __byte_perm(e0, o0, 0x7362),
             __byte_perm(e1, o1, 0x7362)}};
  }
  static __device__ __forceinline__ B x(const u32* v) { return {{v[0], v[1]}}; }
};

// Native INT4: the stored words, 64 k a step where groups allow it (`wide`)
template <class X, class W, bool wide> struct NativeInt4Fragments {
  static constexpr int step_k = wide ? 64 : 32, parts = 1, words_w = step_k / 32, words_x = words_w;
  static constexpr bool matrix_w = true, matrix_x = true;
  struct A { u32 r[2 * words_w]; };
  struct B { u32 r[words_x]; };
  template <class Kind> static __device__ __forceinline__ u32 sign(u32 v) {
    return same<Kind, u4>::value ? v ^ 0x88888888u : v;
  }
  static __device__ __forceinline__ A w(const u32* v) {
    A a;
    for (int i = 0; i < 2 * words_w; ++i) a.r[i] = sign<W>(v[i]);
    return a;
  }
  static __device__ __forceinline__ B x(const u32* v) {
    B b;
    for (int i = 0; i < words_x; ++i) b.r[i] = sign<X>(v[i]);
    return b;
  }
  static __device__ __forceinline__ A ones_w() {
    A a;
    for (int i = 0; i < 2 * words_w; ++i) a.r[i] = 0x11111111;
    return a;
  }
  static __device__ __forceinline__ B ones_x() {
    B b;
    for (int i = 0; i < words_x; ++i) b.r[i] = 0x11111111;
    return b;
  }
  static __device__ __forceinline__ void mma_part(int, int (&d)[4], const A& a, const B& b,
                                                  const int* c) {
    mma_s4<step_k>(d, a.r, b.r, c);
  }
  static __device__ __forceinline__ int k_of(int, int quarter) { return 8 * quarter; }
};

template <bool wide> struct Fragments<bf16, s4, wide> : Int4Float16Fragments<bf16, s4> {};
template <bool wide> struct Fragments<bf16, u4, wide> : Int4Float16Fragments<bf16, u4> {};
template <bool wide> struct Fragments<fp16, s4, wide> : Int4Float16Fragments<fp16, s4> {};
template <bool wide> struct Fragments<fp16, u4, wide> : Int4Float16Fragments<fp16, u4> {};
template <bool wide> struct Fragments<bf16, s8, wide> : ByteFloat16Fragments<bf16, s8> {};
template <bool wide> struct Fragments<fp16, s8, wide> : ByteFloat16Fragments<fp16, s8> {};
template <bool wide> struct Fragments<bf16, e4m3, wide> : ByteFloat16Fragments<bf16, e4m3> {};
template <bool wide> struct Fragments<fp16, e4m3, wide> : ByteFloat16Fragments<fp16, e4m3> {};
template <class X, bool wide> struct Fragments<X, nf4, wide> : Lut4Fragments<X, nf4> {};
template <class X, bool wide> struct Fragments<X, iq4nl, wide> : Lut4Fragments<X, iq4nl> {};
template <class X, bool wide> struct Fragments<X, fp4, wide> : Lut4Fragments<X, fp4> {};
template <class X, bool wide> struct Fragments<X, bnbfp4, wide> : Lut4Fragments<X, bnbfp4> {};
template <bool wide> struct Fragments<bf16, e2m1, wide> : Fp4Fragments {};
template <bool wide> struct Fragments<s8, s4, wide> : Int4Int8Fragments<s4> {};
template <bool wide> struct Fragments<s8, u4, wide> : Int4Int8Fragments<u4> {};

template <bool wide> struct Fragments<s4, s4, wide> : NativeInt4Fragments<s4, s4, wide> {};
template <bool wide> struct Fragments<s4, u4, wide> : NativeInt4Fragments<s4, u4, wide> {};
template <bool wide> struct Fragments<u4, s4, wide> : NativeInt4Fragments<u4, s4, wide> {};
template <bool wide> struct Fragments<u4, u4, wide> : NativeInt4Fragments<u4, u4, wide> {};

// Keep of a fragment the k in [begin, end) of the step; whole eighths, or sixteens of INT8.
template <class F>
__device__ __forceinline__ typename F::A masked(typename F::A a, int begin, int end, int quarter) {
#pragma unroll
  for (int i = 0; i < int(sizeof(a) / 4); ++i) {
    const int k = F::k_of(i, quarter);
    a.r[i] = k >= begin && k < end ? a.r[i] : 0u;
  }
  return a;
}
