// The GEMM for few tokens (formula in gemm.cu) whose activations stay in registers: a warp owns a few
// chunks of K (skinny.cu), makes fragments of its X once, and walks down the rows of W with them.
//
//      row r:  | warp 0: warp_chunks chunks | warp 1 | ... | warp k_warps - 1 |   of one block,
//              | the same of the next block | ...               then of the others of its cluster
//
// Blocks stay on their SM and take 16 * tiles_n rows a turn, each of their groups of k_warps rows of
// its own. Every lane fills a ring of num_stages turns for itself with cp.async and reads back itself:
// no barrier, no register held. The totals of a group's warps meet in shared memory and are added in
// warp order, those of a cluster's blocks at the end, in the order of the blocks: a result does not
// depend on timing.
#include "hopper.cuh"
#include "skinny_fp4.cuh"

constexpr int warps = Config::warps, threads = 32 * warps;
constexpr int k_warps = Config::k_warps, groups = warps / k_warps;
constexpr int split = Config::split_k;  // blocks of a cluster, which share K
constexpr int num_stages = Config::num_stages;
constexpr int row_pieces = 2 * tiles_n;           // rows that a lane has words of
constexpr int pieces = row_pieces * warp_chunks;  // of 16 bytes, of a lane in a turn
// Whose scales a lane fetches: a quad's share them, but where each lane has a group of its own
constexpr int quad_pieces = own_group ? pieces : (pieces + 3) / 4;
constexpr int scales_ahead = num_stages > 2 && !(spread && tiles_m > 1) ? 2 : 1;
static_assert(warps % k_warps == 0 && groups < 16, "a group has a barrier of its own");
static_assert(32 % rows == 0, "a tile of rows lies in one tile of blocked scales");
static_assert(grouped || !zeros_in_sums, "one scale a row leaves sums of x to other kernels");

// X of 16 bits comes through stages where no W is under way yet, in whole lines.
constexpr int x_stages = Config::x_staged ? (tokens > 4 ? tokens / 4 : 1) : 0;
constexpr int early = num_stages - (x_stages > 1 ? x_stages : 1);  // turns of W asked for before
static_assert(early >= 0 && (x_stages == 0 || X::bits == 16), "X has stages of its own");

// FP4's of few turns is asked for before all of W's first turn is: what is asked for first comes first
constexpr bool shared_x = fp4_x && tokens < 4 && (may_be_fp16 || same<Scale, e4m3>::value);
constexpr bool asked_x = shared_x || may_be_fp16;
constexpr int early_chunks = may_be_fp16 ? warp_chunks / 2 : warp_chunks;  // of the last early turn

constexpr int at_once = spans_at_once<tiles_m>;

// How codes of W become fragments: of bf16's, those with large scales apart
enum Codes { as_fp16, as_bf16, as_wide };

// Shared memory: ring, the warps' sums of this turn and the one before, and this block's of all rows
constexpr int stage_bytes = pieces * 512, ring_bytes = warps * num_stages * stage_bytes;
constexpr int pitch = rows + 4, slab = tokens * pitch;  // of a token, of a warp
// Floats of a warp alone: its sums of x, by chunk, group and column, and scales that its lanes hand round
constexpr int x_groups = spans / group_spans;
constexpr int x_sums = zeros_in_sums ? warp_chunks * x_groups * tiles_m * 8 : 0;
constexpr int warp_floats = x_sums + pieces * left_floats;
static_assert(ring_bytes + (2 * slab + warp_floats) * warps * 4 == Config::fixed_smem,
              "config/skinny_held.py and the kernel disagree about shared memory");

struct TurnScales {
  Scale s[quad_pieces];
  Zero z[quad_pieces];
  LaneScales rows[scaled ? pieces : 1];

  __device__ __forceinline__ bool wide() const {
    bool found = false;
    if constexpr (scaled)
#pragma unroll
      for (int i = 0; i < pieces; ++i) found |= rows[i].wide();
    return found;
  }
  __device__ __forceinline__ bool fit_fp16() const {
    bool fit = true;
    if constexpr (may_be_fp16)
#pragma unroll
      for (int i = 0; i < pieces; ++i) fit &= fits_fp16(rows[i], least_of_w);
    return fit;
  }
};

// A lane's part of the rows: of the chunks that its warp owns
struct Share {
  const char* codes;
  const unsigned char* blocks;  // FP4: blocked scales of row lane / 4
  u32 ring;
  int lane, chunk, tiles;
  bool inside;  // else past the end of K: the last chunks again, times zeros

