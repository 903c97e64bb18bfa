// y[m, n] = alpha * a_scale[m] * sum_k (x[m, k] - a_zero[m]) * (q[n, k] - z[n, g]) * s[n, g] + bias[n]
//
// The portable GEMM: mma.sync with a cp.async ring, for every pair of operand kinds, every shape and
// every group size that is a multiple of 16. One block owns a tile of block_n rows of W by block_m
// tokens and, with split_k > 1, a stripe of K; the block that finishes a tile last adds the stripes
// in order, so results do not depend on timing.
//
// Sums inside a group are kept in the MMA's accumulator (int32, or fp32) and enter the fp32 total
// with the group's scale:   total += s * (acc - z * xsum),   a_zero through   s * (wsum - z * count).
#include "problem.cuh"

constexpr int block_m = Config::block_m, block_n = Config::block_n, block_k = Config::block_k;
constexpr int warps_m = Config::warps_m, warps_n = Config::warps_n;
constexpr int threads = 32 * warps_m * warps_n;
constexpr int tiles_m = block_m / warps_m / 8;   // 8-token MMA tiles of a warp
constexpr int tiles_n = block_n / warps_n / 16;  // 16-row MMA tiles of a warp
constexpr int num_stages = Config::num_stages;
static_assert(block_m % (8 * warps_m) == 0, "a warp owns whole 8-token tiles");
static_assert(block_n % (16 * warps_n) == 0, "a warp owns whole 16-row tiles");
static_assert(num_stages >= 2, "the ring needs a stage to fill while another is read");

using TileX = SmemTile<X, block_m, block_k>;
using TileW = SmemTile<W, block_n, block_k>;
constexpr int stage_bytes = TileX::bytes + TileW::bytes;

// fp32 values a thread owns of the block's tile: total[n tile][m tile][4], and row sums for a_zero
struct Totals {
  float y[tiles_n][tiles_m][4];
  float w[has_a_zero ? tiles_n : 1][2];
};

// The accumulators of the group being summed
struct Sums {
  Acc y[tiles_n][tiles_m][4];
  Acc x[has_zeros ? tiles_m : 1][4];   // ones @ X: per token
  Acc w[has_a_zero ? tiles_n : 1][4];  // W @ ones: per row
};

template <class T> __device__ __forceinline__ void clear(T& values) {
  u32* words = reinterpret_cast<u32*>(&values);
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 4); ++i) words[i] = 0;
}

struct GroupScales {
  float s[tiles_n][2], z[tiles_n][2];

  __device__ __forceinline__ void load(const Params& p, i64 row0, int lane, i64 group) {
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const i64 row = min(row0 + i * 16 + h * 8 + lane / 4, p.n - 1);
        s[i][h] = scale_of(p, row, group);
        if constexpr (has_zeros) z[i][h] = zero_of(p, row, group);
      }
  }
};

// total += s * (sums - z * xsum), and the same for the rows' own sums; `count` k entered the sums
__device__ __forceinline__ void flush(Totals& total, const Sums& sum, const GroupScales& g,
                                      int count) {
#pragma unroll
  for (int i = 0; i < tiles_n; ++i) {
#pragma unroll
    for (int j = 0; j < tiles_m; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float v = value(sum.y[i][j][e]);
        if constexpr (has_zeros) v -= g.z[i][e / 2] * value(sum.x[j][e % 2]);
        total.y[i][j][e] += g.s[i][e / 2] * v;
      }
    if constexpr (has_a_zero)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float v = value(sum.w[i][2 * h]) * (P::unit_w / P::unit);
        if constexpr (has_zeros) v -= g.z[i][h] * (float(count) / P::unit_x);
        total.w[i][h] += g.s[i][h] * v;
      }
  }
}

// Bytes past the end of K are zero, which is no zero for u4 (q - 8): make them code 8. `valid`
// counts the k of this lane's word that exist.
template <class Kind, int words>
__device__ __forceinline__ void blank_tail(u32 (&v)[words], i64 valid) {
  if constexpr (same<Kind, u4>::value)
    if (valid < 8) {
      const u32 keep = valid <= 0 ? 0u : (1u << (4 * valid)) - 1;
      v[0] = (v[0] & keep) | (0x88888888u & ~keep);
    }
}

struct Span {
  typename P::A w[tiles_n];
  typename P::B x[tiles_m];

