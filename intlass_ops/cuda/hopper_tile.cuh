// What a block of hopper.cu computes: its tile, what a stage of its ring holds, what its threads keep,
// and how the tiles are shared out among the blocks.
#pragma once
#include "experts.cuh"
#include "hopper.cuh"
#include "split_scales.cuh"

constexpr int block_m = Config::block_m, tiles_n = Config::tiles_n, num_stages = Config::num_stages;
// A cluster of blocks shares a tile by k, or the tokens or the weights of neighbouring tiles: each block
// then loads a part of them for all.
constexpr int split_k = Config::split_k, share_x = Config::share_x, share_w = Config::share_w;
constexpr int sharing = share_x * share_w, cluster = split_k * sharing;
static_assert(cluster == split_k || cluster == share_x || cluster == share_w,
              "one reason for a cluster");
constexpr int consumers = Config::consumers, block_k = Config::block_k;  // of a stage
// Consumers share a tile's rows, or its k (by_stages): each takes every so many-th stage, and the first one
// adds up. Or they take turns: while one writes its tile out, the next computes another.
constexpr bool in_turns = Config::in_turns, by_stages = Config::by_stages;
// Or (rest_by_k) the last one has rows of its own: of those left over when each block has as many tiles,
// each block takes a share by k. It begins its tiles at the same k, and goes round.
constexpr bool rest_by_k = Config::rest_by_k;
// Warpgroups that divide a tile's rows
constexpr int team = in_turns || by_stages ? 1 : consumers - rest_by_k;
constexpr int stride = by_stages ? consumers : 1;   // from a consumer's k tile to its next
constexpr int writers = by_stages ? 1 : consumers;  // warpgroups that write at a time
static_assert(num_stages % stride == 0, "a stage is always the same consumer's, in step with it");
static_assert(num_stages >= 2 * stride,
              "a consumer gives its stage back after it has the next one");
constexpr int block_n = team * tiles_n * 64, rest_rows = rest_by_k ? tiles_n * 64 : 0;
constexpr int stage_rows = block_n + rest_rows;  // of W
constexpr bool from_registers = !(same<X, s8>::value && same<W, s8>::value);
constexpr int values = block_m / 2;  // of a thread, for one row tile of 64
// One accumulator a row tile, for all of K: one scale a row, or weights that have taken theirs
constexpr bool scaled = grouping == scaled_weights, direct = grouping == channel || scaled;
constexpr bool needs_sums = has_zeros && !scaled;
// What weights take their scales by, or sums theirs, lies in the stage, made by the warps beside the
// producer's (hopper_staged.cuh): 8 bytes a row and group, or 4 of sums or split scales without zero points
constexpr bool staged_scales = grouping != channel && !same<W, e2m1>::value;
constexpr int staged_bytes = (scaled && !split_scales) || has_zeros ? 8 : 4;
constexpr int flushes = Config::groups_per_tile;  // groups in a tile of K, at least one
// The launch gives all threads the same registers; the consumers then take what the producer leaves.
// A single consumer may have two blocks on an SM, which hide each other's latencies.
constexpr int threads = 128 * (consumers + 1), blocks_per_sm = consumers == 1 ? 2 : 1;
constexpr bool leaves_sums = Config::stream_k || rest_by_k;  // for other blocks
// What the producer's warpgroup keeps: most where its warps make scales and zero points of sums
constexpr bool wide_zeros = split_scales && has_zeros && (sizeof(Scale) > 2 || sizeof(Zero) > 1);
constexpr bool wide_scales = split_scales && sizeof(Scale) > 2;
constexpr int of_two = Config::parts > 1                          ? 24
                       : needs_sums || wide_zeros                 ? 88
                       : wide_scales                              ? 72
                       : staged_scales && (scaled || flushes > 1) ? 56
                       : staged_scales || leaves_sums             ? 40
                                                                  : 24;
// Of two short stages at a time, whose tiles are shared out among blocks
constexpr int more_of_two =
    block_k < 128 && Config::stream_k && (wide_zeros || wide_scales) ? 16 : 0;
constexpr int of_three = needs_sums || wide_zeros ? 80 : staged_scales ? 56 : 32;
constexpr int of_four = staged_scales && stage_rows >= 256 && (scaled || X::bits == 8) ? 64 : 32;
constexpr int shares_of_producer[] = {40, of_two + more_of_two, of_three, of_four};
constexpr int shares_of_consumer[] = {208, (504 - of_two - more_of_two) / 2, (512 - of_three) / 3,
                                      (480 - of_four) / 4};
static_assert(!rest_by_k || (from_registers && cluster == 1 && !needs_sums && !Config::stream_k &&
                             !in_turns && !by_stages && consumers > 1),
              "the rows that are left over are shared in one way only");
