// From a tile of W in shared memory to the A operand of wgmma.
//
// A lane's fragments hold the k that wgmma prescribes, two or four neighbours at a time; in a row
// of plain bytes these lie in every fourth piece of 1, 2 or 4 bytes, so the lanes of a quad read the
// same words and each picks its own pieces with one PRMT.
#pragma once
#include "hopper_tile.cuh"

// INT4 codes as 16-bit floats. A nibble stays where it is, at the bottom of one half word and above that
// of the other, and the factors of an FMA differ: fp16 has room for both below its implicit one; bf16
// has not, but its subnormals and their next binade form one line, bits 0..7 times 2^-133, of which
// the FMA takes 2^6 away.
template <class X> struct Nibbles {  // of INT8 activations: none
  static constexpr u32 magic = 0, factors = 0, minus_8 = 0;
  static constexpr float unit = 1.f;
  static __device__ __forceinline__ u32 minus(float) { return 0; }
};
template <> struct Nibbles<bf16> {
  static constexpr u32 magic = 0, factors = 0x7d007f00, minus_8 = 0xbe00be00;
  static constexpr float unit = 64.f;
  static __device__ __forceinline__ u32 minus(float z) {
    return halves<bf16>(z * (-1 / unit), z * (-1 / unit));
  }
};
template <> struct Nibbles<fp16> {
  static constexpr u32 magic = 0x64006400, factors = 0x2c003c00, minus_8 = 0xd480e408;
  static constexpr float unit = 1.f;
  static __device__ __forceinline__ u32 minus(float z) {
    return halves<fp16>(-1024.f - z, -64.f - z);
  }
};
// What a product of codes stands for, beside P::unit
constexpr float code_unit = W::bits == 4 ? Nibbles<X>::unit : 1.f;

// How a lane finds its pieces of k in a word of W: four neighbours, or two
template <class X, class W> struct Pieces {
  static constexpr bool whole_chunk = X::bits == 16 && W::bits == 4;  // a byte of each word
  u32 selector;

  __device__ __forceinline__ Pieces(u32 quarter) {
    const u32 b = whole_chunk ? quarter : quarter % 2 * 2;
    selector = whole_chunk    ? b | b << 8
               : W::bits == 4 ? (b + 4) | b << 4 | (b + 5) << 8 | (b + 1) << 12
                              : b | (b + 1) << 8;
  }
  // One register of wgmma's A. `offset`: minus what is to be a code of zero, of INT4 as 16-bit floats
  __device__ __forceinline__ u32 fragment(u32 w, u32 offset) const {
    if constexpr (X::bits == 8) {
      return xor_and(__byte_perm(w, w << 4, selector), same<W, u4>::value ? 0x80808080u : 0u,
                     0xf0f0f0f0);
    } else if constexpr (W::bits == 8) {
      return Int8Float16Pair<X>::even_bytes(__byte_perm(w, 0, selector));
    } else {
      using C = Nibbles<X>;
      constexpr u32 flip = C::magic ^ (same<W, s4>::value ? 0x00800008u : 0u);
      return fma2<X>(and_xor(__byte_perm(w, w, selector), 0x00f0000f, flip), C::factors, offset);
    }
  }
};

// What becomes of a row's codes in the fragments, where they take their scale there: the difference
// from the zero point, times the scale, each rounded to X's type
struct RowScale {
  u32 offset = Nibbles<X>::minus_8, scale = 0;

  __device__ __forceinline__ RowScale() {}
  __device__ __forceinline__ RowScale(Scale s, Zero z) {
    scale = halves<X>(as_float(s) * code_unit, as_float(s) * code_unit);
    if constexpr (has_zeros) offset = Nibbles<X>::minus(as_float(z));
  }
};

// One chunk of a lane's two rows, as stored, and the lane's place in a tile of W
struct Chunk { u32 lo[2 * chunk_steps], hi[2 * chunk_steps]; };

struct Lane {
  int row, quarter, swizzle;
  Pieces<X, W> pieces;

  __device__ __forceinline__ Lane(int lane, int warp)
      : row(warp * 16 + lane / 4), quarter(lane % 4), pieces(lane % 4) {
    swizzle = w_row_bytes == 64 ? row / 2 % 4 : row % 8;
  }
  __device__ __forceinline__ Chunk load(const char* tile, int i, int chunk) const {
    Chunk c;
    const char* at = tile + (i * 64 + row) * w_row_bytes + ((chunk ^ swizzle) << 4);
    load_row(c.lo, at);
    load_row(c.hi, at + 8 * w_row_bytes);
    return c;
  }
  __device__ __forceinline__ void load_row(u32 (&v)[2 * chunk_steps], const char* at) const {
    if constexpr (Pieces<X, W>::whole_chunk) {
      load_shared(v, at);
    } else {
      v[0] = *reinterpret_cast<const u32*>(at + quarter / 2 * 4);
      v[1] = *reinterpret_cast<const u32*>(at + quarter / 2 * 4 + 8);
    }
  }
  __device__ __forceinline__ void fragments(u32 (&a)[chunk_steps][4], const Chunk& c,
                                            const RowScale (&rows)[2]) const {
#pragma unroll
    for (int t = 0; t < chunk_steps; ++t)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const RowScale& row = rows[r % 2];
        const u32 codes =
            pieces.fragment(r % 2 ? c.hi[2 * t + r / 2] : c.lo[2 * t + r / 2], row.offset);
        a[t][r] = scaled ? mul2<X>(codes, row.scale) : codes;
      }
  }
};
