// y[m, n] = alpha * a_scale[m] * sum_k (x[m, k] - a_zero[m]) * (q[n, k] - z[n, g]) * s[n, g] + bias[n]
//
// The portable GEMM: mma.sync with a cp.async ring, for every pair of operand kinds, every shape and
// every group size that is a multiple of 16. One block owns a tile of block_n rows of W by block_m
// tokens and, with split_k > 1, a stripe of K; the block that finishes a tile last adds the stripes
// in order, so results do not depend on timing.
//
// Every step's words are read from shared memory while the step before it multiplies, and a stage
// of the ring is filled a share at a time, between those reads. Sums inside a group are kept in the
// MMA's accumulator (int32, or fp32) and enter the fp32 total with the group's scale:
//     total += s * (acc - z * xsum),   a_zero through   s * (wsum - z * count).
// 16-bit activations whose sums need one set of accumulators have a main loop of their own,
// gemm_ahead.cuh.
#include "gemm_ahead.cuh"
#include "gemm_out.cuh"

// Bytes past the end of K are zero, which is no zero for u4 (q - 8): make them code 8, where the
// other side or a row's own sum does not drop them anyway.
constexpr bool blank_x = same<X, u4>::value;
constexpr bool blank_w = same<W, u4>::value && (has_a_zero || X::bits == 4);

template <int count, int words, bool paired>
__device__ __forceinline__ void blank_tail(u32 (&v)[count], int valid) {
#pragma unroll
  for (int r = 0; r < count; ++r) {
    const int left = valid - 32 * (paired ? r / 2 % words : r % words);
    const u32 keep = left >= 8 ? ~0u : left <= 0 ? 0u : (1u << (4 * left)) - 1;
    v[r] = (v[r] & keep) | (0x88888888u & ~keep);
  }
}

struct Decoded { typename F::A a[tiles_n]; };
__device__ __forceinline__ Decoded decode(const StepW& w) {
  Decoded d;
#pragma unroll
  for (int i = 0; i < tiles_n; ++i) d.a[i] = F::w(w.r + i * regs_w);
  return d;
}

// Add the k in [begin, end) of a step to the sums, or to `start`; `done` is told of each share.
template <bool starts, bool all, class Done>
__device__ __forceinline__ void accumulate(Sums& sum, const Decoded& w, const StepX& x,
                                           const Start& start, int begin, int end, int lane,
                                           const Done& done) {
  using A = typename F::A;
  using B = typename F::B;
  auto add = [&](Acc(&d)[4], const A& a, const B& b, int part) {
    F::mma_part(part, d, a, b, starts && part == 0 ? start.v : d);
  };
  A a[tiles_n];
#pragma unroll
  for (int i = 0; i < tiles_n; ++i) {
    a[i] = all ? w.a[i] : masked<F>(w.a[i], begin, end, lane % 4);
    if constexpr (has_a_zero)
#pragma unroll
      for (int part = 0; part < F::parts; ++part) add(sum.w[i], a[i], F::ones_x(), part);
  }
  const A ones = all ? F::ones_w() : masked<F>(F::ones_w(), begin, end, lane % 4);
#pragma unroll
  for (int j0 = 0; j0 < tiles_m; j0 += share) {
    B b[share];
#pragma unroll
    for (int j = 0; j < share; ++j) b[j] = F::x(x.r + (j0 + j) * regs_x);
    if constexpr (sums_of_x)
#pragma unroll
      for (int part = 0; part < F::parts; ++part)
#pragma unroll
        for (int j = 0; j < share; ++j) add(sum.x[j0 + j], ones, b[j], part);
    auto row_tile = [&](int i, int part) {
#pragma unroll
      for (int j = 0; j < share; ++j) add(sum.y[i][j0 + j], a[i], b[j], part);
    };
#pragma unroll
    for (int part = 0; part < F::parts; ++part)
#pragma unroll
      for (int i = 0; i < tiles_n; ++i) row_tile(i, part);
    done(j0);
  }
}