  __device__ __forceinline__ Share(const Params& p, int first_chunk, u32 ring)
      : ring(ring), lane(threadIdx.x % 32), tiles(int((p.n + rows - 1) / rows)) {
    const int chunks = int(p.k) / chunk_k;
    inside = first_chunk < chunks;
    chunk = inside ? first_chunk : chunks - warp_chunks;
    codes = p.w + lane % 4 * 16 + chunk * 64;
    blocks = lane_scales(p.scales, lane / 4, p.scale_row, lane % 4) + i64(chunk) * chunk_scales;
  }
  // Unsigned, which takes fewer instructions to multiply. A repeated one is never stored.
  __device__ __forceinline__ u64 row(const Params& p, int tile, int i) const {
    return u32(min(tile * rows + i * 8 + lane / 4, int(p.n) - 1));
  }
  __device__ __forceinline__ void request(const Params& p, int tile, int stage, int first = 0,
                                          int end = warp_chunks) const {
    if (tile < tiles)
#pragma unroll
      for (int i = 0; i < row_pieces; ++i) {
        const char* w = codes + row(p, tile, i) * p.w_stride;
#pragma unroll
        for (int c = first; c < end; ++c)
          cp_async_16(ring + stage * stage_bytes + (c * row_pieces + i) * 512, w + c * 64, false);
      }
    if (end == warp_chunks) cp_async_commit();
  }
  __device__ __forceinline__ void load(TurnScales& to, const Params& p, int tile) const {
    if (tile >= tiles) return;
    if constexpr (fp4_w) {
#pragma unroll
      for (int i = 0; i < row_pieces; ++i) {
        // Blocked scales come in whole tiles of 128 rows, of which one holds all of these
        const unsigned char* from =
            Config::blocked ? blocks + scale_at<true>(tile * rows, p.scale_row, 0) + i * 128
                            : lane_scales(p.scales, row(p, tile, i), p.scale_row, lane % 4) +
                                  i64(chunk) * chunk_scales;
#pragma unroll
        for (int c = 0; c < warp_chunks; ++c)
          to.rows[c * row_pieces + i] = load_scales_of<LaneScales>(from, c);
      }
    } else if constexpr (scaled) {
#pragma unroll
      for (int i = 0; i < row_pieces; ++i) {
        const ScaleRow from(p, row(p, tile, i), lane % 4);
#pragma unroll
        for (int c = 0; c < warp_chunks; ++c) to.rows[c * row_pieces + i] = from.load(p, chunk + c);
      }
    } else if constexpr (grouped || has_zeros) {
#pragma unroll
      for (int i = 0; i < quad_pieces; ++i) {
        const int piece = own_group ? i : (i * 4 + lane % 4) % pieces;
        const int within = own_group ? group_of_lane(lane % 4) : 0;
        const int of_k = grouped ? first_group(chunk + piece / row_pieces) + within : 0;
        const u64 n = row(p, tile, piece % row_pieces);
        if constexpr (grouped)
          to.s[i] = static_cast<const Scale*>(p.scales)[n * p.scale_row + of_k * p.scale_group];
        if constexpr (has_zeros)
          to.z[i] = static_cast<const Zero*>(p.zeros)[n * p.zero_row + of_k * p.zero_group];
      }
    }
  }
};

__device__ __forceinline__ void load_x(Fragments& x, const Params& p, const Share& share) {
  const int lane = threadIdx.x % 32, quarter = lane % 4;
#pragma unroll
  for (int j = 0; j < tiles_m; ++j) {
    const i64 token = min(i64(token_of_column(j, lane / 4)), p.m - 1);
    const char* from = p.x + token * p.x_stride;
#pragma unroll
    for (int c = 0; c < warp_chunks; ++c) {
      const int k0 = (share.chunk + c) * chunk_k + first_k(quarter);
      u32 v[spans][span_words<X>];
      if constexpr (X::bits == 4 && !spread)
        load_global(reinterpret_cast<u32(&)[spans]>(v), from + k0 / 2);
      else
#pragma unroll
        for (int t = 0; t < spans; ++t) load_global(v[t], from + (k0 + t * word_k) * X::bits / 8);
      SpanScales<Scale> blocks = {};
      if constexpr (fp4_x)
        blocks =
            load_scales_of(lane_scales(p.a_scale, token, p.a_scale_row, quarter), share.chunk + c);
#pragma unroll
      for (int t = 0; t < spans; ++t) {
#pragma unroll
        for (int i = 0; i < span_words<X>; ++i)
          if (!share.inside || (in_columns && !has_column(lane))) v[t][i] = 0;
        x[c][t][j] =
            token_fragment<P>(v[t], blocks.factor(t * SpanScales<Scale>::count / spans, true));
      }
    }
  }
}

