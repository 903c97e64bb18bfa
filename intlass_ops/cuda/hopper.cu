// The GEMM (formula in gemm.cu) on Hopper's own units: TMA fills a ring, wgmma empties it (sm_90a).
//
// A block is a few warpgroups. The first one's first thread is the producer: it copies tiles of W
// and X into the ring; its other warps add the scales that weights take (hopper_staged.cuh). The
// others are consumers: each owns 64 * tiles_n rows of W and all block_m tokens of the block's tile,
// with W as wgmma's A operand. INT8 weights under INT8 activations go from shared memory straight to
// the tensor cores; all others become fragments in registers on the way, while the tensor cores work
// on the fragments before. Or (`in_turns`) each consumer owns all of a tile and takes every second
// one, so that one computes while the other writes out; or (`by_stages`) all own the same rows and
// tokens, and each sums up some of the tiles of K; or (`rest_by_k`) the last one owns other rows than
// those of the block's tile, for a part of K.
//
//     producer:   empty? -> TMA -> full          full/empty: one pair of mbarriers a stage
//     consumer:   full?  -> fragments, wgmma -> empty
//
// Blocks are persistent: each takes tile after tile. In the last round there may be fewer tiles than
// blocks (`stream_k`): those without one help, they sum the last k tiles of the others' tiles, and
// are done when the others have summed the rest and add what the helpers have left, in order. Where
// there are few tiles at all, a cluster of blocks shares each (`split_k`), or what both make of it.
#include "hopper_out.cuh"
#include "hopper_parts.cuh"
#include "hopper_staged.cuh"

// A tile into a stage: all of it, or a part of it into the stages of every block of the cluster
template <int blocks, int rows, int bytes>
__device__ __forceinline__ void load_tile(u32 to, const TensorMap& map, int column, int row,
                                          u32 full) {
  const int rank = int(blockIdx.x) % blocks;
  if constexpr (blocks == 1)
    tma_load(to, map, column, row, full);
  else
    tma_load_all<blocks>(to + rank * (bytes / blocks), map, column, row + rank * (rows / blocks),
                         full);
}

// rest_by_k: the rows of a tile of K, and those left over that the last consumer takes, if there are more
__device__ __forceinline__ void load_rows(u32 to, const TensorMap& map, int kt, int row,
                                          int rest_row, bool more, int x_loaded, const Ring& ring) {
  constexpr int bytes = rest_rows * w_row_bytes;
  barrier_expect(ring.full(), x_loaded + w_bytes - (more ? 0 : bytes));
  if (more)
    tma_load(to + team * bytes, map, kt * w_row_bytes, rest_row, ring.full());
  else
    barrier_arrive_times(ring.empty(), 4 * arrivals_of_warp);  // the last consumer is done
#pragma unroll
  for (int i = 0; i < team; ++i)
    tma_load(to + i * bytes, map, kt * w_row_bytes, row + i * rest_rows, ring.full());
}

__device__ __forceinline__ void produce(const Params& p, const Shares& shares,
                                        const TensorMap& w_map, const TensorMap& x_map,
                                        const char* x_sums, i64 x_sums_row, Ring ring) {
  Schedule schedule;
  [[maybe_unused]] int rest_row = shares.first_row_of_rest(), rest_left = shares.units_of_block();
  bool waited = false;
  // Config.x_rows: sums of tokens that are not loaded are of what lies there, and go nowhere
  const int x_rows = share_x * parts > 1 ? block_m : min(block_m, (int(p.m) + 7) / 8 * 8);
  const int x_loaded = x_rows * x_columns * 128;
  for (Segment s; schedule.next(shares, s);) {
    int m0, n0;
    const int slot = shares.locate_slot(s.tile, m0, n0);
    place_among_all(p, slot, m0, n0);
    s = s.of_block();
#pragma unroll 1
    for (int count = s.begin; count < s.end; ++count, ring.advance()) {
      const int kt = place_of(count, shares.k_tiles);
      barrier_wait(ring.empty(), ring.phase ^ 1);
      if constexpr (!rest_by_k) barrier_expect(ring.full(), x_loaded + w_bytes + sum_bytes);
      const u32 data = ring.data();
      if constexpr (rest_by_k)
        load_rows(data + x_bytes, w_map, kt, n0, rest_row, rest_left-- > 0, x_loaded, ring);
      else
        load_tile<share_w, block_n, w_bytes>(data + x_bytes, w_map, kt * w_row_bytes, n0,
                                             ring.full());
      if (rest_by_k && kt + 1 == shares.k_tiles) rest_row += rest_rows;
      if (!waited) wait_for_predecessors(), waited = true;
#pragma unroll
      for (int c = 0; c < x_columns; ++c)
        load_tile<share_x, block_m, x_column_bytes>(data + c * x_column_bytes, x_map,
                                                    (kt * x_columns + c) * 128, m0, ring.full());
      if constexpr (needs_sums)
#pragma unroll
        for (int f = 0; f < flushes; ++f)
          bulk_load(data + x_bytes + w_bytes + f * block_m * 4,
                    x_sums + (i64(kt * flushes + f) * x_sums_row + m0) * 4, block_m * 4,
                    ring.full());
    }
  }
  // Consumers of other blocks arrive at this block's barriers: it must live until they all have.
  if constexpr (sharing > 1)
#pragma unroll 1
    for (int stage = 0; stage < num_stages; ++stage, ring.advance())
      barrier_wait(ring.empty(), ring.phase ^ 1);
}

