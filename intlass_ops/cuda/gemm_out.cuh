// From the sums of a block of gemm.cu to the output: by itself, or with those of blocks that have summed
// other stripes of K.
#pragma once
#include "gemm_tile.cuh"

// Add the stripes of a tile in order; integers stay exact. True for the block that arrived last and
// now holds the sum. A thread's values of a stripe lie `threads` apart, in room for Sums or Totals.
template <class T, class Values>
__device__ __forceinline__ bool add_stripes(const Params& p, i64 tile, Values& mine) {
  constexpr int split_k = Config::split_k, count = sizeof(Values) / 4;
  constexpr int room = 4 * (tiles_n * tiles_m + tiles_n + tiles_m);
  static_assert(count <= room, "config.Gemm.values_per_block must hold every value of a thread");
  __shared__ bool last;
  T* values = reinterpret_cast<T*>(&mine);
  T* stripes = reinterpret_cast<T*>(p.workspace) + tile * split_k * room * threads + threadIdx.x;
#pragma unroll
  for (int v = 0; v < count; ++v)
    __stcg(stripes + (i64(blockIdx.y) * room + v) * threads, values[v]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(p.arrivals + tile, 1) == split_k - 1;
    if (last) p.arrivals[tile] = 0;
  }
  __syncthreads();
  if (!last) return false;
  __threadfence();
  clear(mine);
#pragma unroll 1
  for (int s = 0; s < split_k; ++s)
#pragma unroll
    for (int v = 0; v < count; ++v) values[v] += __ldcg(stripes + (i64(s) * room + v) * threads);
  return true;
}

// A lane's outputs for one token: neighbours, and so are those of the residual
union Outputs {
  Out v[lane_rows];
  u32 words[lane_rows * int(sizeof(Out)) / 4];
};

// Finish a lane's neighbouring rows of W for each of its tokens.
__device__ __forceinline__ void epilogue(const Params& p, const Vectors& vectors,
                                         const Totals& total) {
  const Place place(p);
  const i64 m0 = place.m0, n0 = place.n0;
  const int thread = anew(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int row = (warp % warps_n * 8 + lane / 4) * lane_rows;
  const int token0 = warp / warps_n * tiles_m * 8 + lane % 4 * 2;
  const i64 left = p.n - n0 - row;
  if (left <= 0) return;
  const bool whole = p.n % lane_rows == 0;  // the output is new, so a row starts aligned if N does
  Out* out = static_cast<Out*>(p.out) + (m0 + token0) * p.n + n0 + row;
  const Out* added = residual_at(p, m0 + token0, n0 + row);
#pragma unroll
  for (int j = 0; j < tiles_m; ++j) {
    Outputs residual[2] = {};  // asked for together: loads do not overtake the stores before them
#pragma unroll
    for (int c = 0; c < 2; ++c)
      if (Config::residual && m0 + token0 + j * 8 + c < p.m)
        load_global(residual[c].words, added + (j * 8 + c) * p.residual_row);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int token = token0 + j * 8 + c;
      Outputs rounded;
#pragma unroll
      for (int i = 0; i < tiles_n; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int r = 2 * i + h;
          float v = total.y[i][j][2 * h + c];
          if constexpr (has_a_zero) v -= vectors.a_zero[token] * total.w[i][h];
          v *= vectors.factor[token];
          if (p.bias) v += vectors.bias[row + r];
          v = finished(v, residual[c].v[r]);
          store_rounded(&rounded.v[r], v);
        }
      if (m0 + token < p.m) {
        Out* to = out + (j * 8 + c) * p.n;
        if (whole)
          store_global(to, rounded.words);
        else
#pragma unroll
          for (int i = 0; i < lane_rows; ++i)
            if (i < left) to[i] = rounded.v[i];
      }
    }
  }
}
