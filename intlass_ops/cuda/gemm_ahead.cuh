// The main loop of gemm.cu for 16-bit activations where one set of accumulators holds the sums.
//
// A step's weights are decoded in halves of 16 k, each while the half before it multiplies, so that
// the tensor cores need not wait for it. Where scales have the activations' type, each weight takes
// its own, (code - zero) * scale rounded to that type, as in hopper.cu.
#pragma once
#include "gemm_ring.cuh"
#include "gemm_table.cuh"

// What the rows of a lane turn their codes by
template <class F> struct RowScales {
  typename F::Row rows[tiles_n][2];

  // For a step
  __device__ __forceinline__ void take(const GroupTable<F>& table, int step) {
    [[maybe_unused]] u32 v[GroupTable<F>::lane_words];
    if constexpr (scaled) table.read(v, step);
#pragma unroll
    for (int r = 0; r < lane_rows; ++r)
      if constexpr (!scaled)
        rows[r / 2][r % 2] = F::plain();
      else if constexpr (split_scales && has_zeros)
        rows[r / 2][r % 2] = {v[2 * r + 1], v[2 * r]};
      else if constexpr (split_scales)
        rows[r / 2][r % 2] = {F::plain().offset, v[r]};
      else if constexpr (has_zeros)
        rows[r / 2][r % 2] = F::row(__byte_perm(v[r], 0, 0x3232), __byte_perm(v[r], 0, 0x1010));
      else
        rows[r / 2][r % 2] = F::row(__byte_perm(v[r / 2], 0, r % 2 ? 0x3232 : 0x1010));
  }
};

// Half a step: the weights in `a` by that half of x; `done` is told what was multiplied.
template <class F, class Done>
__device__ __forceinline__ void multiply(Sums& sum, const u32 (&a)[tiles_n][4], const StepX& x,
                                         int part, const Done& done) {
#pragma unroll
  for (int j0 = 0; j0 < tiles_m; j0 += share)
#pragma unroll
    for (int i = 0; i < tiles_n; ++i) {
#pragma unroll
      for (int j = j0; j < j0 + share; ++j)
        mma(sum.y[i][j], a[i], x.r + j * regs_x + 2 * part, sum.y[i][j], X{});
      done(j0, i);
    }
}

template <class F>
__device__ __forceinline__ void sum_ahead(const Params& p, char* entries, i64 n0, Ring& ring,
                                          const ReaderW& read_w, const ReaderX& read_x, i64 k_begin,
                                          int num_tiles, Sums& sum) {
  GroupTable<F> table(p, entries, n0, k_begin);
  RowScales<F> rows;
  // A register: the compiler would make a constant anew for every use.
  const u32 factors = F::factors | u32(p.n >> 63);
  StepW w;
  StepX x[x_ahead ? 2 : 1];
  u32 a[2][tiles_n][4];
  auto decode = [&](int part, int i) {
    F::template half<scaled>(a[part][i], w.r + i * regs_w, part, factors, rows.rows[i]);
  };
  ring.wait();
  rows.take(table, 0);
  read_w.load<tiles_n * regs_w>(w.r, ring.from, 0);
  read_x.load<tiles_m * regs_x>(x[0].r, ring.from, 0);
#pragma unroll
  for (int i = 0; i < tiles_n; ++i) decode(0, i);
#pragma unroll 1
  for (int tile = 0; tile < num_tiles; ++tile)
    each_step([&](auto at) {
      constexpr int s = at.value, next = (s + 1) % steps;
      if constexpr (scaled) table.write_next(p, s);
      if constexpr (s == steps - 1) ring.advance();
      StepX& x_now = x[x_ahead ? s % 2 : 0];
      StepX& x_next = x[x_ahead ? 1 - s % 2 : 0];
      const bool new_group = scaled && (s == steps - 1 ? table.next() : of_span);
      if constexpr (x_ahead) read_x.template load<tiles_m * regs_x>(x_next.r, ring.from, next);
      multiply<F>(sum, a[0], x_now, 0, [&](int j0, int i) {
        if (j0 > 0) return;
        decode(1, i);
        if (i < tiles_n - 1) return;
        read_w.template load<tiles_n * regs_w>(w.r, ring.from, next);
        ring.template fill<next, steps>();
      });
      multiply<F>(sum, a[1], x_now, 1, [&](int j0, int i) {
        if (j0 == tiles_m - share) {
          if (i == 0 && new_group) rows.take(table, next);
          decode(0, i);
        }
        if constexpr (!x_ahead)
          if (i == tiles_n - 1)
            read_x.template load<share * regs_x>(x_next.r + j0 * regs_x, ring.from, next, j0);
      });
    });
}