  // `valid`: how many k lie between this lane's first and the end of K
  __device__ __forceinline__ void load(const char* smem_w, const char* smem_x, int warp_n,
                                       int warp_m, int lane, int s, i64 valid) {
#pragma unroll
    for (int i = 0; i < tiles_n; ++i) {
      u32 lo[TileW::words], hi[TileW::words];
      const int row = (warp_n * tiles_n + i) * 16 + lane / 4;
      TileW::load(lo, smem_w, row, s, lane % 4);
      TileW::load(hi, smem_w, row + 8, s, lane % 4);
      blank_tail<W>(lo, valid);
      blank_tail<W>(hi, valid);
      w[i] = P::w(lo, hi);
    }
#pragma unroll
    for (int j = 0; j < tiles_m; ++j) {
      u32 v[TileX::words];
      TileX::load(v, smem_x, (warp_m * tiles_m + j) * 8 + lane / 4, s, lane % 4);
      blank_tail<X>(v, valid);
      x[j] = P::x(v);
    }
  }

  // `keep`: whether this lane's eight k belong to the group being summed
  template <bool all> __device__ __forceinline__ void accumulate(Sums& sum, bool keep) const {
    if constexpr (has_zeros) {
      const typename P::A ones = all ? P::ones_w() : masked(P::ones_w(), keep);
#pragma unroll
      for (int j = 0; j < tiles_m; ++j) P::mma(sum.x[j], ones, x[j]);
    }
#pragma unroll
    for (int i = 0; i < tiles_n; ++i) {
      const typename P::A a = all ? w[i] : masked(w[i], keep);
#pragma unroll
      for (int j = 0; j < tiles_m; ++j) P::mma(sum.y[i][j], a, x[j]);
      if constexpr (has_a_zero) P::mma(sum.w[i], a, P::ones_x());
    }
  }
};

// Sum this block's stripe [k_begin, k_end) of K: into `sum` if there is one scale a row, else into
// `total`. k_begin is a multiple of block_k.
__device__ __forceinline__ void mainloop(const Params& p, char* smem, i64 n0, i64 m0, i64 k_begin,
                                         i64 k_end, Sums& sum, Totals& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_n = warp % warps_n, warp_m = warp / warps_n;
  const i64 row0 = n0 + warp_n * tiles_n * 16;
  const int num_tiles = int((k_end - k_begin + block_k - 1) / block_k);

  GroupScales scales;
  i64 group = grouping == channel ? 0 : k_begin / p.group_size;
  i64 group_end = grouping == channel ? p.k : (group + 1) * p.group_size;
  i64 group_begin = k_begin;  // first k of the group within this stripe
  if (grouping != channel) scales.load(p, row0, lane, group);
  auto close_group = [&](i64 end) {
    flush(total, sum, scales, int(end - group_begin));
    clear(sum);
    group_begin = group_end;
    group_end += p.group_size;
    group = min(group + 1, p.k / p.group_size - 1);
    scales.load(p, row0, lane, group);
  };

  TileFiller<TileW, threads, Config::aligned> fill_w(
      p.w, p.w_stride, n0, p.n, int(k_begin * W::bits / 8), int((k_end * W::bits + 7) / 8));
  TileFiller<TileX, threads, Config::aligned> fill_x(
      p.x, p.x_stride, m0, p.m, int(k_begin * X::bits / 8), int((k_end * X::bits + 7) / 8));
  auto fill_stage = [&](int tile) {
    if (tile < num_tiles) {
      char* stage = smem + tile % num_stages * stage_bytes;
      fill_w.fill_next(stage);
      fill_x.fill_next(stage + TileW::bytes);
    }
    cp_async_commit();  // an empty group past the end keeps the count of groups in flight
  };

#pragma unroll 1
  for (int s = 0; s < num_stages - 1; ++s) fill_stage(s);
  for (int tile = 0; tile < num_tiles; ++tile) {
    cp_async_wait<num_stages - 2>();
    __syncthreads();
    fill_stage(tile + num_stages - 1);

    const char *smem_w = smem + tile % num_stages * stage_bytes, *smem_x = smem_w + TileW::bytes;
#pragma unroll
    for (int s = 0; s < block_k / span_k; ++s) {
      const i64 k0 = k_begin + i64(tile) * block_k + s * span_k;
      const i64 mine = k0 + lane % 4 * 8;  // this lane's eight k, which lie in one group
      Span span;
      if constexpr (grouping == channel || grouping == tile_groups) {
        span.load(smem_w, smem_x, warp_n, warp_m, lane, s, k_end - mine);
        span.accumulate<true>(sum, true);
      } else if (k0 < k_end) {
        span.load(smem_w, smem_x, warp_n, warp_m, lane, s, k_end - mine);
        if constexpr (grouping == span_groups) {
          span.accumulate<true>(sum, true);
          if (k0 + span_k >= group_end) close_group(group_end);
        } else {
          span.accumulate<false>(sum, mine < group_end);
          while (group_end <= min(k0 + span_k, k_end)) {
            const i64 begin = group_end;
            close_group(group_end);
            if (begin < min(k0 + span_k, k_end))
              span.accumulate<false>(sum, mine >= begin && mine < group_end);
          }
        }
      }
    }
    if (grouping == tile_groups && k_begin + i64(tile + 1) * block_k >= group_end)
      close_group(group_end);
  }
  cp_async_wait<0>();
  if (grouping != channel && k_end > group_begin)
    flush(total, sum, scales, int(k_end - group_begin));
}

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

