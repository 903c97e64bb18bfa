// From the sums of a block of hopper.cu to the output: by itself, or with those of other blocks that have
// summed other parts of K.
#pragma once
#include "hopper_weights.cuh"

constexpr int slab = Config::slab;  // tokens staged at a time
static_assert(slab % 16 == 0 && block_m % slab == 0, "slabs of whole pairs of token tiles");
constexpr int pitch = 64 * sizeof(Out) + 16;
constexpr int vector = 16 / sizeof(Out);
constexpr int staging_bytes = slab * pitch + block_m * 4;  // of a warpgroup, with a factor a token

__device__ __forceinline__ u32 packed(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const u32&>(v);
}
__device__ __forceinline__ u32 packed(float, float, float) { return 0; }  // fp32 is not packed
__device__ __forceinline__ u32 packed(float a, float b, __half) {
  const __half2 v = __floats2half2_rn(a, b);
  return reinterpret_cast<const u32&>(v);
}

// 16 bytes of the output, or what of them lies inside
__device__ __forceinline__ void store_vector(const Params& p, i64 m, i64 n, const Out* from) {
  Out* to = static_cast<Out*>(p.out) + m * p.n + n;
  if (p.n % vector == 0) {  // the output is freshly allocated, so its rows are aligned
    if (n < p.n) *reinterpret_cast<int4*>(to) = *reinterpret_cast<const int4*>(from);
  } else {
    for (int v = 0; v < vector && n + v < p.n; ++v) to[v] = from[v];
  }
}

// Scale, shift, round once, and write one warpgroup's rows through its own shared memory.
__device__ __forceinline__ void write_out(const Params& p, char* staging, int warpgroup, i64 m0,
                                          i64 row0, int lane, int warp, const Sums& sum,
                                          const Totals& total) {
  const int thread = warp * 32 + lane, quarter = lane % 4;
  float* factor = reinterpret_cast<float*>(staging + slab * pitch);
  const float alpha = alpha_of(p) * sum_unit;
  float bias[tiles_n][2], scale[tiles_n][2];
#pragma unroll
  for (int i = 0; i < tiles_n; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const i64 n = min(row0 + i * 64 + warp * 16 + h * 8 + lane / 4, p.n - 1);
      bias[i][h] = bias_of(p, n);
      scale[i][h] = grouping == channel ? scale_of(p, n, 0) * code_unit : 1.f;
    }
  for (int t = thread; t < block_m; t += 128)
    factor[t] = alpha * a_scale_of(p, min(m0 + t, p.m - 1));
  const u32 staged = smem_address(staging);
  warpgroup_sync(warpgroup);

#pragma unroll
  for (int i = 0; i < tiles_n; ++i) {
    auto y = [&](int e, float f) {
      const int h = e % 4 / 2;
      float v;
      if constexpr (direct)
        v = scale[i][h] * value(sum.acc[i][e]);
      else
        v = total.acc[i][e];
      return v * f + bias[i][h];
    };
#pragma unroll
    for (int m1 = 0; m1 < block_m; m1 += slab) {
      if (m0 + m1 >= p.m) break;
#pragma unroll
      for (int j = 0; j < slab / 8; j += 2) {
        u32 v[4];
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int token = m1 + (j + b) * 8 + quarter * 2, e = (m1 / 8 + j + b) * 4;
          const float f0 = factor[token], f1 = factor[token + 1];
          if constexpr (sizeof(Out) == 2) {
            v[2 * b] = packed(y(e, f0), y(e + 1, f1), Out{});
            v[2 * b + 1] = packed(y(e + 2, f0), y(e + 3, f1), Out{});
          } else {
            float* at = reinterpret_cast<float*>(staging + ((j + b) * 8 + quarter * 2) * pitch) +
                        warp * 16 + lane / 4;
            constexpr int next = pitch / 4;
            at[0] = y(e, f0), at[next] = y(e + 1, f1);
            at[8] = y(e + 2, f0), at[next + 8] = y(e + 3, f1);
          }
        }
        if constexpr (sizeof(Out) == 2) {
          // blocks: (tokens j, rows 0-7) (j, 8-15) (j+1, 0-7) (j+1, 8-15); a lane addresses one token
          const int token = (j + lane / 16) * 8 + lane % 8;
          store_transposed(staged + token * pitch + warp * 32 + lane / 8 % 2 * 16, v);
        }
      }
      warpgroup_sync(warpgroup);
      constexpr int columns = 64 / vector;
#pragma unroll 2
      for (int r = thread / columns; r < slab; r += 128 / columns) {
        const int column = thread % columns * vector;
        if (m0 + m1 + r < p.m)
          store_vector(p, m0 + m1 + r, row0 + i * 64 + column,
                       reinterpret_cast<const Out*>(staging + r * pitch) + column);
      }
      warpgroup_sync(warpgroup);
    }
  }
}

// split_k: every block leaves its sums in its shared memory, then finishes a share of the tokens.
[[maybe_unused]] constexpr int exchange_pitch = block_n + 4;  // words of a token

