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
__device__ __forceinline__ void store_rounded(__nv_bfloat16* p, float v) { *p = __float2bfloat16_rn(v); }
__device__ __forceinline__ void store_rounded(__half* p, float v) { *p = __float2half_rn(v); }

// int32 to float, rounded to odd: a later rounding to a narrower type is then the only one
__device__ __forceinline__ float to_float_odd(int v) {
  float f = __int2float_rz(v);
  return (__float2int_rz(f) != v && v != (int)0x80000000) ? __int_as_float(__float_as_int(f) | 1) : f;
}

__device__ __forceinline__ u32 smem_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

// 16 bytes, of which the first `valid` are read and the rest are zero
__device__ __forceinline__ void cp_async_16(u32 smem, const void* gmem, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(valid));
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }
template <int n> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n));
}

template <int words> __device__ __forceinline__ void load_shared(u32 (&v)[words], u32 address) {
  if constexpr (words == 4)
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(address));
  else if constexpr (words == 2)
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(address));
  else
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v[0]) : "r"(address));
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
  static __device__ __forceinline__ void load(u32 (&v)[words], u32 base, int row, int s, int quarter) {
    const int byte = s * span_bytes<Kind> + quarter * words * 4;
    load_shared(v, base + chunk_offset(row, byte >> 4) + (byte & 15));
  }

  // Copy rows [row0, row0 + rows) and bytes from `byte0` of a row-major matrix into the tile;
  // whatever lies outside the matrix becomes zero. `aligned`: rows start on 16-byte boundaries.
  template <int threads, bool aligned>
  static __device__ __forceinline__ void fill(u32 base, const char* gmem, i64 stride, i64 row0,
                                              i64 matrix_rows, int byte0, int matrix_bytes) {
    const int existing = int(min(i64(rows), matrix_rows - row0));
    const char* tile = gmem + row0 * stride + byte0;
#pragma unroll
    for (int i = threadIdx.x; i < rows * chunks; i += threads) {
      const int row = i / chunks, chunk = i % chunks;
      const int left = matrix_bytes - byte0 - chunk * 16;
      const int valid = row < existing ? max(0, min(16, left)) : 0;
      const char* from = valid ? tile + row * stride + chunk * 16 : gmem;
      const u32 to = base + chunk_offset(row, chunk);
      if constexpr (aligned) {
        cp_async_16(to, from, valid);
      } else {
        u32 v[4] = {0, 0, 0, 0};
#pragma unroll
        for (int b = 0; b < 16; ++b)
          if (b < valid) v[b / 4] |= u32(static_cast<unsigned char>(from[b])) << (8 * (b % 4));
        asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]),
                     "r"(v[3]));
      }
    }
  }
};
