// The GEMM for few tokens (formula in gemm.cu) and many rows: skinny.cu's fragments, with W coming
// through shared memory. As many blocks as the GPU holds stay there and take tile after tile of
// 16 * tiles_n rows, each tile the work of one of the block's groups of warps, whose warps share out
// the chunks of K (skinny.cu) in turn:
//
//      row r:   | warp 0 | warp 1 | ... | warp 0 | warp 1 | ...    chunks, 64 bytes each
//
// Every lane fills a ring of num_stages chunks for itself with cp.async and reads back itself: no
// barrier, no register held, and the loads run on across tiles and barriers. X lies in shared memory
// as ready fragments for all groups, one segment of K after another where it is too large. The totals
// of a group's warps meet in shared memory and are added in warp order, so a result does not depend
// on timing.
#include "skinny_ring.cuh"

extern "C" __global__ void __launch_bounds__(threads, Config::blocks_per_sm)
    skinny_ring(const __grid_constant__ Params p) {
  launch_dependents();
  extern __shared__ __align__(128) char smem[];
  // a shuffle: the same in all lanes, as in skinny_held.cu
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0);
  const int group = groups > 1 ? warp / group_warps : 0, quarter = lane % 4;
  const int k = int(p.k), chunks = (k + chunk_k - 1) / chunk_k;
  const int segments = max(1, (chunks + segment_chunks - 1) / segment_chunks);
  const int tiles = int((p.n + rows - 1) / rows);
  const int first_tile = int(blockIdx.x) * groups + group, step = int(gridDim.x) * groups;
  const int scale_group = int(p.scale_group), zero_group = int(p.zero_group);
  char* ring = smem + warp * num_stages * stage_bytes + own_place(lane) * 16;
  const char* words = ring + (read_place<at_once>(lane) - own_place(lane)) * 16;
  typename P::B* x_frags = reinterpret_cast<typename P::B*>(smem + ring_bytes);
  Sum* partial = reinterpret_cast<Sum*>(smem + ring_bytes + x_bytes);
  // [turns][groups][tokens][pitch]: sums of earlier segments, where there are several
  float* scales_left = reinterpret_cast<float*>(partial + buffers * warps * slab) + warp * left;
  Sum* kept = partial + warps * (buffers * slab + left);

  Cursor ahead;
  ahead.segment = 0, ahead.tile = first_tile, ahead.chunk = warp % group_warps;
  ahead.end = first_tile < tiles ? min(segment_chunks, chunks) : 0;
  ahead.enter_tile(p, lane);

  // Ask for the next chunk of this warp, wherever it lies; an empty group once there is none. Codes
  // or scales alone: the start of the kernel asks for the codes of several chunks first.
  enum Part { codes, scales_alone, both };
  auto request = [&](int stage, Part part) {
    Scales result;
    while (ahead.chunk >= ahead.end && ahead.segment < segments) {
      ahead.tile += step;
      if (ahead.tile >= tiles) {
        ahead.tile = first_tile;
        ++ahead.segment;
        ahead.end = min((ahead.segment + 1) * segment_chunks, chunks);
        if (first_tile >= tiles) ahead.segment = segments;
      }
      ahead.chunk = ahead.segment * segment_chunks + warp % group_warps;
      ahead.enter_tile(p, lane);
    }
    if (ahead.segment < segments) {
      const u32 to = smem_address(ring + stage * stage_bytes);
      const bool inside = Config::whole || ahead.chunk * chunk_k + quarter * lane_k < k;
      if (part != scales_alone)
#pragma unroll
        for (int i = 0; i < pieces; ++i)
          cp_async_16(to + i * 512, inside ? ahead.w_row[i] + ahead.chunk * 64 : p.w, !inside);
      if (grouped && part == codes && (inside || !own_group))
#pragma unroll
        for (int i = 0; i < quad_rows; ++i)
          prefetch_l2(ahead.s_row[i] + first_group(ahead.chunk) * scale_group);
      if (part == codes) ahead.prefetch_taken(p, ahead.chunk);
      if (part != codes && inside) ahead.load_taken(result, p, ahead.chunk);
      if (grouped && part != codes) {
        const int group = first_group(ahead.chunk);
#pragma unroll
        for (int i = 0; i < quad_rows; ++i) {
          if (own_group && !inside) {  // no such group
            result.s[i] = Scale(), result.z[i] = Zero();
            continue;
          }
          result.s[i] = ahead.s_row[i][group * scale_group];
          if constexpr (has_zeros) result.z[i] = ahead.z_row[i][group * zero_group];
        }
      }
      ahead.chunk += group_warps;
    }
    if (part != scales_alone) cp_async_commit();
    return result;
  };

  Scales scales[num_stages - 1];  // of the chunks under way, the oldest first
  const Cursor first = ahead;