// Sum the stripe [k_begin, k_end) of K: into `sum` if there is one scale a row, else into `total`.
__device__ __forceinline__ void sum_in_groups(const Params& p, i64 row0, Ring& ring,
                                              const ReaderW& read_w, const ReaderX& read_x,
                                              i64 k_begin, i64 k_end, Sums& sum, Totals& total) {
  const int lane = threadIdx.x % 32, num_tiles = tiles_of_k(k_begin, k_end);
  const Start start;
  const i64 group_size = grouping == channel       ? p.k
                         : grouping == tile_groups ? block_k
                                                   : p.group_size;
  // A stripe may be empty, and past the end of K.
  const i64 group = grouping == channel ? 0 : min(k_begin, p.k - group_size) / group_size;
  i64 group_begin = k_begin;  // first k of the group within this stripe
  i64 group_end = (group + 1) * group_size;
  GroupScales scales(p, row0, lane, group);
  if constexpr (grouping != channel) scales.load(p);
  auto close_group = [&](bool more) {
    flush(total, sum, scales, grouping == tile_groups ? block_k : int(group_end - group_begin));
    if (grouping != tile_groups) clear(sum);
    group_begin = group_end;
    group_end += group_size;
    if (more) scales.load_next(p);
  };

  StepW w[w_ahead ? 2 : 1];
  StepX x[x_ahead ? 2 : 1];
  ring.wait();
  read_w.load<tiles_n * regs_w>(w[0].r, ring.from, 0);
  read_x.load<tiles_m * regs_x>(x[0].r, ring.from, 0);
#pragma unroll 1
  for (int tile = 0; tile < num_tiles; ++tile) {
    each_step([&](auto at) {
      constexpr int s = at.value;
      if constexpr (s == steps - 1) ring.advance();
      // The next step is read while this one multiplies.
      constexpr int next = (s + 1) % steps;
      StepX& x_now = x[x_ahead ? s % 2 : 0];
      StepX& x_next = x[x_ahead ? 1 - s % 2 : 0];
      StepW& w_now = w[w_ahead ? s % 2 : 0];
      const i64 k0 = k_begin + i64(tile) * block_k + s * F::step_k;
      const int valid = blank_w || blank_x ? int(min(k_end - k0, i64(64))) - lane % 4 * 8 : 0;
      if constexpr (blank_w)
        if (k_end - k0 < F::step_k) blank_tail<tiles_n * regs_w, F::words_w, true>(w_now.r, valid);
      const Decoded decoded = decode(w_now);
      read_w.load<tiles_n * regs_w>(w[w_ahead ? 1 - s % 2 : 0].r, ring.from, next);
      if constexpr (x_ahead) read_x.load<tiles_m * regs_x>(x_next.r, ring.from, next);
      ring.fill<next, steps>();

      if constexpr (blank_x)
        if (k_end - k0 < F::step_k) blank_tail<tiles_m * regs_x, F::words_x, false>(x_now.r, valid);
      auto read_ahead = [&](int j) {
        if constexpr (!x_ahead)
          read_x.load<share * regs_x>(x_next.r + j * regs_x, ring.from, next, j);
      };
      auto add = [&](auto starts, auto all, int begin, int end, const auto& done) {
        accumulate<starts.value, all.value>(sum, decoded, x_now, start, begin, end, lane, done);
      };
      if constexpr (grouping == tile_groups) {
        add(Int<s == 0>{}, Int<true>{}, 0, F::step_k, read_ahead);
        if constexpr (s == steps - 1) close_group(tile + 1 < num_tiles);
      } else if constexpr (grouping == channel || grouping == span_groups) {
        add(Int<false>{}, Int<true>{}, 0, F::step_k, read_ahead);
        if (grouping == span_groups && k0 + F::step_k >= group_end && k0 < k_end)
          close_group(group_end < k_end);
      } else {
        auto later = [](int) {};
        const i64 until = min(k0 + F::step_k, k_end);
        add(Int<false>{}, Int<false>{}, 0, int(min(group_end - k0, i64(F::step_k))), later);
        while (group_end <= until) {
          const i64 begin = group_end;
          close_group(group_end < k_end);
          if (begin < until)
            add(Int<false>{}, Int<false>{}, int(begin - k0),
                int(min(group_end - k0, i64(F::step_k))), later);
        }
#pragma unroll
        for (int j = 0; j < tiles_m; j += share) read_ahead(j);
      }
    });
  }
  if (grouping > tile_groups && k_end > group_begin)
    flush(total, sum, scales, int(k_end - group_begin));
}

// One block an SM is enough for the compiler: it would rather spill than lose a second.
extern "C" __global__ void __launch_bounds__(threads, 1) gemm(const __grid_constant__ Params all) {
  extern __shared__ __align__(256) char smem[];
  const OfBlock<of_experts, Params> own{all};
  const Params& p = own.p;
  if (own.is_done<block_n, threads>(i64(tile_of_block(all)) * block_n)) return;
  const Place place(p);
  const i64 k_tiles = tiles_of_k(0, p.k),
            per_stripe = (k_tiles + Config::split_k - 1) / Config::split_k;
  const i64 k_begin = min(i64(blockIdx.y) * per_stripe * block_k, p.k);
  const i64 k_end = min(k_begin + per_stripe * block_k, p.k);

  Vectors& vectors = *reinterpret_cast<Vectors*>(smem + ring_bytes);
  Sums sum;
  Totals total;
  clear(sum);
  if (!direct) clear(total);
  if (blockIdx.y == 0)
    prefetch_residual<block_m, block_n, threads>(p, place.m0, place.n0, threadIdx.x);
  {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_n = warp % warps_n, warp_m = warp / warps_n;
    const i64 row0 = place.n0 + warp_n * tiles_n * 16;
    const u32 at = smem_address(smem);
    Ring ring(p, at, place.n0, place.m0, k_begin, k_end);
    vectors.fill(p, place.n0, place.m0);
    const ReaderW read_w(at, warp_n * tiles_n * 16, lane);
    const ReaderX read_x(at + TileW::bytes, warp_m * tiles_m * 8, lane);
    if constexpr (decodes_ahead)
      sum_ahead<F>(p, smem + ring_bytes + sizeof(Vectors), place.n0, ring, read_w, read_x, k_begin,
                   tiles_of_k(k_begin, k_end), sum);
    else
      sum_in_groups(p, row0, ring, read_w, read_x, k_begin, k_end, sum, total);
    cp_async_commit();  // the share of a stage that was begun
    cp_async_wait<0>();
  }
  if constexpr (Config::split_k > 1) {
    if constexpr (direct) {
      if (!add_stripes<Acc>(p, blockIdx.x, sum)) return;
    } else {
      if (!add_stripes<float>(p, blockIdx.x, total)) return;
    }
  }
  const auto after = own.anew(all);
  if constexpr (direct) {
    const int thread = anew(threadIdx.x), row = thread / 32 % warps_n * tiles_n * 16;
    const Params& p = after.p;
    GroupScales scales(p, Place(p).n0 + row, thread % 32, 0);
    clear(scales.s);
    clear(scales.z);
    if (!scaled && p.k > 0) scales.load(p);  // an empty sum is zero, whatever the scale
    flush(total, sum, scales, int(p.k));
  }
  epilogue(after.p, vectors, total);
}