static_assert(!of_experts || (cluster == 1 && !Config::stream_k && !rest_by_k && !by_stages),
              "how many tiles there are is data");
static_assert(consumers <= 4, "the registers of an SM are shared out for no more");
constexpr int consumer_registers = shares_of_consumer[consumers - 1];
constexpr int producer_registers = shares_of_producer[consumers - 1];
static_assert(block_m % 16 == 0 && block_m <= 256, "wgmma takes up to 256 tokens");
static_assert(!has_a_zero, "a zero point of the activations needs row sums, which gemm.cu forms");

// A stage: X in columns of 128 bytes, W, and per group the sums of the tokens and the rows' scales
static_assert(block_k * X::bits % 1024 == 0, "TMA brings whole columns of X");
constexpr int x_columns = block_k * X::bits / 1024, x_column_bytes = block_m * 128;
constexpr int x_bytes = x_columns * x_column_bytes;
constexpr int w_row_bytes = block_k * W::bits / 8, w_bytes = stage_rows * w_row_bytes;
constexpr int sum_bytes = needs_sums ? flushes * block_m * 4 : 0;
constexpr int scale_bytes = staged_scales ? flushes * stage_rows * staged_bytes : 0;
constexpr int stage_bytes = (x_bytes + w_bytes + sum_bytes + scale_bytes + 1023) / 1024 * 1024;
constexpr int barriers_bytes = 1024;
typedef StageRing<num_stages, stage_bytes> Ring;

// Done with a stage: tell the producer, one thread of every warp. Where plain loads read what other threads
// of the block have stored or loaded there, each thread for itself: racecheck sees no warp that is in step
// anyway.
constexpr int arrivals_of_warp = needs_sums || staged_scales ? 32 : 1;
static_assert(sharing == 1 || !needs_sums, "not both");
__device__ __forceinline__ void release(u32 empty, int lane, bool filled = true) {
  constexpr bool each = arrivals_of_warp == 32;
  if constexpr (!each || sharing > 1) __syncwarp();
  if constexpr (each || sharing == 1)
    if (filled && (each || lane == 0)) barrier_arrive(empty);
  if constexpr (sharing > 1)  // every block of the cluster fills a part of the stage
    if (filled && lane < sharing && !(each && lane == int(blockIdx.x) % sharing))
      barrier_arrive_at(empty, lane);
}

// Fragments come in chunks: 16 bytes of a row of W
constexpr int steps = x_columns * 4, chunks = from_registers ? w_row_bytes / 16 : steps;
constexpr int chunk_steps = steps / chunks;
[[maybe_unused]] constexpr int steps_per_flush = steps / flushes;
[[maybe_unused]] constexpr int chunks_per_flush = direct ? chunks : chunks / flushes;
static_assert(steps % chunks == 0, "a chunk of W is one or two steps of wgmma");
// A turn of the tensor cores takes one, or two where there are registers for them
constexpr int turn_chunks =
    (direct && from_registers && W::bits == 8) ||
            (scaled && staged_scales && flushes <= block_k / 128 && block_m * tiles_n <= 32)
        ? 2
        : 1;
constexpr int turn_steps = turn_chunks * chunk_steps;
// Turns whose words are read early, fewer than a stage has
constexpr int ahead = direct && turn_chunks == 1 && chunks * tiles_n > 2 ? 2 : 1;

// What a thread keeps of its rows and tokens: if not direct, an accumulator that is emptied into the
// totals group by group, or two of a part of the tokens (hopper_parts.cuh)
constexpr int parts = Config::parts, acc_values = values / parts;
static_assert(parts == 1 || (!direct && !needs_sums && tiles_n == 1 && flushes == 1 && steps == 4 &&
                             chunk_steps == 1 && parts % 2 == 0 && !by_stages),
              "parts are for INT4 weights in groups of whole tiles of K under INT8 activations");
constexpr int acc_tiles = direct ? tiles_n : parts > 1 ? 2 : 1;
struct Sums { Acc acc[acc_tiles][acc_values]; };
// Sums of integers with one scale a row start here, at 1.5 * 2^23 as a float: as long as they stay below
// 2^22 they are floats as they stand, less that number.
constexpr int first_sum = same<Acc, int>::value && direct ? 0x4b400000 : 0;
struct Totals { float acc[direct ? 1 : tiles_n][values]; };

// The first or the second of two things of different type
template <bool pick_first, class First, class Second> struct Select {
  using type = First;
  static __device__ __forceinline__ First& of(First& first, Second&) { return first; }
};
template <class First, class Second> struct Select<false, First, Second> {
  using type = Second;
  static __device__ __forceinline__ Second& of(First&, Second& second) { return second; }
};

