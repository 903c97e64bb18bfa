// From a tile of W in shared memory to the A operand of wgmma.
//
// A lane's fragments hold the k that wgmma prescribes, two or four neighbours at a time; in a row
// of plain bytes these lie in every fourth piece of 1, 2 or 4 bytes, so the lanes of a quad read the
// same words and each picks its own pieces with one PRMT.
#pragma once
#include "hopper_tile.cuh"
constexpr bool lut4_in_shared = block_m <= 64;  // more are bound by shared memory
#include "lut4_pairs.cuh"

constexpr bool block_fp4 = same<W, e2m1>::value, of_lut4 = looks_up<W>;
// X was INT4 or FP4, and the kernel that made it wider (widen.cu, decode_fp4.cu) changed the order of each
// 32 k: what wgmma wants from a lane then lies in one word of W, as nibbles to mask out.
constexpr bool lane_order = Config::lane_order;
static_assert(!lane_order || W::bits == 4, "the order in which a word holds eight codes");
constexpr int row_scales =
    block_fp4 && block_size<Scale> == 16 && !lane_order ? 2 : 1;    // in a chunk
constexpr int kept_scales = scaled && staged_scales ? flushes : 1;  // of those, for a tile of K
// What sums are too small by: FP4's scales, and what its activations were divided by
constexpr float sum_unit = (block_fp4 ? block_unit<Scale> : 1.f) * Config::x_unit;
// What a product of codes stands for, beside P::unit
using Codes =
    Select<of_lut4, Lut4Codes, typename Select<W::bits == 4, Nibbles<X>, Bytes<X, W>>::type>::type;
constexpr float code_unit = Codes::unit;
// Signed codes in groups under bf16: a code as it lies, a subnormal's bits of code * 2^-133, times the
// scale, less 8 scales, is (code - 8) * scale in one FMA, which rounds as dequantising does. The sums are
// too small by `weight_unit`. It takes scales below 2^7 that keep all bits below 2^-12; others become
// NaN, and the rows of a warp that has NaN sums are summed again, slowly.
constexpr bool one_fma =
    scaled && !split_scales && !has_zeros && same<X, bf16>::value && same<W, s4>::value;
constexpr float weight_unit = one_fma                        ? 4096.f
                              : fp8_takes_scales             ? fp8_unit
                              : split_scales || W::bits == 8 ? code_unit
                                                             : 1.f;

// How a lane finds its pieces of k in a word of W, or of INT8 codes in two: four neighbours, or two
template <class X, class W> struct Pieces {
  static constexpr bool whole_chunk = X::bits == 16;  // all lanes of a quad need some of each word
  u32 selector;
  u32 factors = Codes::factors + blockIdx.z;  // 0: ptxas would make the constant for each FMA

  __device__ __forceinline__ Pieces(u32 quarter) {
    const u32 b = X::bits == 8 ? quarter % 2 * 2 : W::bits == 4 ? quarter : quarter * 2;
    selector = block_fp4      ? b * 0x11 | (b + 4) * 0x1100
               : of_lut4      ? b | (lut4_pairs_in_shared ? 0x4440 : b + 4 << 4)
               : X::bits == 8 ? (b + 4) | b << 4 | (b + 5) << 8 | (b + 1) << 12
               : W::bits == 4 ? b | b << 8
                              : Bytes<X, W>::selector(b);
    if constexpr (!lane_order) pin(selector);  // else ptxas makes it anew in each tile of K
  }
  // Two registers of numbers, of two words
  __device__ __forceinline__ void fragments(u32 (&f)[2], u32 w, u32 next) const {
    if constexpr (lut4_pairs_in_shared)
      f[0] = lut4_pair(__byte_perm(w, 0, selector)),
      f[1] = lut4_pair(__byte_perm(next, 0, selector));
    else
      four_numbers<X, W>(f, __byte_perm(w, next, selector));
  }
  // One register of wgmma's A. `offset`: minus what is to be a code of zero, of INT4 as 16-bit floats,
  // times `scale` if one FMA does both
  __device__ __forceinline__ u32 fragment(u32 w, u32 next, u32 offset, u32 scale) const {
    if constexpr (block_fp4) {
      // Each code twice, at the top of a byte: sign and the rest come together
      const u32 twice = __byte_perm(w << 4, w, selector);
      return and_or(twice, 0x80008000, twice << 2 & 0x01c001c0);
    } else if constexpr (X::bits == 8) {
      return xor_and(__byte_perm(w, w << 4, selector), same<W, u4>::value ? 0x80808080u : 0u,
                     0xf0f0f0f0);
    } else if constexpr (W::bits == 8) {
      const u32 two = Bytes<X, W>::take(w, next, selector);
      return fp8_takes_scales ? moved_fp8<X>(two) : Bytes<X, W>::codes(two, factors);
    } else {
      using C = Nibbles<X>;
      constexpr u32 flip = C::magic ^ (same<W, s4>::value ? 0x00800008u : 0u);
      return fma2<X>(and_xor(__byte_perm(w, w, selector), 0x00f0000f, flip),
                     one_fma ? scale : factors, offset);
    }
  }
};

