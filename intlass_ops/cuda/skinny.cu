// The GEMM for few tokens (formula in gemm.cu), bound by reading W once: no shared memory and no ring
// for the weights, every lane loads its 16-byte pieces of W straight into registers, many at a time.
//
// A block owns 16 * tiles_n rows of W and all tokens; its warps share out K in chunks of 64 bytes of
// a row, of which each lane of a quad holds 16 (32 k of INT4, 16 k of INT8):
//
//      row r:   | warp 0, `unroll` chunks | warp 1 | ... | warp 0 | ...    chunks, 64 bytes each
//     a chunk:  | lane%4 = 0 | lane%4 = 1 | lane%4 = 2 | lane%4 = 3 |   16 bytes each
//
// The lane's word of eight k number s of each chunk is what Pair calls a span, so the same fragments
// serve as in gemm.cu; only which k they hold differs. The warps' totals meet in shared memory
// and are added in warp order, so a result depends neither on timing nor on M.
#include "experts.cuh"

// with the warps' totals and the spread scales, which lanes hand on, 48 KB in all
constexpr int lut4_spread = Config::groups_per_chunk > 1 ? 1280 : 0;
constexpr bool lut4_in_shared =
    Config::warps * Config::tiles_n * (512 * Config::tiles_m + lut4_spread) <= 16384;
#include "lut4_pairs.cuh"
#include "skinny.cuh"

constexpr int warps = Config::warps, threads = 32 * warps;
constexpr int tiles_m = Config::tiles_m, tokens = column_tokens * tiles_m;
constexpr int unroll = Config::unroll;  // chunks a warp has in flight

// `inside` is known to hold where the warps' shares of K have no tail (Config::whole)
__device__ __forceinline__ void load_weights(u32 (&v)[4], const char* from, bool inside) {
  if constexpr (!Config::whole) v[0] = v[1] = v[2] = v[3] = 0;
  if (Config::whole || inside)
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "l"(from));
}

template <int words>
__device__ __forceinline__ void load_tokens(u32 (&v)[words], const char* from, bool inside) {
  if constexpr (!Config::whole || in_columns) {
#pragma unroll
    for (int i = 0; i < words; ++i) v[i] = 0;
    if (!inside) return;
  }
  // not `nc`: another kernel may have been writing them when this one started
  if constexpr (words == 4)
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "l"(from));
  else if constexpr (words == 2)
    asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "l"(from));
  else
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v[0]) : "l"(from));
}

struct Sums {
  Acc y[tiles_n][tiles_m][4], x[tiles_m][4];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < tiles_m; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        x[j][e] = 0;
#pragma unroll
        for (int i = 0; i < tiles_n; ++i) y[i][j][e] = 0;
      }
  }
};

typedef float Totals[tiles_n][tiles_m][4];

// What a lane needs of one chunk, all of it in flight before any of it is used.
struct Chunk {
  u32 w[tiles_n][2][4];
  u32 x[tiles_m][spans][span_words<X>];
  Scale s[tiles_n][2];
  Zero z[tiles_n][2];
  LaneScales row[tiles_n][2];
  SpanScales<Scale> x_blocks[tiles_m];

  __device__ __forceinline__ bool wide() const {
    bool found = false;
    if constexpr (scaled)
#pragma unroll
      for (int i = 0; i < 2 * tiles_n; ++i) found |= row[i / 2][i % 2].wide();
    if constexpr (fp4_x)
#pragma unroll
      for (int j = 0; j < tiles_m; ++j) found |= x_blocks[j].wide();
    return found;
  }
};

