// y[M, N] = a[M, K] @ w[N, K]ᵀ on a CPU: weights are decoded in registers, one pass over their bytes.
//
// w = (q - zeros) * scales. INT4: two codes a byte, even k in the low nibble (packing.py); INT8: one.
// FP8 (e4m3) is INT8 whose 256 values are others.
// FP4 (fp4.py) and tables (lut4.py) are INT4 whose sixteen values are others.
// Every value is decoded to float32 exactly as written and summed in float32, a partial sum a lane.
// Few rows of a: straight into the sums. Many: some rows of w at a time into the first-level cache,
// then a tile of 4 rows of a by kTileRows of w a step, whose sums are all in registers.
// cpu.py compiles this file for the machine at hand and calls the extern "C" part.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

enum class Codes { kInt4, kInt8, kFp8 };

#if defined(__AVX512F__)
constexpr int kWidest = 16;
#else
constexpr int kWidest = 8;
#endif
constexpr int kTileRows = kWidest == 16 ? 6 : 2;  // of w, times 4 of a: the sums that fit registers
constexpr long kTileFrom = 6;                     // rows of a from which decoding to memory pays
constexpr long kTileBytes = 384 << 10;            // of a, read once per kTileRows from the L2 cache
constexpr long kWorthThreads = 1 << 17;  // codes: 5 us of work, what waking a thread costs

template <int L> struct Lanes {
  typedef float Float __attribute__((vector_size(4 * L)));
  typedef int32_t Int __attribute__((vector_size(4 * L)));
  typedef uint8_t U8 __attribute__((vector_size(L)));
  typedef int8_t S8 __attribute__((vector_size(L)));
};

template <class Vector, class T> inline Vector load(const T* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class Vector> inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

// L bytes to L int32. GCC splits the generic conversion into scalars, hence the intrinsics.
template <int L, class Byte> inline typename Lanes<L>::Int widen(const Byte* p) {
  constexpr bool is_signed = static_cast<Byte>(-1) < 0;
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    const __m128i bytes = load<__m128i>(p);
    return (typename Lanes<L>::Int)(is_signed ? _mm512_cvtepi8_epi32(bytes)
                                              : _mm512_cvtepu8_epi32(bytes));
  }
#endif
#if defined(__AVX2__)
  if constexpr (L == 8) {
    const __m128i bytes = _mm_cvtsi64_si128(load<long long>(p));
    return (typename Lanes<L>::Int)(is_signed ? _mm256_cvtepi8_epi32(bytes)
                                              : _mm256_cvtepu8_epi32(bytes));
  }
#endif
  using Bytes = std::conditional_t<is_signed, typename Lanes<L>::S8, typename Lanes<L>::U8>;
  return __builtin_convertvector(load<Bytes>(p), typename Lanes<L>::Int);
}

// L codes of e4m3. A half with their bits is 2^-8 of each, subnormal ones too: the conversion obeys no
// flag that flushes those of float32, which are never formed. The two NaNs become 480 of their sign
// (e4m3_to_float keeps them).
template <int L> inline typename Lanes<L>::Float e4m3_values(const int8_t* p) {
  using Float = typename Lanes<L>::Float;
  using Int = typename Lanes<L>::Int;
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    const __m256i bits = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load<__m128i>(p)), 7);
    return (Float)_mm512_cvtph_ps(_mm256_and_si256(bits, _mm256_set1_epi16(~0x4000))) * 0x1p8f;
  }
#endif
#if defined(__AVX2__) && defined(__F16C__)
  if constexpr (L == 8) {
    const __m128i bytes = _mm_cvtsi64_si128(load<long long>(p));
    const __m128i bits = _mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7);
    return (Float)_mm256_cvtph_ps(_mm_and_si128(bits, _mm_set1_epi16(~0x4000))) * 0x1p8f;
  }
#endif
  // Subnormal ones as 2^-6 and more, less 2^-6.
  const Int code = widen<L>(p), subnormal = (code & 0x78) == 0;
  const Int bits = ((code & 0x7f) << 20) + (120 << 23) + (subnormal & 1 << 23);
  const Float magnitude = (Float)bits - (Float)(subnormal & 121 << 23);
  return (Float)((Int)magnitude | (code & INT32_MIN));
}