// The same by way of shared memory: a lane's 64 bytes of a token, straight from L2, are half a line
__device__ __forceinline__ void load_x_staged(Fragments& x, const Params& p, const Share& share,
                                              char* staged) {
  const int lane = threadIdx.x % 32;
  auto at = [&](int c, int m,
                int i) {  // 16 bytes; the eight that are read at once are in all banks
    return staged +
           ((c * tokens + m) * 16 + (i ^ (spread ? (m & 1) << 2 : i >> 3 | (m & 1) << 1))) * 16;
  };
#pragma unroll
  for (int c = 0; c < warp_chunks; ++c)
#pragma unroll
    for (int m0 = 0; m0 < tokens; m0 += 2) {
      const int m = m0 + lane / 16;
      if (m >= tokens) continue;
      cp_async_16(smem_address(at(c, m, lane % 16)),
                  p.x + min(i64(m), p.m - 1) * p.x_stride + i64(share.chunk + c) * (chunk_k * 2) +
                      lane % 16 * 16,
                  !share.inside);
    }
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
#pragma unroll
  for (int c = 0; c < warp_chunks; ++c)
#pragma unroll
    for (int j = 0; j < tiles_m; ++j)
#pragma unroll
      for (int t = 0; t < spans; ++t) {
        u32 v[span_words<X>];
        load_shared(v, at(c, min(token_of_column(j, lane / 4), tokens - 1),
                          first_k(lane % 4) / 8 + t * (word_k / 8)));
        x[c][t][j] = token_fragment<P>(v, {});
        if constexpr (in_columns) x[c][t][j] = masked(x[c][t][j], has_column(lane));
      }
  __syncwarp();
}

// What a row's codes take as they become fragments: a scale, or what 0 is alone
template <Codes codes, class Row>
__device__ __forceinline__ Row row_of(const LaneScales& scales, int t, Row zero) {
  if constexpr (codes == as_fp16)
    return fp16_factor(scales, least_of_w);
  else if constexpr (scaled)
    return scales.factor(t * LaneScales::count / spans, codes == as_wide);
  else
    return zero;
}

// Sums of a warp's x for zero points: a row of ones for each group of a chunk
__device__ __forceinline__ void sum_x(float* sums, const Fragments& x) {
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < warp_chunks * tiles_m; ++i) {
    Acc sum[4] = {};
#pragma unroll
    for (int t = 0; t < spans; ++t)
      P::mma(sum, masked(P::ones_w(), row == t / group_spans), x[i / tiles_m][t][i % tiles_m]);
    const int at = (i / tiles_m * x_groups + row) * tiles_m + i % tiles_m;
    if (row < x_groups)
#pragma unroll
      for (int e = 0; e < 2; ++e) sums[at * 8 + column + e] = value(sum[e]);
  }
}

