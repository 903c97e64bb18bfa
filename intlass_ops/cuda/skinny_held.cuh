// A warp's share of W and X in skinny_held.cu: which they are, how they are asked for, and the fragments of X.
#pragma once
#include "hopper.cuh"

constexpr bool lut4_in_shared = true;
#include "lut4_pairs.cuh"
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