extern "C" __global__ void __launch_bounds__(threads, Config::blocks_per_sm)
    skinny(const __grid_constant__ Params all) {
  launch_dependents();
  const OfBlock<of_experts, Params> own{all};
  const Params& p = own.p;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quarter = lane % 4;
  const i64 n0 = i64(tile_of_block(all)) * rows;
  if (own.is_done<rows, threads>(n0)) return;
  const int k = int(p.k), chunks = (k + chunk_k - 1) / chunk_k;
  const int groups = grouping == channel ? 1 : k / int(p.group_size);

  const char* w_row[tiles_n][2];
  const Scale* s_row[tiles_n][2];
  const Zero* z_row[tiles_n][2];
  ScaleRow scale_row[tiles_n][2];
  const unsigned char* x_blocks_row[tiles_m];
#pragma unroll
  for (int i = 0; i < tiles_n; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const i64 row =
          min(n0 + i * 16 + h * 8 + lane / 4, p.n - 1);  // a repeated row is never stored
      w_row[i][h] = p.w + row * p.w_stride + quarter * 16;
      s_row[i][h] = static_cast<const Scale*>(p.scales) + row * p.scale_row;
      z_row[i][h] = static_cast<const Zero*>(p.zeros) + row * p.zero_row;
      scale_row[i][h] = ScaleRow(p, row, quarter);
    }
  const char* x_row[tiles_m];
#pragma unroll
  for (int j = 0; j < tiles_m; ++j) {  // nor is a repeated token
    const i64 token = min(i64(token_of_column(j, lane / 4)), p.m - 1);
    x_row[j] = p.x + token * p.x_stride + first_k(quarter) * X::bits / 8;
    x_blocks_row[j] = lane_scales(p.a_scale, token, p.a_scale_row, quarter);
  }
  const int scale_group = int(p.scale_group), zero_group = int(p.zero_group);

  auto load_scales = [&](Scale(&s)[tiles_n][2], Zero(&z)[tiles_n][2], int group) {
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        s[i][h] = s_row[i][h][group * scale_group];
        if constexpr (has_zeros) z[i][h] = z_row[i][h][group * zero_group];
      }
  };
  auto group_of = [&](int chunk) {
    const int group = first_group(chunk) + (own_group ? group_of_lane(quarter) : 0);
    return Config::whole ? group : min(group, groups - 1);
  };
  auto load_codes = [&](Chunk& c, int chunk) {
    const bool inside = chunk * chunk_k + quarter * lane_k < k;
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) load_weights(c.w[i][h], w_row[i][h] + chunk * 64, inside);
  };
  auto load_rest = [&](Chunk& c, int chunk) {
    const bool inside = Config::whole || chunk * chunk_k + quarter * lane_k < k;
#pragma unroll
    for (int j = 0; j < tiles_m; ++j) {
      if constexpr (X::bits == 4 && !spread) {
        u32 v[spans];
        load_tokens(v, x_row[j] + chunk * (chunk_k / 2),
                    inside && (!in_columns || has_column(lane)));
#pragma unroll
        for (int t = 0; t < spans; ++t) c.x[j][t][0] = v[t];
      } else {
#pragma unroll
        for (int t = 0; t < spans; ++t) {
          const int k0 = chunk * chunk_k + t * word_k;  // of the quad
          load_tokens(c.x[j][t], x_row[j] + k0 * X::bits / 8,
                      (spread ? k0 < k : inside) && (!in_columns || has_column(lane)));
        }
      }
      if constexpr (fp4_x)
        c.x_blocks[j] =
            Config::whole || inside ? load_scales_of(x_blocks_row[j], chunk) : SpanScales<Scale>{};
    }
    if constexpr (scaled)
#pragma unroll
      for (int i = 0; i < tiles_n; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          c.row[i][h] = Config::whole || inside ? scale_row[i][h].load(p, chunk) : LaneScales{};
    if constexpr (grouped) load_scales(c.s, c.z, group_of(chunk));
  };

  typename D::Row channel_zero[tiles_n][2] = {};  // with one zero point a row
  auto row_of = [&](const Chunk& c, bool wide, float z, int t, int i, int h) {
    if constexpr (scaled)
      return c.row[i][h].factor(t * LaneScales::count / spans, wide);
    else if constexpr (zeros_in_codes && grouping == channel)
      return channel_zero[i][h];
    else
      return row_zero<D>(z);
  };

  constexpr int piece_bytes = spread ? 512 + 4 * left_floats : 1;  // of eight rows of a chunk
  __shared__ __align__(16) char handed[spread ? warps : 1][2 * tiles_n][piece_bytes];
  Totals total = {};
  Sums sum;
  sum.clear();
  auto use_chunk = [&](const Chunk& c, bool wide) {
    u32 w[2 * tiles_n][4];
    [[maybe_unused]] QuadScales<1> quad[2 * tiles_n];
    if constexpr (spread) __syncwarp();  // all have read the chunk before
#pragma unroll
    for (int i = 0; i < 2 * tiles_n; ++i) {
      const u32(&v)[4] = c.w[i / 2][i % 2];
      if constexpr (spread) {
        char* to = handed[warp][i];
        *reinterpret_cast<uint4*>(to + own_place(lane) * 16) = make_uint4(v[0], v[1], v[2], v[3]);
        leave_scales<D>(reinterpret_cast<float*>(to + 512), c.s[i / 2][i % 2], c.z[i / 2][i % 2],
                        lane);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) w[i][j] = v[j];
      }
    }
    if constexpr (spread) {
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 2 * tiles_n; ++i) {
        load_matrices<4>(w[i], smem_address(handed[warp][i] + read_place<4>(lane) * 16));
        quad[i].load(reinterpret_cast<const float*>(handed[warp][i] + 512), 0, lane);
      }
    }
    auto scale_of = [&](int t, int i) {
      return spread ? quad[i].s[t] : scale_in_units(c.s[i / 2][i % 2]);
    };
    auto zero_of = [&](int t, int i) {
      return spread ? quad[i].z[t] : zero_of_codes(c.z[i / 2][i % 2]);
    };