// One turn of a warp: total = its sums, scaled where groups are
template <Codes codes>
__device__ __forceinline__ void multiply(Sum (&total)[tiles_n][tiles_m][4], const char* words,
                                         const TurnScales& scales, const Fragments& x,
                                         const float* floats) {
  using Of = typename Select<codes == as_fp16, Fp16Codes, D>::type;
  const int lane = threadIdx.x % 32;
  Acc sum[tiles_n][tiles_m][4] = {};
#pragma unroll
  for (int c = 0; c < warp_chunks; ++c) {
    u32 w[row_pieces][4];
    typename Of::Row zero[row_pieces];
    [[maybe_unused]] float s[row_pieces], z[row_pieces];
    [[maybe_unused]] QuadScales<tiles_m> quad[row_pieces];
    if (spread && tiles_m > 1 && c > 0) __syncwarp();
#pragma unroll
    for (int t = 0; t < spans; ++t) {
      const int group = t / group_spans;
#pragma unroll
      for (int i = 0; i < row_pieces; ++i) {
        if (t % at_once == 0) load_piece<at_once>(w, words + c * row_pieces * 512, i, t);
        if (t % group_spans == 0) {
          const int piece = c * row_pieces + i, at = own_group ? piece : piece / 4;
          if constexpr (spread) {
            quad[i].load(floats + x_sums + piece * left_floats, t, lane);
            s[i] = quad[i].s[t], z[i] = quad[i].z[t];
          } else {
            if constexpr (grouped) s[i] = from_quad(scale_in_units(scales.s[at]), piece, lane);
            if constexpr (has_zeros && !scaled)
              z[i] = from_quad(zero_of_codes(scales.z[at]), piece, lane);
          }
          zero[i] = row_zero<Of>(z[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < tiles_n; ++i) {
        const int at = scaled ? c * row_pieces + 2 * i : 0;
        u32 lo[span_words<W>], hi[span_words<W>];
#pragma unroll
        for (int v = 0; v < span_words<W>; ++v) {
          lo[v] = w[2 * i][t * span_words<W> + v];
          hi[v] = w[2 * i + 1][t * span_words<W> + v];
        }
        const typename Of::A a = Of::w(lo, row_of<codes>(scales.rows[at], t, zero[2 * i]), hi,
                                       row_of<codes>(scales.rows[at + scaled], t, zero[2 * i + 1]));
#pragma unroll
        for (int j = 0; j < tiles_m; ++j)
          Of::mma(sum[i][j], a, reinterpret_cast<const typename Of::B&>(x[c][t][j]));
      }
      if (grouped && t % group_spans == group_spans - 1)
#pragma unroll
        for (int j = 0; j < tiles_m; ++j) {
          [[maybe_unused]] u32 of_x[2];
          if constexpr (zeros_in_sums)
            load_shared(of_x,
                        reinterpret_cast<const char*>(
                            floats + ((c * x_groups + group) * tiles_m + j) * 8 + lane % 4 * 2));
#pragma unroll
          for (int i = 0; i < tiles_n; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float v = value(sum[i][j][e]);
              if constexpr (zeros_in_sums) v -= z[2 * i + e / 2] * __uint_as_float(of_x[e % 2]);
              total[i][j][e] += s[2 * i + e / 2] * v;
              sum[i][j][e] = 0;
            }
        }
    }
  }
  if constexpr (!grouped)
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int j = 0; j < tiles_m; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) total[i][j][e] = sum[i][j][e];
}

// What a block of the cluster has in the same place of its shared memory
__device__ __forceinline__ Sum left_by(int block, const Sum* here) {
  u32 v;
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.u32 %0, [remote];\n}"
      : "=r"(v)
      : "r"(smem_address(here)), "r"(block)
      : "memory");
  return *reinterpret_cast<const Sum*>(&v);
}

__device__ __forceinline__ void group_sync(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(32 * k_warps) : "memory");
}

#if __CUDA_ARCH__ >= 900
#define CLUSTERS __cluster_dims__(split, 1, 1)
#else
#define CLUSTERS
#endif

extern "C" __global__ void CLUSTERS __launch_bounds__(threads, Config::blocks_per_sm)
    skinny_held(const __grid_constant__ Params p) {
  launch_dependents();
  extern __shared__ __align__(128) char smem[];
  // A shuffle, so that the compiler knows it for the same in all lanes: what is reckoned from it takes
  // uniform registers, and no branch of the loop can part the lanes
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0);
  const int group = groups > 1 ? warp / k_warps : 0, k_warp = warp - group * k_warps;
  const int rank = split > 1 ? cluster_rank() : 0;
  const int block_tile = int(blockIdx.x) / split * groups, step = int(gridDim.x) / split * groups;
  const int first_tile = block_tile + group;
  char* ring = smem + warp * num_stages * stage_bytes;
  Sum* partial = reinterpret_cast<Sum*>(smem + ring_bytes);
  float* floats = reinterpret_cast<float*>(partial + 2 * warps * slab) + warp * warp_floats;
  Sum* kept = partial +
              warps * (2 * slab + warp_floats);  // [turns][groups][tokens][rows] of this share of K
  const Share share(p, (rank * k_warps + k_warp) * warp_chunks,
                    smem_address(ring) + own_place(lane) * 16);

#pragma unroll
  for (int s = 0; s < early; ++s)
    share.request(p, first_tile + s * step, s, 0, s < early - 1 ? warp_chunks : early_chunks);
  wait_for_predecessors();
  TurnScales scales[scales_ahead];  // of the turns to come, the next one first