// A group's scale in a word, which has those of two if they are 16 bits: the place of this one is odd or even
__device__ __forceinline__ float scale_in(u32 word, int place) {
  if (sizeof(Scale) == 2 && place % 2) word >>= 16;
  return as_float(reinterpret_cast<const Scale&>(word));
}

// What becomes of a row's codes in the fragments, where they take their scale there: the difference
// from the zero point, times the scale, each rounded to X's type. FP4 times its scale is exact.
// Where scales are split (split_scales.cuh) both are such words, and an offset that is none is not kept.
template <bool> struct Offset {
  u32 offset = Nibbles<X>::minus_8;
  __device__ __forceinline__ void set(u32 v) { offset = v; }
};
template <> struct Offset<false> {
  static constexpr u32 offset = Nibbles<X>::minus_8;
  __device__ __forceinline__ void set(u32) {}
};
struct RowScale : Offset<has_zeros || !split_scales> {
  u32 scale = 0;

  __device__ __forceinline__ RowScale() {}
  __device__ __forceinline__ RowScale(u32 word, int place, Zero z)
      : scale(__byte_perm(word, 0, place % 2 ? 0x3232 : 0x1010)) {
    if constexpr (split_scales) {
      const float s = scale_in(word, place);
      scale = split_scale(s * scale_factor);
      if constexpr (has_zeros) set(split_offset(Nibbles<X>::bottom(as_float(z)), 1 / code_unit, s));
      return;
    }
    if constexpr (one_fma) {
      set(mul2<X>(scale, 0xbb00bb00));     // -8 / weight_unit
      scale = mul2<X>(scale, 0x7a007c00);  // 2^133 / weight_unit, for the nibble above 2^129
      return;
    }
    if constexpr (fp8_takes_scales) {
      scale = mul2<X>(scale, halves<X>(scale_factor, scale_factor));
      return;
    }
    if constexpr (code_unit != weight_unit) scale = mul2<X>(scale, halves<X>(code_unit, code_unit));
    if constexpr (has_zeros)
      set(halves<X>(Nibbles<X>::bottom(as_float(z)), Nibbles<X>::above(as_float(z))));
  }
  __device__ __forceinline__ explicit RowScale(u32 block_factor) : scale(block_factor) {}
  // What is added to a code
  __device__ __forceinline__ u32 addend() const {
    return split_scales && has_zeros ? low_twice(offset) : offset;
  }
  __device__ __forceinline__ u32 times(u32 codes) const {
    if constexpr (block_fp4) return scaled_codes<Scale>(codes, Factor{scale, false});
    if constexpr (split_scales) return times_split(codes, scale, offset);
    return scaled && !one_fma ? mul2<X>(codes, scale) : codes;
  }
};
// What becomes of a row's sums in groups, sum by sum: scale * (sum - zero * the token's sum)
struct SumScale {
  float values[1 + has_zeros];  // scale, zero

  __device__ __forceinline__ SumScale() {}
  __device__ __forceinline__ SumScale(u32 word, int place, Zero z) {
    values[0] = scale_in(word, place) * (P::unit * code_unit);
    if constexpr (has_zeros) values[1] = in_units_of_zero(z) * (1 / code_unit);
  }
};
// Those of two rows eight apart, and where they lie in a stage for each group of a tile of K
using Staged = Select<scaled, RowScale, SumScale>::type;
static_assert(!staged_scales || sizeof(Staged) == staged_bytes, "as config.Hopper.staged_bytes");
__device__ constexpr int scales_at(int group, int row) {
  return x_bytes + w_bytes + sum_bytes + (group * stage_rows + row) * staged_bytes;
}
__device__ __forceinline__ void store_row_scales(u32 smem, const Staged (&rows)[2]) {
  const u32* v = reinterpret_cast<const u32*>(rows);
  if constexpr (sizeof(rows) == 16)
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(v[0]), "r"(v[1]),
                 "r"(v[2]), "r"(v[3])
                 : "memory");
  else
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(smem), "r"(v[0]), "r"(v[1]) : "memory");
}
template <class T> __device__ __forceinline__ void load_row_scales(T (&rows)[2], const char* from) {
  load_shared(reinterpret_cast<u32(&)[sizeof(rows) / 4]>(rows), from);
}
// Of two scales: not zero, but for the signs, where one FMA is not exact, which is what a scale loses when it
// becomes as large and then as small as the FMA needs it. NaN if there is nothing left.
__device__ __forceinline__ u32 lost_by_one_fma(u32 two) {
  const u32 smallest = mul2<X>(mul2<X>(two, 0x7c007c00), 0x00010001);  // 2^121, 2^-133
  return fma2<X>(smallest, 0xc580c580, two);                           // -weight_unit
}