// Scale, shift, round once, and write the tile through shared memory in 16-byte rows.
__device__ __forceinline__ void epilogue(const Params& p, char* smem, i64 n0, i64 m0,
                                         const Totals& total) {
  constexpr int pitch = block_n + 16 / sizeof(Out);
  float* factor =
      reinterpret_cast<float*>(smem);  // alpha * a_scale, a_zero: per token; bias: per row
  float* a_zero = factor + block_m;
  float* bias = a_zero + block_m;
  Out* tile = reinterpret_cast<Out*>(bias + block_n);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_n = warp % warps_n, warp_m = warp / warps_n;

  const float alpha = alpha_of(p);
#pragma unroll 1
  for (int i = threadIdx.x; i < block_m; i += threads) {
    const i64 m = min(m0 + i, p.m - 1);
    factor[i] = alpha * a_scale_of(p, m);
    a_zero[i] = a_zero_of(p, m);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < block_n; i += threads)
    bias[i] = n0 + i < p.n ? bias_of(p, n0 + i) : 0.f;
  __syncthreads();

#pragma unroll
  for (int j = 0; j < tiles_m; ++j)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int row = (warp_m * tiles_m + j) * 8 + lane % 4 * 2 + c;
#pragma unroll
      for (int i = 0; i < tiles_n; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int column = (warp_n * tiles_n + i) * 16 + h * 8 + lane / 4;
          float v = total.y[i][j][2 * h + c];
          if constexpr (has_a_zero) v -= a_zero[row] * total.w[i][h];
          v *= factor[row];
          if (p.bias) v += bias[column];
          store_rounded(&tile[row * pitch + column], v);
        }
    }
  __syncthreads();

  Out* out = static_cast<Out*>(p.out);
  constexpr int vector = 16 / sizeof(Out);
  const bool whole = p.n % vector == 0;  // the output is freshly allocated, so its rows are aligned
  for (int i = threadIdx.x; i < block_m * (block_n / vector); i += threads) {
    const int row = i / (block_n / vector), column = i % (block_n / vector) * vector;
    if (m0 + row >= p.m) break;
    const Out* from = tile + row * pitch + column;
    Out* to = out + (m0 + row) * p.n + n0 + column;
    if (whole && n0 + column < p.n)
      *reinterpret_cast<int4*>(to) = *reinterpret_cast<const int4*>(from);
    else
      for (int v = 0; v < vector && n0 + column + v < p.n; ++v) to[v] = from[v];
  }
}

// One block an SM is enough for the compiler: it would rather spill than lose a second.
extern "C" __global__ void __launch_bounds__(threads, 1) gemm(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) char smem[];
  const i64 tiles_of_m = (p.m + block_m - 1) / block_m;
  const i64 tile = blockIdx.x, m0 = tile % tiles_of_m * block_m, n0 = tile / tiles_of_m * block_n;
  const i64 k_tiles = (p.k + block_k - 1) / block_k,
            per_stripe = (k_tiles + Config::split_k - 1) / Config::split_k;
  const i64 k_begin = min(i64(blockIdx.y) * per_stripe * block_k, p.k);
  const i64 k_end = min(k_begin + per_stripe * block_k, p.k);

  Sums sum;
  Totals total;
  clear(sum);
  clear(total);
  if (k_begin < k_end) mainloop(p, smem, n0, m0, k_begin, k_end, sum, total);
  if constexpr (Config::split_k > 1) {
    if constexpr (grouping == channel) {
      if (!add_stripes<Acc>(p, tile, sum)) return;
    } else {
      if (!add_stripes<float>(p, tile, total)) return;
    }
  }
  if (grouping == channel && p.k > 0) {  // an empty sum is zero, whatever the scale
    GroupScales scales;
    scales.load(p, n0 + threadIdx.x / 32 % warps_n * tiles_n * 16, threadIdx.x % 32, 0);
    flush(total, sum, scales, int(p.k));
  }
  __syncthreads();  // the ring's last readers are done with the memory the epilogue writes
  epilogue(p, smem, n0, m0, total);
}