template <class T, int tiles>
__device__ __forceinline__ void leave_sums(T* exchange, int wg_row0, int lane, int warp,
                                           const T (&v)[tiles][values]) {
#pragma unroll
  for (int i = 0; i < tiles; ++i)
#pragma unroll
    for (int e = 0; e < values; ++e) {
      const int token = e / 4 * 8 + lane % 4 * 2 + e % 2;
      const int row = wg_row0 + i * 64 + warp * 16 + e / 2 % 2 * 8 + lane / 4;
      exchange[token * exchange_pitch + row] = v[i][e];
    }
}

// What this block finishes of the cluster's tile: four neighbouring rows of a token at a time. The
// vectors of the epilogue are read while the sums are still under way.
constexpr int share = (block_m + split_k - 1) / split_k, quads = block_n / 4;
constexpr int turns_of_share = (share * quads + consumers * 128 - 1) / (consumers * 128);

struct Share {
  float factor[turns_of_share], scale[4], bias[4];
  int row, token0;

  __device__ __forceinline__ Share(const Params& p, int rank, i64 m0, i64 n0, int thread) {
    static_assert(consumers * 128 % quads == 0, "a thread keeps its rows and steps over tokens");
    row = thread % quads * 4, token0 = rank * share + thread / quads;
    const float alpha = alpha_of(p) * sum_unit;
#pragma unroll
    for (int t = 0; t < turns_of_share; ++t)
      factor[t] = alpha * a_scale_of(p, min(m0 + token(t), p.m - 1));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const i64 n = min(n0 + row + e, p.n - 1);
      scale[e] = grouping == channel ? scale_of(p, n, 0) * code_unit : 1.f;
      bias[e] = bias_of(p, n);
    }
  }
  __device__ __forceinline__ int token(int t) const {
    return token0 + t * (consumers * 128 / quads);
  }

  template <class T>
  __device__ __forceinline__ void finish(const Params& p, const T* exchange, int rank, i64 m0,
                                         i64 n0) const {
#pragma unroll
    for (int t = 0; t < turns_of_share; ++t) {
      const i64 m = m0 + token(t), n = n0 + row;
      if (token(t) >= min(block_m, (rank + 1) * share) || m >= p.m || n >= p.n) continue;
      const u32 from = smem_address(exchange + token(t) * exchange_pitch + row);
      uint4 part[split_k];
#pragma unroll
      for (int r = 0; r < split_k; ++r) part[r] = load_remote(from, r);
      T v[4] = {0, 0, 0, 0};
#pragma unroll
      for (int r = 0; r < split_k; ++r)
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] += reinterpret_cast<const T*>(&part[r])[e];
      Out out[4];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        store_rounded(&out[e], scale[e] * value(v[e]) * factor[t] + bias[e]);
      Out* to = static_cast<Out*>(p.out) + m * p.n + n;
      if (p.n % 4 == 0) {
        if constexpr (sizeof(Out) == 2)
          *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(out);
        else
          *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(out);
      } else {
        for (int e = 0; e < 4 && n + e < p.n; ++e) to[e] = out[e];
      }
    }
  }
};

// stream_k: every block of a shared tile but the first leaves what it has summed, a thread's values
// `others` apart.
constexpr int others = team * 128;
__device__ __forceinline__ int thread_of_team() { return (threadIdx.x - 128) % others; }
__device__ __forceinline__ void team_sync(int wg) {
  if constexpr (in_turns)
    warpgroup_sync(wg + 1);
  else
    consumers_sync<others>();
}

template <class T, int tiles>
__device__ __forceinline__ void leave(const Params& p, int wg, const T (&v)[tiles][values]) {
  uint4* slot = reinterpret_cast<uint4*>(p.workspace) +
                i64(place()) * (tiles * values / 4 * others) + thread_of_team();
#pragma unroll
  for (int i = 0; i < tiles; ++i)
#pragma unroll
    for (int e = 0; e < values; e += 4)
      __stcg(slot + (i * values + e) / 4 * others, reinterpret_cast<const uint4&>(v[i][e]));
  __threadfence();
  team_sync(wg);
  if (thread_of_team() == 0) store_release(p.arrivals + place(), 1);
}

// Its first block adds them, in the order of k.
template <class T, int tiles>
__device__ __forceinline__ void add_others(const Params& p, const Shares& shares, int tile, int wg,
                                           T (&v)[tiles][values]) {
  const int end = (tile - shares.whole + 1) * shares.k_tiles;
#pragma unroll 1
  for (int block = place() + 1; shares.first_unit(block) < end; ++block) {
    if (shares.first_unit(block + 1) == shares.first_unit(block)) continue;
    if (thread_of_team() == 0) {
      while (!load_acquire(p.arrivals + block)) {}
      p.arrivals[block] = 0;  // for the next launch
    }
    team_sync(wg);
    const uint4* slot = reinterpret_cast<const uint4*>(p.workspace) +
                        i64(block) * (tiles * values / 4 * others) + thread_of_team();
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
      for (int e = 0; e < values; e += 4) {
        const uint4 part = __ldcg(slot + (i * values + e) / 4 * others);
        const T* t = reinterpret_cast<const T*>(&part);
#pragma unroll
        for (int k = 0; k < 4; ++k) v[i][e + k] += t[k];
      }
  }
}