template <int L> inline float sum(typename Lanes<L>::Float v) {
#if defined(__AVX512F__)
  if constexpr (L == 16) return _mm512_reduce_add_ps((__m512)v);
#endif
  float t[L];
  std::memcpy(t, &v, sizeof t);
  for (int half = L / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) t[i] += t[i + half];
  return t[0];
}

// The last four: scales of FP4, what its codes have in place of zeros, and what tables' have: an array of
// sixteen floats.
enum Kind : int {
  kNone, kFloat32, kBFloat16, kFloat16, kInt32, kInt8, kUInt8, kE8M0, kE4M3, kE2M1, kSixteen
};
constexpr float kFp4Values[] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.f, -.5, -1, -1.5, -2, -3, -4, -6};

inline float half_to_float(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  uint32_t bits = (h & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : 0;
  // A subnormal of fp16 beside the smallest normal one: no subnormal of float32, which may count as 0
  const bool small = (h & 0x7c00) == 0;
  const uint32_t moved = magnitude + (small ? 0x38800000 : 0x38000000);
  const float finite = load<float>(&moved) - (small ? 0x1p-14f : 0.0f);
  bits = (h & 0x7c00) == 0x7c00 ? bits : load<uint32_t>(&finite);
  bits |= sign;
  return load<float>(&bits);
}

inline float bfloat_to_float(uint16_t b) {
  const uint32_t bits = static_cast<uint32_t>(b) << 16;
  return load<float>(&bits);
}

// A quarter of it: six times the largest scale has no room.
inline float e8m0_to_float(uint8_t code) {
  const uint32_t bits = code == 255 ? 0x7fc00000 : code ? uint32_t{code} << 23 : 1u << 22;
  return load<float>(&bits) / 4;
}

inline float e4m3_to_float(uint8_t code) {
  const uint32_t rest = code & 0x7f, bits = rest == 0x7f ? 0x7fc00000 : rest << 20;
  const float normal = load<float>(&bits) * 0x1p120f, v = rest < 8 ? rest * 0x1p-9f : normal;
  return code & 0x80 ? -v : v;
}

template <class T, class Convert>
inline void convert(const void* values, long first, long column, long count, float* out,
                    Convert to_float) {
  const T* p = static_cast<const T*>(values) + first;
  if (column == 1)
    for (long g = 0; g < count; ++g) out[g] = to_float(p[g]);
  else
    for (long g = 0; g < count; ++g) out[g] = to_float(p[g * column]);
}

// Scales or zeros [N or 1, groups or 1], addressed by two strides (0 repeats).
struct Table {
  const void* values;
  Kind kind;
  long row, column;

  // The parameters of row n as dense floats, in place or in `buffer`.
  const float* of(long n, long count, float* buffer) const {
    if (kind == kFloat32 && (column == 1 || count == 1))
      return static_cast<const float*>(values) + n * row;
    fill(n * row, count, buffer);
    return buffer;
  }

  __attribute__((noinline)) void fill(long first, long count, float* out) const {
    const auto as_is = [](auto v) { return static_cast<float>(v); };
    switch (kind) {
      case kNone:  // two's complement nibbles become offset ones
        return convert<float>(&kEight, 0, 0, count, out, as_is);
      case kFloat32: return convert<float>(values, first, column, count, out, as_is);
      case kBFloat16: return convert<uint16_t>(values, first, column, count, out, bfloat_to_float);
      case kFloat16: return fill_from_half(first, count, out);
      case kInt32: return convert<int32_t>(values, first, column, count, out, as_is);
      case kInt8: return convert<int8_t>(values, first, column, count, out, as_is);
      case kUInt8: return convert<uint8_t>(values, first, column, count, out, as_is);
      case kE8M0: return convert<uint8_t>(values, first, column, count, out, e8m0_to_float);
      case kE4M3: return convert<uint8_t>(values, first, column, count, out, e4m3_to_float);
      case kE2M1:
      case kSixteen: return;
    }
  }

  // The values of the sixteen codes, or nullptr: those of INT4.
  const float* sixteen() const {
    return kind == kE2M1 ? kFp4Values : kind == kSixteen ? static_cast<const float*>(values) : nullptr;
  }

  void fill_from_half(long first, long count, float* out) const {
    long g = 0;
#if defined(__F16C__)
    const uint16_t* p = static_cast<const uint16_t*>(values) + first;
    if (column == 1)
      for (; g + 8 <= count; g += 8) store(out + g, _mm256_cvtph_ps(load<__m128i>(p + g)));
#endif
    convert<uint16_t>(values, first + g * column, column, count - g, out + g, half_to_float);
  }

  static constexpr float kEight = 8.0f;
};

struct Weight {
  const void* codes;
  Table scales, zeros;
  long n, k, group;
  long groups = k / group;
};

struct Row {
  const void* codes;
  const float *scales, *zeros;
};

// Nibbles of L bytes to (q - zero) * scale, or of FP4 and tables to value * scale. AVX-512 looks the
// sixteen values up in a register; AVX2 the eight magnitudes of FP4, or a table's values in two registers,
// `scale` and `zero`.
template <int L> struct Nibbles {
  using Float = typename Lanes<L>::Float;
  using Int = typename Lanes<L>::Int;
  Float scale, zero;
  Int flip;
  Kind kind;
#if defined(__AVX512F__)
  static constexpr bool kLookUp = L == 16;
#else
  static constexpr bool kLookUp = false;
#endif

  // flip: 0x88 turns two's complement nibbles into offset ones, whose zero is 8. sixteen: values of
  // the codes, or nullptr.
  Nibbles(float s, float z, int flip_bits, Kind k, const float* sixteen) : kind(k) {
    scale = s - Float{};
    zero = z - Float{};
    flip = flip_bits - Int{};
    if (sixteen) {
      if constexpr (!kLookUp) zero = scale * load<Float>(sixteen + 8);
      scale *= load<Float>(sixteen);
    } else if constexpr (kLookUp) {
      Int code = {};
      for (int i = 0; i < L; ++i) code[i] = i;
      scale *= __builtin_convertvector(code ^ (flip & 15), Float) - zero;
    }
  }

  // Of the low nibbles of L integers.
  Float value(Int nibble) const {
#if defined(__AVX512F__)
    if constexpr (kLookUp) return (Float)_mm512_permutexvar_ps((__m512i)nibble, (__m512)scale);
#endif
    if (kind == kE2M1) return (Float)((Int)look_up(scale, nibble) ^ (nibble & 8) << 28);
    if (kind == kSixteen) return of_two(nibble);
    return (__builtin_convertvector((nibble ^ flip) & 15, Float) - zero) * scale;
  }

  static Float look_up(Float eight, Int index) {
#if defined(__AVX2__)
    if constexpr (L == 8)
      return (Float)_mm256_permutevar8x32_ps((__m256)eight, (__m256i)index);
#endif
    Float v;
    for (int i = 0; i < L; ++i) v[i] = eight[index[i] & 7];
    return v;
  }

  Float of_two(Int nibble) const {
    const Int upper = nibble << 28;  // negative where a code is 8 or more
    const Float low = look_up(scale, nibble), high = look_up(zero, nibble);
#if defined(__AVX2__)
    if constexpr (L == 8)
      return (Float)_mm256_blendv_ps((__m256)low, (__m256)high, (__m256)upper);
#endif
    return upper < 0 ? high : low;
  }
};

// Decodes R rows. Calls visit(r, low, high, j) for every L bytes, and visit_one for each byte left
// over in a group: low and high hold the weights of columns 2j, 2j + 2, ... and 2j + 1, 2j + 3, ....
// kPerGroup: vectors in a group with nothing left over, 0 for any group.
template <int L, int kPerGroup, int R, class Visit, class VisitOne>
inline void decode_int4(const Weight& w, const Row* rows, Visit&& visit, VisitOne&& visit_one) {
  const long bytes = kPerGroup ? kPerGroup * L : (w.group + 1) / 2;
  const long vectors = kPerGroup ? kPerGroup : bytes / L;
  const int flip = w.zeros.kind == kNone ? 0x88 : 0;
  const float* const sixteen = w.zeros.sixteen();
  const long groups = w.groups, k = w.k;
  for (long g = 0; g < groups; ++g) {
    const long start = g * bytes;
    for (int r = 0; r < R; ++r) {
      const uint8_t* codes = static_cast<const uint8_t*>(rows[r].codes);
      const float scale = rows[r].scales[g], zero = sixteen ? 0 : rows[r].zeros[g];
      const Nibbles<L> nibbles(scale, zero, flip, w.zeros.kind, sixteen);
      for (long v = 0; v < vectors; ++v) {
        const auto b = widen<L>(codes + start + v * L);
        visit(r, nibbles.value(b), nibbles.value(b >> 4), start + v * L);
      }
      if constexpr (kPerGroup == 0)
        for (long j = start + vectors * L; j < start + bytes; ++j) {
          const int b = codes[j] ^ flip;
          const auto value = [&](int q) { return (sixteen ? sixteen[q] : q - zero) * scale; };
          visit_one(r, value(b & 15), 2 * j + 1 < k ? value(b >> 4) : 0.0f, j);
        }
    }
  }
}

// The same for INT8 and FP8: visit(r, values, j), one column a lane.
template <Codes C, int L, int kPerGroup, int R, class Visit, class VisitOne>
inline void decode_bytes(const Weight& w, const Row* rows, Visit&& visit, VisitOne&& visit_one) {
  using Float = typename Lanes<L>::Float;
  const long groups = w.groups, group = kPerGroup ? kPerGroup * L : w.group;
  const long vectors = kPerGroup ? kPerGroup : group / L;
  for (long g = 0; g < groups; ++g) {
    const long start = g * group;
    for (int r = 0; r < R; ++r) {
      const int8_t* codes = static_cast<const int8_t*>(rows[r].codes);
      const float scale = rows[r].scales[g];
      const Float s = scale - Float{};
      for (long v = 0; v < vectors; ++v) {
        const long j = start + v * L;
        if constexpr (C == Codes::kFp8)
          visit(r, e4m3_values<L>(codes + j) * s, j);
        else
          visit(r, __builtin_convertvector(widen<L>(codes + j), Float) * s, j);
      }
      if constexpr (kPerGroup == 0)
        for (long j = start + vectors * L; j < start + group; ++j)
          visit_one(r, (C == Codes::kFp8 ? e4m3_to_float(codes[j]) : codes[j]) * scale, j);
    }
  }
}

// y[m, n .. n + R) for R rows of w and M rows of a. INT4: `even` and `odd` are the columns of a of
// either parity, `a_row` apart; else `even` is a.
template <Codes C, int M, int L, int kPerGroup, int R>
inline void dot_rows(const Weight& w, long n, const Row* rows, const float* even, const float* odd,
                     long a_row, float* y) {
  using Float = typename Lanes<L>::Float;
  Float acc[R][M], acc_odd[R][M];
  float rest[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      acc[r][m] = acc_odd[r][m] = Float{};
      rest[r][m] = 0;
    }
  if constexpr (C == Codes::kInt4) {
    const auto visit = [&](int r, Float low, Float high, long j) {
      for (int m = 0; m < M; ++m) {
        acc[r][m] += low * load<Float>(even + m * a_row + j);
        acc_odd[r][m] += high * load<Float>(odd + m * a_row + j);
      }
    };
    const auto visit_one = [&](int r, float low, float high, long j) {
      for (int m = 0; m < M; ++m)
        rest[r][m] += low * even[m * a_row + j] + high * odd[m * a_row + j];
    };
    decode_int4<L, kPerGroup, R>(w, rows, visit, visit_one);
  } else {
    const auto visit = [&](int r, Float v, long j) {
      for (int m = 0; m < M; ++m) acc[r][m] += v * load<Float>(even + m * a_row + j);
    };
    const auto visit_one = [&](int r, float v, long j) {
      for (int m = 0; m < M; ++m) rest[r][m] += v * even[m * a_row + j];
    };
    decode_bytes<C, L, kPerGroup, R>(w, rows, visit, visit_one);
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) y[m * w.n + n + r] = sum<L>(acc[r][m] + acc_odd[r][m]) + rest[r][m];
}

// Calls body(L, kPerGroup) as integral constants: the vectors that suit the group.
template <class Body> inline void with_vectors(const Weight& w, int codes_per_lane, Body&& body) {
  using std::integral_constant;
  constexpr integral_constant<int, kWidest> widest;
  constexpr integral_constant<int, 8> narrow;
  const long lanes = w.group % codes_per_lane ? 0 : w.group / codes_per_lane;
  if (lanes == kWidest)
    body(widest, integral_constant<int, 1>{});
  else if (lanes == 2 * kWidest)
    body(widest, integral_constant<int, 2>{});
  else if (lanes == 4 * kWidest)
    body(widest, integral_constant<int, 4>{});
  else if (lanes == 8)
    body(narrow, integral_constant<int, 1>{});
  else
    body(widest, integral_constant<int, 0>{});
}

// Calls body(n, rows, R) for R rows of w at a time, R a constant, spread over the threads.
template <Codes C, int R, class Body>
inline void for_each_rows(const Weight& w, int threads, Body&& body) {
  const long stride = C == Codes::kInt4 ? (w.k + 1) / 2 : w.k, groups = w.groups;
#pragma omp parallel num_threads(threads) if (w.n * w.k > kWorthThreads)
  {
    std::vector<float> buffer(2 * R * groups);
    const auto row = [&](long n, int slot) {
      float* scales = buffer.data() + 2 * slot * groups;
      return Row{static_cast<const char*>(w.codes) + n * stride, w.scales.of(n, groups, scales),
                 C == Codes::kInt4 ? w.zeros.of(n, groups, scales + groups) : nullptr};
    };
#pragma omp for schedule(static)
    for (long first = 0; first < w.n; first += R) {
      Row rows[R];
      if (first + R <= w.n) {
        for (int r = 0; r < R; ++r) rows[r] = row(first + r, r);
        body(first, rows, std::integral_constant<int, R>{});
      } else {
        for (long n = first; n < w.n; ++n) {
          rows[0] = row(n, 0);
          body(n, rows, std::integral_constant<int, 1>{});
        }
      }
    }
  }
}

// A decoded weight serves M rows of a, an a that was loaded R rows of w.
template <Codes C, int M>
void dot(const Weight& w, const float* even, const float* odd, long a_row, float* y, int threads) {
  with_vectors(w, C == Codes::kInt4 ? 2 : 1, [&](auto lanes, auto per_group) {
    for_each_rows<C, 4 / M>(w, threads, [&](long n, const Row* rows, auto count) {
      dot_rows<C, M, lanes(), per_group(), count()>(w, n, rows, even, odd, a_row, y);
    });
  });
}

// Sums of each of four vectors.
template <int L> inline void sum_four(const typename Lanes<L>::Float* v, float* out) {
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    const auto ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const auto cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 all = _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd),
                                     (__m512)_mm512_unpackhi_pd(ab, cd));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all),
                                      (__m256)_mm512_extractf64x4_pd((__m512d)all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    return;
  }
