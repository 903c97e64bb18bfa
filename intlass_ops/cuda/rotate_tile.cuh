// rotate_quantize.cu's rotation: the shapes that follow from its configuration, and h and x on their
// way to products.
#pragma once
#include "rotate_units.cuh"

constexpr bool tensor_cores = sizeof(T) == 2;
constexpr int width = R < 32 ? 32 : R;
constexpr int blocks = width / R, run = 8 / blocks;  // of a row; consecutive values of a lane
constexpr int pieces_per_row = width / piece;
constexpr int column_warps = width / 32, warps = column_warps * Config::row_warps;
constexpr int threads = 32 * warps;
constexpr int rows = Config::row_warps * tiles * 16, capacity = rows * pieces_per_row;
constexpr int steps = R / 16, columns = piece / 8;  // MMAs along k, and along the columns of a warp
// Of a group, or of a piece of it: parts of a lane's eight values, and lanes
constexpr int near = scope == quads ? Config::group_size : piece;
constexpr int parts = near < 32 && blocks == 2 ? 2 : 1, group_lanes = near * parts / 8;
static_assert(R >= 16 && (R & (R - 1)) == 0, "rows are whole MMAs");
static_assert(group_lanes >= 1 && group_lanes <= 4, "a group in a piece lies in one quad of lanes");
static_assert(integers || (scope == quads && group_lanes >= 2), "FP4 groups are 16 or 32 values");

// ---- shared memory: the ring, h behind it (over the last stage until that is filled) -----------
constexpr int row_bytes = width * sizeof(T), row_chunks = row_bytes / 16;
constexpr int stage_bytes = rows * row_bytes;
constexpr int h_row = 2 * R + 16, h_rows = R > 128 ? 64 : R;  // staged at a time
constexpr int h_bytes = tensor_cores ? h_rows * h_row : 0;
// Codes of four bits come in pieces of 16 bytes, which lie apart where several warps share a row.
// Two units of them are collected behind all that.
constexpr bool collected = bits < 8 && column_warps > 1;
constexpr int codes_at =
    (stages - 1) * stage_bytes + (stage_bytes > h_bytes ? stage_bytes : h_bytes);

extern __shared__ __align__(128) char smem[];

// Eight rows meet eight banks.
__device__ __forceinline__ int swizzle(int row) { return row_chunks < 8 ? row >> 1 & 3 : row & 7; }
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return row * row_bytes + (chunk ^ swizzle(row)) * 16;
}

using UnitsOfBlock = Units<capacity>;
struct Layout {
  static constexpr int threads = ::threads, rows = ::rows, row_chunks = ::row_chunks;
  static __device__ __forceinline__ int chunk_at(int row, int chunk) {
    return ::chunk_at(row, chunk);
  }
};

// ---- rotation ----------------------------------------------------------------------------------
// h as B fragments of step s and column tile j. Columns n = 0..7 of a tile are, of the columns that
// the lanes with lane%4 == n / 2 own, those numbered 2j + n % 2.
struct Rotation {
  u32 b[tensor_cores ? steps : 1][columns][2];

  __device__ __forceinline__ void load(const Params& p, char* to, int column_warp, int lane,
                                       int thread) {
    const u32* h = static_cast<const u32*>(p.h);
#pragma unroll
    for (int first = 0; first < R; first += h_rows) {
      if (first) __syncthreads();
      for (int i = thread; i < h_rows * R / 2; i += threads) {
        const int row = i / (R / 2), c = i % (R / 2) * 2, inner = c % piece;
        const int at = c - inner + inner % run / 2 * 8 + inner / run * 2;
        cp_async_4(smem_address(to) + row * h_row + at * 2, h + first * (R / 2) + i);
      }
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      const u32 from =
          smem_address(to) + lane % 16 * h_row + (column_warp * 32 + lane / 16 * 8) * 2;
#pragma unroll
      for (int s = 0; s < h_rows / 16; ++s)
#pragma unroll
        for (int j = 0; j < columns; j += 2)
          load_transposed(&b[first / 16 + s][j][0], from + s * 16 * h_row + j * 16);
    }
    __syncthreads();
  }
  static __device__ __forceinline__ void cp_async_4(u32 to, const u32* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
  }
  static __device__ __forceinline__ void load_transposed(u32* r, u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  }
};

// Values of a lane: [tile][pair of columns][row lane / 4: two, row lane / 4 + 8: two]
using Values = float[tiles][4][4];

__device__ __forceinline__ void rotate(Values& v, const Rotation& h, u32 stage, int row, int lane) {
  const float zeros[4] = {0.f, 0.f, 0.f, 0.f};
  // ldmatrix takes the addresses of rows 0..15, first their left eight columns, then the right
  const int own = row + lane % 16, chunk = lane / 16 ^ swizzle(own);
  stage += own * row_bytes;
#pragma unroll
  for (int s = 0; s < width / 16; ++s)
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) {
      u32 a[4];
      load_matrices<4>(a, stage + (2 * s ^ chunk) * 16 + tile * 16 * row_bytes);
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        if constexpr (R == 16)
          mma(v[tile][2 * s + j], a, h.b[0][j], zeros, Kind{});
        else
          mma(v[tile][j], a, h.b[s][j], s ? v[tile][j] : zeros, Kind{});
      }
    }
}

// float32: without tensor cores
__device__ __forceinline__ void rotate_exactly(Values& v, const Params& p, const char* stage,
                                               int row, int column_warp, int lane) {
  const int g = lane / 4, t = lane % 4;
  const float* h = static_cast<const float*>(p.h) + column_warp * 32 + t * run;
#pragma unroll
  for (int i = 0; i < tiles * 16; ++i) v[i / 16][i / 4 % 4][i % 4] = 0.f;
#pragma unroll 1
  for (int k = 0; k < R; k += 4) {
    float4 m[4][run / 4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int c = 0; c < run / 4; ++c)
        m[i][c] = __ldg(reinterpret_cast<const float4*>(h + (k + i) * R) + c);
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int b = 0; b < blocks; ++b) {
          const int r = row + tile * 16 + half * 8 + g;
          const float4 x = *reinterpret_cast<const float4*>(stage + chunk_at(r, (b * R + k) / 4));
          const float xs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int c = 0; c < run / 4; ++c) {
              const float ms[4] = {m[i][c].x, m[i][c].y, m[i][c].z, m[i][c].w};
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const int at = b * run + c * 4 + e;
                float& sum = v[tile][at / 2][half * 2 + at % 2];
                sum = __fmaf_rn(xs[i], ms[e], sum);
              }
            }
        }
  }
}