// Tiles lie in a row, group by group of `raster` token tiles, so that blocks that run at the same time
// share as many tiles of W and X as they can.
struct Segment {
  int tile, begin, end;  // k tiles [begin, end) of a tile

  // Whether the sums of it are what is written out, with what others have summed of the tile
  __device__ __forceinline__ bool is_owned(int k_tiles) const {
    return begin == 0 || (rest_by_k && end - begin == k_tiles);
  }
  // What this block computes of it: all, or a stripe where a cluster shares it
  __device__ __forceinline__ Segment of_block() const {
    if constexpr (split_k == 1) return *this;
    const int each = (end - begin + split_k - 1) / split_k, rank = int(blockIdx.x) % split_k;
    return {tile, min(begin + rank * each, end), min(begin + (rank + 1) * each, end)};
  }
};

// How the tiles are shared out: config.Hopper.shares
struct Shares {
  int of_m, of_n, k_tiles;
  int whole;        // tiles that are computed whole, round by round
  int helpers;      // clusters, the first ones, without a tile in the last round
  int tail;         // k tiles, the last ones, that they take of each tile of that round; or all
  int each, extra;  // k tiles of a helper; the first `extra` get one more

  // The helpers' k tiles, tail after tail
  __device__ __forceinline__ int first_unit(int helper) const {
    return helper * each + min(helper, extra);
  }
  __device__ __forceinline__ int helper_of(int unit) const {
    const int of_more = extra * (each + 1);
    return unit < of_more ? unit / (each + 1) : extra + (unit - of_more) / each;
  }
  // Which share of the rest a block has: who waits was launched after all that it waits for
  __device__ __forceinline__ int share_of_block() const { return gridDim.x - 1 - blockIdx.x; }
  __device__ __forceinline__ int units_of_block() const {
    return each + (share_of_block() < extra);
  }
  __device__ __forceinline__ int row_of_rest(int tile) const {
    return whole * block_n + tile * rest_rows;
  }
  __device__ __forceinline__ int first_row_of_rest() const {
    return row_of_rest(first_unit(share_of_block()) / k_tiles);
  }
  __device__ __forceinline__ void locate(int tile, int& m0, int& n0) const {
    if constexpr (rest_by_k) {  // all tokens in each tile
      m0 = 0, n0 = tile < whole ? tile * block_n : row_of_rest(tile - whole);
      return;
    }
    constexpr int raster = Config::raster;
    const int first = tile / (raster * of_n) * raster, height = min(raster, of_m - first);
    const int within = tile - first * of_n;
    m0 = ((first + within % height) * share_w + int(blockIdx.x) % share_w) * block_m;
    n0 = (within / height * share_x + int(blockIdx.x) % share_x) * block_n;
  }
  // The same of a grouped GEMM: where a tile begins in its expert's problem, and which tokens it has
  __device__ __forceinline__ int locate_slot(int tile, int& m0, int& n0) const {
    locate(tile, m0, n0);
    if constexpr (!of_experts) return 0;
    const int slot = m0 / block_m;
    m0 = 0;
    return slot;
  }
};

// What a cluster does, of one block or more: one segment after another
struct Schedule {
  int at = blockIdx.x / cluster;  // the next tile; then what is done of the last round
  bool of_rest = false;           // rest_by_k: the share of that, from the start

  __device__ __forceinline__ bool next(const Shares& shares, Segment& s) {
    if (at < shares.whole && !of_rest) {
      const int first = rest_by_k ? shares.first_unit(shares.share_of_block()) % shares.k_tiles : 0;
      s = {at, first, first + shares.k_tiles};
      at += gridDim.x / cluster;
      return true;
    }
    if (!(Config::stream_k || of_rest) || shares.tail == 0) return false;
    const int own = rest_by_k ? shares.share_of_block() : int(blockIdx.x) / cluster;
    const int done = rest_by_k ? at - int(blockIdx.x) : at - shares.whole - own;
    if (own >= shares.helpers) {  // launched after all that it waits for
      s = {shares.whole + own - shares.helpers, 0, shares.k_tiles - shares.tail};
      return at++, done == 0;
    }
    const int unit = shares.first_unit(own) + done;
    const int left = shares.first_unit(own + 1) - unit;
    if (left <= 0) return false;
    s.tile = shares.whole + unit / shares.tail;
    s.begin = shares.k_tiles - shares.tail + unit % shares.tail;
    s.end = min(shares.k_tiles, s.begin + left);
    at += s.end - s.begin;
    return true;
  }
};