#endif
  for (int i = 0; i < 4; ++i) out[i] = sum<L>(v[i]);
}

// y[m, r] for M rows of a and R of w, both dense, `length` floats a row. Not inlined: one copy for
// all decoders.
template <int M, int R>
__attribute__((noinline)) void tile(const float* a, const float* w, long length, float* y, long y_row) {
  using Float = typename Lanes<kWidest>::Float;
  Float acc[R][4];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < 4; ++m) acc[r][m] = Float{};
  for (long j = 0; j < length; j += kWidest) {
    Float b[R];
    for (int r = 0; r < R; ++r) b[r] = load<Float>(w + r * length + j);
    for (int m = 0; m < M; ++m) {
      const Float x = load<Float>(a + m * length + j);
      for (int r = 0; r < R; ++r) acc[r][m] += x * b[r];
    }
  }
  for (int r = 0; r < R; ++r) {
    float sums[4];
    sum_four<kWidest>(acc[r], sums);
    for (int m = 0; m < M; ++m) y[m * y_row + r] = sums[m];
  }
}

// R decoded rows of w [R, length] in the order of a: INT4 even columns, then odd ones.
template <Codes C, int L, int kPerGroup, int R>
inline void decode_rows(const Weight& w, const Row* rows, float* out, long length) {
  const long odd = length / 2;
  if constexpr (C == Codes::kInt4) {
    const auto visit = [&](int r, auto low, auto high, long j) {
      store(out + r * length + j, low);
      store(out + r * length + odd + j, high);
    };
    const auto visit_one = [&](int r, float low, float high, long j) {
      out[r * length + j] = low;
      out[r * length + odd + j] = high;
    };
    decode_int4<L, kPerGroup, R>(w, rows, visit, visit_one);
  } else {
    const auto visit = [&](int r, auto v, long j) { store(out + r * length + j, v); };
    const auto visit_one = [&](int r, float v, long j) { out[r * length + j] = v; };
    decode_bytes<C, L, kPerGroup, R>(w, rows, visit, visit_one);
  }
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;

// Aligned to cache lines: a load across two lines costs as much as two.
inline Floats zeroed(long count) {
  const size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
  auto* memory = static_cast<float*>(std::aligned_alloc(64, bytes));
  std::memset(memory, 0, bytes);
  return Floats(memory);
}

template <Codes C>
void tiles(const Weight& w, long m, const float* a, long length, float* y, int threads) {
  const long fit = kTileBytes / (length * static_cast<long>(sizeof(float)));
  const long chunk = fit < 32 ? 32 : fit / 4 * 4;
  with_vectors(w, C == Codes::kInt4 ? 2 : 1, [&](auto lanes, auto per_group) {
    for (long begin = 0; begin < m; begin += chunk) {
      const long end = m < begin + chunk ? m : begin + chunk;
      for_each_rows<C, kTileRows>(w, threads, [&](long n, const Row* rows, auto count) {
        // Padding stays zero: it meets that of a, and nought times an old NaN is none.
        thread_local std::vector<float> memory;
        thread_local long memory_k = 0;
        if (memory_k != w.k) memory.assign(kTileRows * length + 16, 0.0f);
        memory_k = w.k;
        float* decoded = memory.data();
        decoded += (64 - reinterpret_cast<uintptr_t>(decoded) % 64) % 64 / sizeof(float);
        decode_rows<C, lanes(), per_group(), count()>(w, rows, decoded, length);
        long i = begin;
        const auto at = [&](auto some) {
          tile<some(), count()>(a + i * length, decoded, length, y + i * w.n + n, w.n);
          i += some();
        };
        while (end - i >= 4) at(std::integral_constant<int, 4>{});
        if (end - i >= 2) at(std::integral_constant<int, 2>{});
        if (end - i == 1) at(std::integral_constant<int, 1>{});
      });
    }
  });
}

template <Codes C>
void matmul(const Weight& w, long m, const float* a, float* y, int threads) {
  // A row of a: INT4 its even columns, then its odd ones; else as it is. Padded to whole vectors.
  constexpr long kParts = C == Codes::kInt4 ? 2 : 1;
  const long part = (w.k + kParts - 1) / kParts, a_part = (part + 15) / 16 * 16;
  const long length = kParts * a_part;
  Floats memory;
  const float* x = a;
  if (C == Codes::kInt4 || length != w.k) {
    memory = zeroed(m * length);
    for (long i = 0; i < m; ++i)
      for (long c = 0; c < kParts; ++c)
        for (long j = 0; j < (w.k - c + kParts - 1) / kParts; ++j)
          memory[i * length + c * a_part + j] = a[i * w.k + kParts * j + c];
    x = memory.get();
  }
  if (m >= kTileFrom) return tiles<C>(w, m, x, length, y, threads);
  const float* odd = x + (C == Codes::kInt4 ? a_part : 0);
  long i = 0;
  const auto at = [&](auto rows) {
    dot<C, rows()>(w, x + i * length, odd + i * length, length, y + i * w.n, threads);
    i += rows();
  };
  while (m - i >= 4) at(std::integral_constant<int, 4>{});
  if (m - i >= 2) at(std::integral_constant<int, 2>{});
  if (m - i == 1) at(std::integral_constant<int, 1>{});
}

}  // namespace