template <class T> __device__ __forceinline__ void pin_all(T (&v)[acc_values]) {
#pragma unroll
  for (int e = 0; e < acc_values; ++e) pin(v[e]);
}

// Sum a segment's k tiles, both operands from shared memory
__device__ __forceinline__ void sum_tiles(Ring& ring, const Segment& segment, int wg, int wg_row0,
                                          Sums& sum) {
  const int lane = threadIdx.x % 32;
  u32 previous = 0;  // the stage before this one, which wgmma may still be reading
#pragma unroll 1
  for (int kt = segment.begin; kt < segment.end; ++kt) {
    barrier_wait(ring.full(), ring.phase);
    // the other's stages come next: now it is no more than a phase behind the barriers
    if (in_turns && kt + 1 == segment.end) pass_turn(1 - wg);
    const u64 x = tile_descriptor(ring.data());
    const u64 w = tile_descriptor(ring.data() + x_bytes + wg_row0 * w_row_bytes);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < steps; ++s)
#pragma unroll
      for (int i = 0; i < tiles_n; ++i)
        wgmma(sum.acc[i], w + (i * 64 * w_row_bytes + s * 32) / 16,
              x + (s / 4 * x_column_bytes + s % 4 * 32) / 16, true);
    wgmma_commit();
    wgmma_wait<1>();
    if (kt > segment.begin) release(previous, lane);
    previous = ring.empty();
    ring.advance();
  }
  wgmma_wait<0>();
  if (segment.end > segment.begin) release(previous, lane);
}