// FP4: where a thread's rows have their scales, and those of a tile of K, as stored: four to a word. Codes
// take them by one product; the rows of a warp that has one too large for that are summed again, slowly.
constexpr int block_words = (block_k / block_size<Scale> + 3) / 4;
struct BlockScales {
  u32 words[tiles_n][2][block_words];

  // The factors of a row in a chunk
  __device__ __forceinline__ void factors(RowScale (&rows)[row_scales][2], int i, int h, int chunk,
                                          int quarter) const {
    if constexpr (block_size<Scale> == 32) {
      const u32 code = __byte_perm(words[i][h][chunk / 4], 0, 0x4440 + chunk % 4);
      rows[0][h] = RowScale(narrow_factor(code));
    } else if constexpr (lane_order) {
      rows[0][h] = RowScale(e4m3_factor(words[i][h][chunk / 2], chunk % 2 * 2 + quarter / 2));
    } else {
      const u32 two = e4m3_factors(words[i][h][chunk / 2] >> chunk % 2 * 16);
#pragma unroll
      for (int g = 0; g < row_scales; ++g)
        rows[g][h] = RowScale(__byte_perm(two, 0, g ? 0x3232 : 0x1010));
    }
  }
  // Whether one of two rows has a scale that is wide, or no number. Those of e4m3 that are none show as
  // factors.
  __device__ __forceinline__ bool too_large(int i) const {
    if constexpr (same<Scale, e4m3>::value) return false;
    u32 found = 0;
#pragma unroll
    for (int b = 0; b < 2 * block_words; ++b) {
      const u32 word = words[i][b % 2][b / 2];
      found |= ((word & 0x7f7f7f7f) + 0x01010101 * (127 - largest_narrow % 128)) & word;
    }
    return (found & 0x80808080) != 0;
  }
};
// Where K ends in the middle of a tile rows of scales start anywhere that half a tile's may. Past the end are
// the last ones again, whose codes are zeros.
struct BlockReader {
  static constexpr int half = block_k / block_size<Scale> / 2;  // scales
  const unsigned char* rows[tiles_n][2];
  int last;  // the first scale of the last half

  __device__ __forceinline__ BlockReader(const Params& p, i64 row0, int lane)
      : last(int(p.k) / block_size<Scale> - half) {
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        rows[i][h] = static_cast<const unsigned char*>(p.scales) +
                     scale_at<Config::blocked>(min(row0 + lane / 4 + i * 64 + h * 8, p.n - 1),
                                               p.scale_row, 0);
  }
  __device__ __forceinline__ void read(BlockScales& to, int kt) const {
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if constexpr (Config::half_tiles)
          read_halves(to.words[i][h], rows[i][h], kt);
        else
          read_row(to.words[i][h], rows[i][h], kt);
      }
  }
  static __device__ __forceinline__ void read_row(u32 (&words)[block_words],
                                                  const unsigned char* row, int kt) {
    constexpr int step = scale_step<Config::blocked, Scale>(block_k);
#pragma unroll
    for (int b = 0; b < block_words; ++b)
      words[b] = *reinterpret_cast<const u32*>(row + kt * step + b * (step / block_words));
  }
  __device__ __forceinline__ void read_halves(u32 (&words)[block_words], const unsigned char* row,
                                              int kt) const {
    static_assert(!Config::half_tiles || (block_k == 128 && !Config::blocked),
                  "as config/hopper.py has it");
    const unsigned char* first = row + 2 * kt * half;
    const unsigned char* second = row + min((2 * kt + 1) * half, last);
    if constexpr (block_words == 1) {
      words[0] = *reinterpret_cast<const unsigned short*>(first) |
                 u32(*reinterpret_cast<const unsigned short*>(second)) << 16;
    } else {
      words[0] = *reinterpret_cast<const u32*>(first);
      words[1] = *reinterpret_cast<const u32*>(second);
    }
  }
};

// A turn's chunks of a lane's two rows, as stored, and the lane's place in a tile of W
constexpr int chunk_words = lane_order ? 1 : Pieces<X, W>::whole_chunk ? 4 : 2;
struct Chunk { u32 lo[turn_chunks][chunk_words], hi[turn_chunks][chunk_words]; };