extern "C" {

// Tables are passed as address, Kind, row stride, column stride. zeros of kind 0: signed codes; of
// kSixteen: the address of the values.
void intlass_matmul_int4(float* y, const float* a, long m, const uint8_t* codes, const void* s,
                         int s_kind, long s_row, long s_column, const void* z, int z_kind,
                         long z_row, long z_column, long n, long k, long group, int threads) {
  const Weight w{
      codes, {s, Kind(s_kind), s_row, s_column}, {z, Kind(z_kind), z_row, z_column}, n, k, group};
  matmul<Codes::kInt4>(w, m, a, y, threads);
}

void intlass_matmul_int8(float* y, const float* a, long m, const int8_t* codes, const void* s,
                         int s_kind, long s_row, long s_column, long n, long k, long group,
                         int threads) {
  const Weight w{codes, {s, Kind(s_kind), s_row, s_column}, {nullptr, kNone, 0, 0}, n, k, group};
  matmul<Codes::kInt8>(w, m, a, y, threads);
}

void intlass_matmul_fp8(float* y, const float* a, long m, const int8_t* codes, const void* s,
                        int s_kind, long s_row, long s_column, long n, long k, long group,
                        int threads) {
  const Weight w{codes, {s, Kind(s_kind), s_row, s_column}, {nullptr, kNone, 0, 0}, n, k, group};
  matmul<Codes::kFp8>(w, m, a, y, threads);
}
}