// The same with fragments of W: into `sum` if there is one scale a row, else into `total`. While wgmma
// works on a turn's fragments those of the next are made and the words of the one after it are
// read, also across tiles of K and before an accumulator is emptied.
__device__ __forceinline__ void sum_fragments(const Params& all, int slot, int k_tiles, Ring& ring,
                                              const Segment& segment, int m0, i64 row0, int wg_row0,
                                              int lane, int warp, Sums& sum, Totals& total) {
  if (segment.begin >= segment.end) return;
  if constexpr (flushes == 1) pin(lane);
  const Lane own(wg_row0, lane, warp);
  BlockReader block_reader(problem_of_slot(all, slot), row0, lane);
  BlockScales blocks, next_blocks;
  bool too_large[tiles_n] = {};
  if constexpr (block_fp4) block_reader.read(next_blocks, segment.begin);

  constexpr int turns = chunks / turn_chunks * tiles_n;
  static_assert(turns % 2 == 0, "the first turn of a tile of K finds its fragments in a[0]");
  // an accumulator each: the row tiles take turns at each chunk; else a row tile runs to its end
  auto chunk_of = [](int t) { return direct ? t / tiles_n * turn_chunks : t % chunks; };
  auto tile_of = [](int t) { return direct ? t % tiles_n : t / chunks; };
  u32 a[2][turn_steps][4];
  RowScale rows[tiles_n][kept_scales][row_scales][2];
  Chunk raw[ahead];
  const int scales_of_lane = (wg_row0 / 2 + warp * 8 + lane / 4) * (2 * staged_bytes);
  auto load_staged = [&](const char* tile) {
    if constexpr (scaled && staged_scales)
#pragma unroll
      for (int i = 0; i < tiles_n; ++i)
#pragma unroll
        for (int f = 0; f < flushes; ++f)
          load_row_scales(rows[i][f][0], tile + scales_at(f, i * 64) + scales_of_lane);
  };
  auto make_fragments = [&](int t) {
    const int c = chunk_of(t), i = tile_of(t);
    if constexpr (block_fp4)
#pragma unroll
      for (int h = 0; h < 2; ++h) blocks.factors(rows[i][0], i, h, c, lane % 4);
    own.fragments(a[t % 2], raw[t % ahead], rows[i], c * chunk_steps);
  };
  auto load = [&](const char* tile, int t) {
    raw[t % ahead] = own.load(tile + x_bytes, tile_of(t), chunk_of(t));
  };
  // The addresses of the ring's stage move along with it: fewer instructions than making them anew
  u32 data = ring.data(), full = ring.full();
  constexpr int to_empty = num_stages * 8;
  const u64 no_tile = tile_descriptor(0);
  u32 x_tile = u32(tile_descriptor(data));
  auto tile_at = [](u32 data) { return static_cast<const char*>(__cvta_shared_to_generic(data)); };

  barrier_wait(full, ring.phase);
  const char* tile = tile_at(data);
#pragma unroll
  for (int t = 0; t < ahead; ++t) load(tile, t);
  blocks = next_blocks;
  load_staged(tile);
  make_fragments(0);
  load(tile, ahead);
  constexpr u32 none = ~0u;  // no barrier's address
  u32 previous = none;       // the stage before this one, which wgmma may still be reading
#pragma unroll 1
  for (int kt = segment.begin; kt < segment.end; kt += stride) {
    const int next_kt = kt + stride < segment.end ? kt + stride : kt;  // the last one is made twice
    if constexpr (block_fp4) {
      block_reader.read(next_blocks, place_of(next_kt, k_tiles));
#pragma unroll
      for (int i = 0; i < tiles_n; ++i) too_large[i] |= blocks.too_large(i);
    }
    const u32 x = data, this_full = full;
    auto x_step = [x_tile, no_tile](int s) {
      return (no_tile | x_tile) + (s / 4 * x_column_bytes + s % 4 * 32) / 16;
    };
    const int step = next_kt == kt ? 0 : ring.step(stride);
    ring.move(step);
    data += step * stage_bytes, full += step * 8, x_tile += step * (stage_bytes / 16);
#pragma unroll
    for (int t = 0; t < turns; ++t) {
      const int c = chunk_of(t), i = tile_of(t), f = c / chunks_per_flush;
      const bool empties = !direct && (c + 1) % chunks_per_flush == 0;
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < turn_steps; ++s)
        wgmma(sum.acc[direct ? i : 0], a[t % 2][s], x_step(c * chunk_steps + s),
              direct || c % chunks_per_flush != 0 || s != 0);
      wgmma_commit();
      SumScale by[2];
      if (empties) load_row_scales(by, tile_at(x) + scales_at(f, i * 64) + scales_of_lane);
      wgmma_wait<1>();
      if (direct && t == 0) release(previous + to_empty, lane, previous != none);
      if (t + 1 + ahead == turns) {
        barrier_wait(full, ring.phase);
        tile = tile_at(data);
      }
      if (t + 1 == turns) blocks = next_blocks;
      make_fragments((t + 1) % turns);
      if (t + 2 == turns) load_staged(tile);
      if (empties) {
        wgmma_wait<0>();
        pin_all(sum.acc[0]);
        flush(total.acc[i], sum.acc[0], by, x + x_bytes + w_bytes + f * block_m * 4, lane);
        pin_all(sum.acc[0]);
      }
      load(tile, (t + 1 + ahead) % turns);
    }
    if constexpr (direct)
      previous = this_full;
    else
      release(this_full + to_empty, lane);
  }
  ring.advance(stride);
  if constexpr (direct) {
    wgmma_wait<0>();
    release(previous + to_empty, lane);
  }
  if constexpr (one_fma || (block_fp4 && same<Scale, e8m0>::value))
#pragma unroll
    for (int i = 0; i < tiles_n; ++i) {
      pin_all(sum.acc[i]);
      const bool again = block_fp4 ? too_large[i] : rows_are_nan(sum.acc[i]);
      if (__any_sync(~0u, again))
        sum_again(problem_of_slot(all, slot), k_tiles, segment, row0 + i * 64, m0, lane,
                  sum.acc[i]);
    }
}