#pragma unroll
    for (int t = 0; t < spans; ++t) {
      typename P::B b[tiles_m];
#pragma unroll
      for (int j = 0; j < tiles_m; ++j)
        b[j] = token_fragment<P>(c.x[j][t],
                                 c.x_blocks[j].factor(t * SpanScales<Scale>::count / spans, wide));
      if constexpr (zeros_in_sums)
#pragma unroll
        for (int j = 0; j < tiles_m; ++j) P::mma(sum.x[j], P::ones_w(), b[j]);
#pragma unroll
      for (int i = 0; i < tiles_n; ++i) {
        u32 lo[span_words<W>], hi[span_words<W>];
#pragma unroll
        for (int v = 0; v < span_words<W>; ++v) {
          lo[v] = w[2 * i][t * span_words<W> + v];
          hi[v] = w[2 * i + 1][t * span_words<W> + v];
        }
        const typename P::A a = D::w(lo, row_of(c, wide, zero_of(t, 2 * i), t, i, 0), hi,
                                     row_of(c, wide, zero_of(t, 2 * i + 1), t, i, 1));
#pragma unroll
        for (int j = 0; j < tiles_m; ++j) P::mma(sum.y[i][j], a, b[j]);
      }
      if (grouped && t % group_spans == group_spans - 1) {
#pragma unroll
        for (int i = 0; i < 2 * tiles_n; ++i) {
          const float scale = scale_of(t, i);
#pragma unroll
          for (int j = 0; j < tiles_m; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float v = value(sum.y[i / 2][j][i % 2 * 2 + e]);
              if constexpr (zeros_in_sums) v -= zero_of(t, i) * value(sum.x[j][e]);
              total[i / 2][j][i % 2 * 2 + e] += scale * v;
            }
        }
        sum.clear();
      }
    }
  };

  Chunk c[unroll];
  auto load_all_codes = [&](int chunk0) {
#pragma unroll
    for (int u = 0; u < unroll; ++u) load_codes(c[u], chunk0 + u);  // past the end: zeros
  };
  load_all_codes(warp * unroll);
  if constexpr (grouped)  // on their way, for what comes after the wait
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        prefetch_l2(s_row[i][h] + group_of(min(warp * unroll, chunks - 1)) * scale_group);
  if constexpr (scaled)
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) scale_row[i][h].prefetch(p, min(warp * unroll, chunks - 1));
  fill_lut4_pairs<threads>();
  wait_for_predecessors();
  prefetch_residual<tokens, rows, threads>(p, 0, n0, threadIdx.x);
  if constexpr (zeros_in_codes && grouping == channel)
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) channel_zero[i][h] = D::zero(as_float(*z_row[i][h]));
  for (int chunk0 = warp * unroll; chunk0 < chunks; chunk0 += warps * unroll) {
    if (chunk0 != warp * unroll) load_all_codes(chunk0);
#pragma unroll
    for (int u = 0; u < unroll; ++u) load_rest(c[u], chunk0 + u);
    bool wide = false;
#pragma unroll
    for (int u = 0; u < unroll; ++u) wide |= c[u].wide();
    if (any_wide(wide)) {
#pragma unroll
      for (int u = 0; u < unroll; ++u) use_chunk(c[u], true);
    } else {
#pragma unroll
      for (int u = 0; u < unroll; ++u) use_chunk(c[u], false);
    }
  }
  add_columns<tokens>(total);
  __shared__ Sum partial[warps][tokens][rows];
  __shared__ Acc partial_x[!grouped && zeros_in_sums ? warps : 1][tokens];
#pragma unroll
  for (int j = 0; j < tiles_m; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int m = token_of_column(j, quarter * 2 + e % 2);
      if (in_columns && quarter * 2 >= column_tokens)
        continue;  // another group's lane has the same
#pragma unroll
      for (int i = 0; i < tiles_n; ++i)
        partial[warp][m][i * 16 + e / 2 * 8 + lane / 4] =
            Select<grouped, float, Acc>::of(total[i][j][e], sum.y[i][j][e]);
      if constexpr (!grouped && zeros_in_sums) partial_x[warp][m] = sum.x[j][e];
    }
  __syncthreads();
  const float alpha = alpha_of(p) * sum_unit;
#pragma unroll 1
  for (int i = threadIdx.x; i < int(p.m) * rows; i += threads) {
    const int m = i / rows, r = i % rows;
    const i64 n = n0 + r;
    if (n >= p.n) continue;
    Sum y = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) y += partial[w][m][r];
    Acc x = 0;
    if constexpr (!grouped && zeros_in_sums)
#pragma unroll
      for (int w = 0; w < warps; ++w) x += partial_x[w][m];
    finish(p, n, m, y, x, alpha * a_scale_of(p, m));
  }
}