#pragma unroll
  for (int s = 0; s < num_stages - 1; ++s) request(s, codes);
  fill_lut4_pairs<threads>();
  wait_for_predecessors();
  XBlock x_block[x_ahead];
#pragma unroll
  for (int i = 0; i < x_ahead; ++i) x_block[i].load(p, (i * threads + int(threadIdx.x)) * 8);
  if (scaled || grouped) {
    ahead = first;
#pragma unroll
    for (int s = 0; s < num_stages - 1; ++s) scales[s] = request(s, scales_alone);
  }

  int token[tiles_m];
#pragma unroll
  for (int j = 0; j < tiles_m; ++j) token[j] = min(token_of_column(j, lane / 4), tokens - 1);
  const float alpha = alpha_of(p) * sum_unit;

  if constexpr (in_columns)
    for (int i = threadIdx.x; i < chunk_frags; i += threads)
      x_frags[segment_chunks * chunk_frags + i] = {};
  int stage = 0, buffer = 0;
  for (int segment = 0; segment < segments; ++segment) {
    const int chunk0 = segment * segment_chunks, end = min(chunk0 + segment_chunks, chunks);
    if (segment) __syncthreads();
#pragma unroll 1
    for (int b = threadIdx.x; b < (end - chunk0) * (chunk_k / 8); b += x_ahead * threads) {
      if (segment || b >= x_ahead * threads)
#pragma unroll
        for (int i = 0; i < x_ahead; ++i)
          x_block[i].load(p, (chunk0 * (chunk_k / 8) + b + i * threads) * 8);
#pragma unroll
      for (int i = 0; i < x_ahead; ++i)
        if (b + i * threads < (end - chunk0) * (chunk_k / 8))
          x_block[i].store(x_frags, b + i * threads);
    }
    __syncthreads();

    int turn = 0;
    for (int tile = first_tile; tile < tiles; tile += step, ++turn) {
      prefetch_residual<tokens, rows, 32 * group_warps>(p, 0, i64(tile) * rows,
                                                        threadIdx.x % (32 * group_warps));
      typename D::Row code_zero[pieces];  // what a code of each of the lane's rows loses
#pragma unroll
      for (int i = 0; i < pieces; ++i) {
        const i64 row = min(i64(tile) * rows + i * 8 + lane / 4, p.n - 1);
        code_zero[i] = D::zero(zeros_in_codes && grouping == channel
                                   ? as_float(static_cast<const Zero*>(p.zeros)[row * p.zero_row])
                                   : 8.f);
      }
      float total[tiles_n][tiles_m][4] = {};
      Acc sum[tiles_n][tiles_m][4] = {}, sum_x[tiles_m][4] = {};
      for (int chunk = chunk0 + warp % group_warps; chunk < end; chunk += group_warps) {
        cp_async_wait<num_stages - 2>();
        u32 w[pieces][4];
        const char* of_stage = words + stage * stage_bytes;
        auto load_rows = [&](int t) {
#pragma unroll
          for (int i = 0; i < pieces; ++i) load_piece<at_once>(w, of_stage, i, t);
        };
        if constexpr (!spread) load_rows(0);
        const Scales mine = scales[0];
        if constexpr (spread) {
          __syncwarp();  // all have read what was left before
#pragma unroll
          for (int i = 0; i < pieces; ++i)
            leave_scales<D>(scales_left + i * left_floats, mine.s[i], mine.z[i], lane);
          __syncwarp();
          load_rows(0);
        }
#pragma unroll
        for (int s = 0; s < num_stages - 2; ++s) scales[s] = scales[s + 1];
        // into the stage that the chunk before this one has left
        scales[num_stages - 2] = request(stage == 0 ? num_stages - 1 : stage - 1, both);
        stage = stage == num_stages - 1 ? 0 : stage + 1;

        const int x_at = in_columns && !has_column(lane) ? segment_chunks : chunk - chunk0;
        const typename P::B* x_chunk = x_frags + x_at * chunk_frags + quarter;
        [[maybe_unused]] float s[pieces], z[pieces];
        [[maybe_unused]] QuadScales<tiles_m> quad[pieces];
        auto multiply = [&](bool wide) {
#pragma unroll
          for (int t = 0; t < spans; ++t) {
            if (t && t % at_once == 0) load_rows(t);
            if (grouped && t % group_spans == 0)
#pragma unroll
              for (int i = 0; i < pieces; ++i) {
                if constexpr (spread) {
                  quad[i].load(scales_left + i * left_floats, t, lane);
                  s[i] = quad[i].s[t], z[i] = quad[i].z[t];
                } else {
                  const int at = own_group ? i : i / 4;
                  s[i] = from_quad(scale_in_units(mine.s[at]), i, lane);
                  if constexpr (has_zeros) z[i] = from_quad(zero_of_codes(mine.z[at]), i, lane);
                }
                if constexpr (zeros_in_codes) code_zero[i] = row_zero<D>(z[i]);
              }
            typename P::B b[tiles_m];
#pragma unroll
            for (int j = 0; j < tiles_m; ++j) b[j] = x_chunk[(t * tokens + token[j]) * 4];
            if constexpr (zeros_in_sums)
#pragma unroll
              for (int j = 0; j < tiles_m; ++j) P::mma(sum_x[j], P::ones_w(), b[j]);
#pragma unroll
            for (int i = 0; i < tiles_n; ++i) {
              u32 lo[span_words<W>], hi[span_words<W>];
#pragma unroll
              for (int v = 0; v < span_words<W>; ++v) {
                lo[v] = w[2 * i][t * span_words<W> + v];
                hi[v] = w[2 * i + 1][t * span_words<W> + v];
              }
#pragma unroll
              for (int h = 0; h < 2; ++h)
                take_factor(code_zero[2 * i + h], mine, wide, 2 * i + h, t);
              const typename P::A a = D::w(lo, code_zero[2 * i], hi, code_zero[2 * i + 1]);
#pragma unroll
              for (int j = 0; j < tiles_m; ++j) P::mma(sum[i][j], a, b[j]);
            }
            if (grouped && t % group_spans == group_spans - 1)
#pragma unroll
              for (int j = 0; j < tiles_m; ++j) {
#pragma unroll
                for (int i = 0; i < tiles_n; ++i)
#pragma unroll
                  for (int e = 0; e < 4; ++e) {
                    float v = value(sum[i][j][e]);
                    if constexpr (zeros_in_sums) v -= z[2 * i + e / 2] * value(sum_x[j][e % 2]);
                    total[i][j][e] += s[2 * i + e / 2] * v;
                    sum[i][j][e] = 0;
                  }
                if constexpr (zeros_in_sums)
#pragma unroll
                  for (int e = 0; e < 4; ++e) sum_x[j][e] = 0;
              }
          }
        };
        if (any_wide(mine.wide()))
          multiply(true);
        else
          multiply(false);
      }

      add_columns<tokens>(total);
      Sum* mine = partial + (buffer * warps + warp) * slab;
#pragma unroll
      for (int j = 0; j < tiles_m; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int m = token_of_column(j, quarter * 2 + e % 2);
          if ((tokens % 8 && m >= tokens) || (in_columns && quarter * 2 >= column_tokens)) continue;
#pragma unroll
          for (int i = 0; i < tiles_n; ++i)
            mine[m * pitch + i * 16 + e / 2 * 8 + lane / 4] =
                Select<grouped, float, Acc>::of(total[i][j][e], sum[i][j][e]);
          if constexpr (!grouped && zeros_in_sums) mine[m * pitch + rows] = sum_x[j][e];
        }
      group_sync<32 * group_warps>(group);
      const Sum* all = partial + (buffer * warps + group * group_warps) * slab;
      const bool last = segment == segments - 1;
#pragma unroll 1
      for (int i = threadIdx.x % (32 * group_warps); i < int(p.m) * (rows / width);
           i += 32 * group_warps) {
        const int m = i / (rows / width), r = i % (rows / width) * width;
        const i64 n = i64(tile) * rows + r;
        Rows y = {};
        Sum x = 0;
#pragma unroll
        for (int w = 0; w < group_warps; ++w) y.add(all + w * slab + m * pitch + r);
        if constexpr (!grouped && zeros_in_sums)
#pragma unroll
          for (int w = 0; w < group_warps; ++w) x += all[w * slab + m * pitch + rows];
        Sum* sums = kept + ((turn * groups + group) * tokens + m) * pitch;
        if (segment) {
          y.add(sums + r);
          if constexpr (!grouped && zeros_in_sums) x += sums[rows + segment % 2];
        }
        if (!last) {
          y.store(sums + r);
          // one thread writes what the others read a segment later, into the place they do not read
          if constexpr (!grouped && zeros_in_sums)
            if (r == 0) sums[rows + (segment + 1) % 2] = x;
        } else {
          finish(p, n, m, y, Acc(x), alpha);
        }
      }
      if constexpr (buffers == 1)
        group_sync<32 * group_warps>(group);
      else
        buffer ^= 1;
    }
  }
}