extern "C" __global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(threads, blocks_per_sm)
    hopper(const __grid_constant__ Params p, const __grid_constant__ Shares most,
           const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map,
           const char* x_sums, i64 x_sums_row) {
  extern __shared__ __align__(1024) char smem[];
  Ring ring{smem_address(smem) + barriers_bytes, smem_address(smem)};
  launch_dependents();
  if constexpr (Config::only_if >= 0) {  // mx_codes.cu; its flag is where sums would be
    wait_for_predecessors();
    if (*reinterpret_cast<const int*>(x_sums) != Config::only_if) return;
  }

  decltype(auto) shares = shares_of(p, most);
  fill_lut4_pairs<threads>();

  if (threadIdx.x == 0) {
    prefetch(w_map);
    prefetch(x_map);
#pragma unroll 1
    for (int s = 0; s < num_stages; ++s) {
      barrier_init(ring.barriers + s * 8, 1 + (staged_scales ? scale_arrivals : 0));
      barrier_init(ring.barriers + (num_stages + s) * 8,
                   (team + rest_by_k) * 4 * (arrivals_of_warp + sharing - 1));
    }
    if constexpr (split_k > 1) init_exchange(ring.barriers);
    publish_barriers();
  }
  if constexpr (sharing > 1)
    cluster_meet();
  else
    __syncthreads();
  if constexpr (split_k > 1)
    cluster_arrive();  // this block runs: the other may write to its memory

  if (threadIdx.x < 128) {
    give_registers<producer_registers>();
    if (threadIdx.x == 0) produce(p, shares, w_map, x_map, x_sums, x_sums_row, ring);
    if (threadIdx.x >= 32) {
      if constexpr (staged_scales) make_row_scales(p, shares, ring);
    }
    __syncwarp();
    if constexpr (split_k > 1) cluster_wait();  // as the consumers do
    if constexpr (split_k > 1 && Config::stream_k) cluster_meet();
    return;
  }
  take_registers<consumer_registers>();
  wait_for_predecessors();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int wg = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;  // ptxas sees that a warp agrees
  const int wg_row0 = in_turns || by_stages ? 0 : wg * tiles_n * 64;
  Schedule schedule;
  if constexpr (rest_by_k) schedule.of_rest = wg == team;
  int done = 0;
  if (in_turns && wg == 1) pass_turn(0);
#pragma unroll 1
  for (Segment all; schedule.next(shares, all); ++done) {
    Segment s = all.of_block();
    if (in_turns && done % consumers != wg) {
      ring.skip(s.end - s.begin);
      continue;
    }
    int m0, n0;
    const int slot = shares.locate_slot(s.tile, m0, n0);
    const int row0 = rest_by_k && wg == team ? n0 : n0 + wg_row0;
    if constexpr (by_stages) {
      s.begin += wg;
      ring.advance(wg);
    }
    Sums sum;
    Totals total;
#pragma unroll
    for (int i = 0; i < acc_tiles; ++i)
#pragma unroll
      for (int e = 0; e < acc_values; ++e)
        sum.acc[i][e] = s.is_owned(shares.k_tiles) ? first_sum : 0;
    if constexpr (!direct)
#pragma unroll
      for (int i = 0; i < tiles_n; ++i)
#pragma unroll
        for (int e = 0; e < values; ++e) total.acc[i][e] = 0;
    RowVectors vectors;
    const int first_token = m0 + (split_k > 1 ? cluster_rank() * tokens : 0);
    if constexpr (early_vectors)
      vectors.read(problem_of_slot(p, slot), first_token, row0, lane, warp);
    if constexpr (Config::residual)
      if (all.is_owned(shares.k_tiles))
        prefetch_residual<tokens, tiles_n * 64, 128>(p, first_token, row0, threadIdx.x % 128);
    if constexpr (in_turns) await_turn(wg);
    if constexpr (parts > 1)
      sum_parts(ring, s, wg_row0, lane, warp, sum, total);
    else if constexpr (from_registers)
      sum_fragments(p, slot, shares.k_tiles, ring, s, m0, row0 + warp * 16, wg_row0, lane, warp,
                    sum, total);
    else
      sum_tiles(ring, s, wg, wg_row0, sum);
#pragma unroll
    for (int i = 0; i < acc_tiles; ++i)
      if constexpr (parts == 1) pin_all(sum.acc[i]);
    auto& result = Select<direct, Sums, Totals>::of(sum, total).acc;
    if constexpr (by_stages) {
      add_up(smem, wg, result);
      if (wg > 0) {
        if constexpr (split_k > 1) cluster_wait();  // as the first one does
        return;
      }
    }
    if (slot_belongs_to_none<tiles_n * 64, 128>(p, slot, row0, threadIdx.x % 128)) continue;
    finish(problem_of_slot(p, slot), shares, all, smem, done, wg, first_token, row0, lane, warp,
           vectors, result);
  }
  if constexpr (split_k > 1 && Config::stream_k)
    cluster_meet();  // the other tells what it has read
}
