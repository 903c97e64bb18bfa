// Moving tiles: cp.async rings, swizzled shared memory, typed scalar loads.
#pragma once
#include "operands.cuh"

typedef long long i64;

// dtype of a pointer that is read once per output: a run-time code, since it costs nothing there
enum Dtype : int { none_t, f32_t, bf16_t, fp16_t, i32_t, i8_t, u8_t };

__device__ __forceinline__ float load_as_float(const void* p, i64 i, int dtype) {
  switch (dtype) {
    case f32_t: return static_cast<const float*>(p)[i];
    case bf16_t: return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    case fp16_t: return __half2float(static_cast<const __half*>(p)[i]);
    case i32_t: return float(static_cast<const int*>(p)[i]);
    case i8_t: return float(static_cast<const signed char*>(p)[i]);
    default: return float(static_cast<const unsigned char*>(p)[i]);
  }
}

template <class T> __device__ __forceinline__ float as_float(T v) { return float(v); }

__device__ __forceinline__ void store_rounded(float* p, float v) { *p = v; }
__device__ __forceinline__ void store_rounded(__nv_bfloat16* p, float v) {
  *p = __float2bfloat16_rn(v);
}
__device__ __forceinline__ void store_rounded(__half* p, float v) { *p = __float2half_rn(v); }

// int32 to float, rounded to odd: a later rounding to a narrower type is then the only one
__device__ __forceinline__ float to_float_odd(int v) {
  float f = __int2float_rz(v);
  return (__float2int_rz(f) != v && v != (int)0x80000000) ? __int_as_float(__float_as_int(f) | 1)
                                                          : f;
}

__device__ __forceinline__ u32 smem_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

// 16 bytes, of which the first `valid` are read and the rest are zero
__device__ __forceinline__ void cp_async_16(u32 smem, const void* gmem, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(valid)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }
template <int n> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// Plain loads, which the compiler may move ahead of the MMAs but not across a barrier.
template <int words>
__device__ __forceinline__ void load_shared(u32 (&v)[words], const char* from) {
  if constexpr (words == 4) {
    const uint4 t = *reinterpret_cast<const uint4*>(from);
    v[0] = t.x, v[1] = t.y, v[2] = t.z, v[3] = t.w;
  } else if constexpr (words == 2) {
    const uint2 t = *reinterpret_cast<const uint2*>(from);
    v[0] = t.x, v[1] = t.y;
  } else {
    v[0] = *reinterpret_cast<const u32*>(from);
  }
}

// A tile of rows in shared memory, kept in 16-byte chunks. A warp reads one span of eight rows at a
// time, each lane its own words; the chunks of a row are permuted (XOR) so that such a read touches
// every bank once:
//
//     chunk j of row r lies at chunk  j ^ swizzle(r)  of that row
template <class Kind, int rows_, int block_k> struct SmemTile {
  static constexpr int rows = rows_;
  static constexpr int row_bytes = block_k * Kind::bits / 8;
  static constexpr int bytes = rows * row_bytes;
  static constexpr int words = span_words<Kind>;
  static constexpr int chunks = row_bytes / 16;  // of a row
  static constexpr int rows_per_line = chunks < 8 ? 8 / chunks : 1;
  static constexpr int chunks_per_read = words;  // four lanes of 4 * words bytes
  static_assert(row_bytes % 16 == 0 && (chunks & (chunks - 1)) == 0,
                "block_k must make a row of the tile a power-of-two number of 16-byte chunks");

  static __device__ __forceinline__ int swizzle(int row) {
    return (row / rows_per_line * chunks_per_read) & (chunks < 8 ? chunks - 1 : 7);
  }
  static __device__ __forceinline__ u32 chunk_offset(int row, int chunk) {
    return row * row_bytes + ((chunk ^ swizzle(row)) << 4);
  }
  // A lane's words of span `s` of row `row`; quarter = lane % 4
  static __device__ __forceinline__ void load(u32 (&v)[words], const char* base, int row, int s,
                                              int quarter) {
    const int byte = s * span_bytes<Kind> + quarter * words * 4;
    load_shared(v, base + chunk_offset(row, byte >> 4) + (byte & 15));
  }
};

// Fills one tile after another along the rows of a row-major matrix. A thread copies the same
// 16-byte column of every row_step-th row, so that all it keeps is a pointer and a byte count.
// Whatever lies outside the matrix becomes zero. `aligned`: rows start on 16-byte boundaries.
template <class Tile, int threads, bool aligned> struct TileFiller {
  static constexpr int row_step = threads / Tile::chunks;
  static constexpr int steps = (Tile::rows + row_step - 1) / row_step;
  static_assert(threads % Tile::chunks == 0 && row_step % 8 == 0,
                "the rows of a thread must share one swizzle, which repeats every eight rows");

  const char* from;
  i64 step_bytes;
  int to, rows_left, bytes_left;

  __device__ __forceinline__ TileFiller(const char* gmem, i64 stride, i64 row0, i64 matrix_rows,
                                        int byte0, int matrix_bytes) {
    const int row = threadIdx.x / Tile::chunks, chunk = threadIdx.x % Tile::chunks;
    from = gmem + (row0 + row) * stride + byte0 + chunk * 16;
    step_bytes = row_step * stride;
    to = Tile::chunk_offset(row, chunk);
    rows_left = int(min(i64(Tile::rows), matrix_rows - row0)) - row;
    bytes_left = matrix_bytes - byte0 - chunk * 16;
  }

  __device__ __forceinline__ void fill_next(char* tile) {
    const int valid = max(0, min(16, bytes_left));
    const char* p = from;
#pragma unroll
    for (int i = 0; i < steps; ++i, p += step_bytes) {
      if (Tile::rows % row_step && i == steps - 1 &&
          int(threadIdx.x) / Tile::chunks + i * row_step >= Tile::rows)
        break;
      copy_16(tile + to + i * row_step * Tile::row_bytes, p, i * row_step < rows_left ? valid : 0);
    }
    from += Tile::row_bytes;
    bytes_left -= Tile::row_bytes;
  }

  static __device__ __forceinline__ void copy_16(char* to, const char* from, int valid) {
    if constexpr (aligned) {
      cp_async_16(smem_address(to), from, valid);
    } else {
      u32 v[4] = {0, 0, 0, 0};
#pragma unroll
      for (int b = 0; b < 16; ++b)
        if (b < valid) v[b / 4] |= u32(static_cast<unsigned char>(from[b])) << (8 * (b % 4));
      *reinterpret_cast<uint4*>(to) = make_uint4(v[0], v[1], v[2], v[3]);
    }
  }
};