#pragma unroll
  for (int s = 0; s < scales_ahead; ++s) share.load(scales[s], p, first_tile + s * step);
  Fragments x;
  if constexpr (x_stages > 0) load_x_staged(x, p, share, ring + early * stage_bytes);
  [[maybe_unused]] bool fp16_x = false;
  auto request_rest = [&] {
    if constexpr (early_chunks < warp_chunks)
      share.request(p, first_tile + (early - 1) * step, early - 1, early_chunks);
#pragma unroll
    for (int s = early; s < num_stages - 1; ++s) share.request(p, first_tile + s * step, s);
  };
  if constexpr (asked_x) {
    typename Select<shared_x, SharedFp4, OwnFp4>::type words(p, share);
    request_rest();
    fp16_x = make_fragments(x, words, share.inside, ring + early * stage_bytes);
  } else {
    request_rest();
    if constexpr (x_stages == 0) load_x(x, p, share);
  }
  if constexpr (zeros_in_sums) {
    sum_x(floats, x);
    __syncwarp();
  }
  const float alpha = alpha_of(p) * sum_unit;

  int stage = 0, turn = 0;
#pragma unroll 1
  for (int tile = first_tile; tile < share.tiles; tile += step, ++turn) {
    cp_async_wait<num_stages - 2>();
    const TurnScales mine = scales[0];
    if constexpr (spread) {
#pragma unroll
      for (int i = 0; i < pieces; ++i)
        leave_scales<D>(floats + x_sums + i * left_floats, mine.s[i], mine.z[i], lane);
      __syncwarp();
    }
#pragma unroll
    for (int s = 0; s < scales_ahead - 1; ++s) scales[s] = scales[s + 1];
    share.load(scales[scales_ahead - 1], p, tile + scales_ahead * step);
    // into the stage that the turn before this one has left
    share.request(p, tile + (num_stages - 1) * step, stage == 0 ? num_stages - 1 : stage - 1);
    if (rank == 0)
      prefetch_residual<tokens, rows, 32 * k_warps>(p, 0, i64(tile) * rows, k_warp * 32 + lane);

    Sum total[tiles_n][tiles_m][4] = {};
    const char* words = ring + stage * stage_bytes + read_place<at_once>(lane) * 16;
    if constexpr (may_be_fp16)
      if (fp16_x && __any_sync(~0u, !mine.fit_fp16())) {
        widen(x);
        fp16_x = false;
      }
    if (fp16_x)
      multiply<may_be_fp16 ? as_fp16 : as_bf16>(total, words, mine, x, floats);
    else if (any_wide(mine.wide()))
      multiply<as_wide>(total, words, mine, x, floats);
    else
      multiply<as_bf16>(total, words, mine, x, floats);
    stage = stage == num_stages - 1 ? 0 : stage + 1;

    Sum* sums = partial + (turn % 2 * groups + group) * k_warps * slab;
    add_columns<tokens>(total);
    Sum* own = sums + k_warp * slab + token_of_column(0, lane % 4 * 2) * pitch + lane / 4;
#pragma unroll
    for (int j = 0; j < tiles_m; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (tokens % 8 && token_of_column(j, lane % 4 * 2) + e % 2 >= tokens) continue;
        if (in_columns && lane % 4 * 2 >= column_tokens) continue;
#pragma unroll
        for (int i = 0; i < tiles_n; ++i)
          own[(j * column_tokens + e % 2) * pitch + i * 16 + e / 2 * 8] = total[i][j][e];
      }
    group_sync(group);
#pragma unroll 1
    for (u32 i = k_warp * 32 + lane; i < u32(p.m) * rows; i += 32 * k_warps) {
      const int m = i / rows, r = i % rows, n = tile * rows + r;
      Sum y = 0;
#pragma unroll
      for (int v = 0; v < k_warps; ++v) y += sums[v * slab + m * pitch + r];
      if constexpr (split > 1)
        kept[((turn * groups + group) * tokens + m) * rows + r] = y;
      else if (n < int(p.n))
        finish(p, n, m, y, Acc(0), alpha * a_scale_of(p, m));
    }
  }

  if constexpr (split > 1) {  // each block finishes a part of the rows of all
    cluster_sync();
    const int turns = (share.tiles - block_tile + step - 1) / step;
#pragma unroll 1
    for (int i = rank * threads + int(threadIdx.x); i < turns * groups * tokens * rows;
         i += split * threads) {
      const int r = i % rows, m = i / rows % tokens, at = i / (tokens * rows);
      const int tile = block_tile + at % groups + at / groups * step;
      const i64 n = i64(tile) * rows + r;
      if (m >= p.m || n >= p.n) continue;
      Sum y = 0;
#pragma unroll
      for (int b = 0; b < split; ++b) y += left_by(b, kept + i);
      finish(p, n, m, y, Acc(0), alpha * a_scale_of(p, m));
    }
    cluster_meet();  // others may still read this block's sums
  }
}
