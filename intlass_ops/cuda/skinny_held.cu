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
#include "skinny_held.cuh"

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
  fill_lut4_pairs<threads>();
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