struct Lane {
  int row, quarter, swizzle;
  Pieces<X, W> pieces;

  __device__ __forceinline__ Lane(int first_row, int lane, int warp)
      : row(first_row + warp * 16 + lane / 4), quarter(lane % 4), pieces(lane % 4) {
    swizzle = w_row_bytes < 128 ? lane / (512 / w_row_bytes) : lane / 4;
  }
  __device__ __forceinline__ Chunk load(const char* tile, int i, int chunk) const {
    Chunk c;
#pragma unroll
    for (int j = 0; j < turn_chunks; ++j) {
      const char* at =
          tile + (row * w_row_bytes + ((chunk + j ^ swizzle) << 4)) + i * 64 * w_row_bytes;
      load_row(c.lo[j], at);
      load_row(c.hi[j], at + 8 * w_row_bytes);
    }
    return c;
  }
  // The same of INT4 under INT8 activations in two: where the lane's own words lie in a tile, and they
  __device__ __forceinline__ int place(int chunk) const {
    return row * w_row_bytes + ((chunk ^ swizzle) << 4) + (lane_order ? quarter : quarter / 2) * 4;
  }
  __device__ __forceinline__ Chunk load(const char* at) const {
    Chunk c;
#pragma unroll
    for (int w = 0; w < chunk_words; ++w) {
      c.lo[0][w] = *reinterpret_cast<const u32*>(at + w * 8);
      c.hi[0][w] = *reinterpret_cast<const u32*>(at + w * 8 + 8 * w_row_bytes);
    }
    return c;
  }
  __device__ __forceinline__ void load_row(u32 (&v)[chunk_words], const char* at) const {
    if constexpr (lane_order) {
      v[0] = *reinterpret_cast<const u32*>(at + quarter * 4);
    } else if constexpr (Pieces<X, W>::whole_chunk) {
      load_shared(v, at);
    } else {
      v[0] = *reinterpret_cast<const u32*>(at + quarter / 2 * 4);
      v[1] = *reinterpret_cast<const u32*>(at + quarter / 2 * 4 + 8);
    }
  }
  // In lane_order, a row's: of INT8, even nibbles before odd ones; of 16 bits, nibble i with i + 4
  __device__ __forceinline__ void fragments_of_word(u32 (&f)[2], u32 w, const RowScale&) const {
    constexpr u32 flip = same<W, u4>::value ? 0x80808080 : 0;
    f[0] = xor_and(w << 4, flip, 0xf0f0f0f0), f[1] = xor_and(w, flip, 0xf0f0f0f0);
  }
  __device__ __forceinline__ void fragments_of_word(u32 (&f)[4], u32 w, const RowScale& row) const {
    eight_codes<Scale>(w, Factor{row.scale, false}, f);
  }
  // `step`: of the tile of K, the turn's first
  __device__ __forceinline__ void fragments(u32 (&a)[turn_steps][4], const Chunk& c,
                                            const RowScale (&rows)[kept_scales][row_scales][2],
                                            int step) const {
    if constexpr (lane_order) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        u32 f[2 * chunk_steps];
        fragments_of_word(f, h ? c.hi[0][0] : c.lo[0][0], rows[0][0][h]);
#pragma unroll
        for (int i = 0; i < 2 * chunk_steps; ++i) a[i / 2][i % 2 * 2 + h] = f[i];
      }
    } else if constexpr (of_lut4) {
#pragma unroll
      for (int t = 0; t < turn_steps; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const u32(&words)[chunk_words] = h ? c.hi[t / chunk_steps] : c.lo[t / chunk_steps];
          const RowScale& row = rows[kept_scales > 1 ? (step + t) / steps_per_flush : 0][0][h];
          u32 f[2];
          pieces.fragments(f, words[t % chunk_steps * 2], words[t % chunk_steps * 2 + 1]);
#pragma unroll
          for (int i = 0; i < 2; ++i) a[t][2 * i + h] = row.times(f[i]);
        }
    } else {
#pragma unroll
      for (int t = 0; t < turn_steps; ++t)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int j = t / chunk_steps, u = t % chunk_steps;
          const int group = kept_scales > 1 ? (step + t) / steps_per_flush : 0;
          const RowScale& row = rows[group][u * row_scales / chunk_steps][r % 2];
          const int at = (2 * u + r / 2) * chunk_words / (2 * chunk_steps);
          const u32(&words)[chunk_words] = r % 2 ? c.hi[j] : c.lo[j];
          const u32 code =
              pieces.fragment(words[at], words[(at + 1) % chunk_words], row.addend(), row.scale);
          a[t][r] = row.times(code);
        }
    }
  }
};
