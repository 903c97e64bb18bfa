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
#include "fragments.cuh"
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

constexpr bool wide_steps = grouping <= tile_groups && block_k >= 128;
using F = Fragments<X, W, wide_steps>;
constexpr int steps = block_k / F::step_k;  // of a tile of K
static_assert(steps % 2 == 0, "two register buffers take turns");

// Which row of W is which row of an MMA is free: a lane's rows, lane / 4 and lane / 4 + 8 of each
// MMA tile, are lane_rows neighbours in W, so that it writes neighbours in the output.
constexpr int lane_rows = 2 * tiles_n;
using TileX = SmemTile<X, block_m, block_k, F::matrix_x ? 1 : F::words_x, 1>;
using TileW = SmemTile<W, block_n, block_k, F::matrix_w ? 1 : F::words_w, lane_rows>;
constexpr int stage_bytes = TileX::bytes + TileW::bytes, ring_bytes = num_stages * stage_bytes;

// A group of one tile sums less than 2^22, so an integer sum that starts at the bits of 1.5 * 2^23
// is a float that needs a subtraction, not a conversion.
constexpr bool biased = grouping == tile_groups && same<Acc, int>::value;
static_assert(!biased || block_k <= 128, "|sum| <= 2^14 * 128 must stay below 2^22");

// What the accumulators of a group start from
struct Start {
  Acc v[4];
  __device__ __forceinline__ Start() {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int bits = 0;
      if (biased)
        asm volatile("mov.b32 %0, 0x4b400000;" : "=r"(bits));  // opaque: kept in registers
      v[e] = bits;
    }
  }
};
__device__ __forceinline__ float group_value(Acc v) {
  if constexpr (biased)
    return __int_as_float(v) - 12582912.f;
  else
    return value(v);
}

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

// Scales and zero points of a thread's rows, group after group
struct GroupScales {
  float s[tiles_n][2], z[tiles_n][2];
  const Scale* scale;  // of the thread's first row, inside the matrix
  const Zero* zero;
  u32 last;  // how many rows lie beyond it

  __device__ __forceinline__ GroupScales(const Params& p, i64 row0, int lane, i64 group) {
    const i64 row = min(row0 + lane / 4 * lane_rows, p.n - 1);
    last = u32(min(p.n - 1 - row, i64(block_n)));
    scale = static_cast<const Scale*>(p.scales) + row * p.scale_row + group * p.scale_group;
    zero = static_cast<const Zero*>(p.zeros) + row * p.zero_row + group * p.zero_group;
  }
  __device__ __forceinline__ void load(const Params& p) {
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const u32 beyond = min(u32(2 * i + h), last);
        s[i][h] = in_units_of_scale(scale[beyond * p.scale_row]);
        if constexpr (has_zeros) z[i][h] = in_units_of_zero(zero[beyond * p.zero_row]);
      }
  }
  __device__ __forceinline__ void load_next(const Params& p) {
    scale += p.scale_group;
    zero += p.zero_group;
    load(p);
  }
};

// total += s * (sums - z * xsum), and the same for the rows' own sums; `count` k entered the sums.
// One scale a row needs no running total: then it is total = ...
__device__ __forceinline__ void flush(Totals& total, const Sums& sum, const GroupScales& g,
                                      int count) {
#pragma unroll
  for (int i = 0; i < tiles_n; ++i) {
#pragma unroll
    for (int j = 0; j < tiles_m; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float v = group_value(sum.y[i][j][e]);
        if constexpr (has_zeros) v -= g.z[i][e / 2] * group_value(sum.x[j][e % 2]);
        v *= g.s[i][e / 2];
        total.y[i][j][e] = grouping == channel ? v : total.y[i][j][e] + v;
      }
    if constexpr (has_a_zero)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float v = group_value(sum.w[i][2 * h]) * (P::unit_w / P::unit);
        if constexpr (has_zeros) v -= g.z[i][h] * float(count);
        v *= g.s[i][h];
        total.w[i][h] = grouping == channel ? v : total.w[i][h] + v;
      }
  }
}

// Reads blocks of eight rows `Tile::stride` apart into registers: register `r` is word r % words of
// block r / words; but of two blocks, rows lane / 4 and lane / 4 + 8 of an MMA tile of W, the first
// word comes before the second, as the MMA wants them.
template <class Tile, bool matrix, int words, bool is_w> struct Reader {
  static constexpr int stride = is_w ? lane_rows : 1, next_block = is_w ? 1 : 8;  // rows
  u32 lane_at;

  __device__ __forceinline__ Reader(u32 tile, int row0, int lane) {
    int row = lane / 4 * stride, chunk = lane % 4 * words / 4, byte = lane % 4 * words * 4 % 16;
    if constexpr (matrix) {
      const int m = lane / 8;  // the matrix that this lane addresses
      const int block = words == 1 ? m : is_w ? m % 2 : m / 2;
      row = lane % 8 * stride + block % (is_w ? lane_rows : 4) * next_block;
      chunk = words == 1 ? 0 : is_w ? m / 2 : m % 2;
      byte = 0;
    }
    lane_at = tile + Tile::chunk_offset(row0 + row, chunk) + byte;
  }
  template <int count, int r = 0> static __device__ __forceinline__ void read(u32* v, u32 at) {
    if constexpr (r < count) {
      constexpr int rest = count - r, now = !matrix ? words : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
      constexpr int beyond = r / words * next_block * Tile::row_bytes;
      const u32 from = (at ^ (beyond & 127)) + (beyond & ~127);  // a line has one swizzle
      if constexpr (matrix)
        load_matrices<now>(v + r, from);
      else
        load_words<now>(v + r, from);
      read<count, r + now>(v, at);
    }
  }
  template <int count>
  __device__ __forceinline__ void load(u32* v, u32 stage, int step, int block = 0) const {
    read<count>(v,
                ((lane_at + stage) ^ (step * words << 4)) + block * next_block * Tile::row_bytes);
  }
};
using ReaderW = Reader<TileW, F::matrix_w, F::words_w, true>;
using ReaderX = Reader<TileX, F::matrix_x, F::words_x, false>;

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

// What a lane holds of W for one step of k, and of X
constexpr int regs_w = 2 * F::words_w, regs_x = F::words_x;  // of an MMA tile
struct StepW { u32 r[tiles_n * regs_w]; };
struct StepX { u32 r[tiles_m * regs_x]; };

// Where registers are short, the next step's X takes the place of this step's, share by share, as
// soon as those have met all of W.
constexpr int registers_ahead =
    tiles_n * tiles_m * (grouping == channel ? 4 : 8) + 2 * tiles_n * regs_w + 2 * tiles_m * regs_x;
constexpr bool x_ahead = registers_ahead <= 176;
constexpr bool w_ahead = sizeof(F::A) == 4 * regs_w;  // else the decoded rows leave theirs free
constexpr int share = x_ahead || tiles_m % 4 ? tiles_m : 4;  // token tiles

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
    if constexpr (has_zeros)
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

// Values made anew where they are needed: the main loop has no registers to keep them for what
// comes after it, and the compiler would.
__device__ __forceinline__ int anew(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Where this block's tile begins. Concurrent blocks share what they read: strips of `strip` token
// tiles, all rows of W in each.
struct Place {
  i64 m0, n0;
  __device__ __forceinline__ Place(const Params& p) {
    constexpr int strip = 2048 / block_m;
    const int tiles_of_m = anew(int((p.m + block_m - 1) / block_m)),
              tiles_of_n = anew(int((p.n + block_n - 1) / block_n)), tile = anew(blockIdx.x),
              first_m = tile / (strip * tiles_of_n) * strip,
              width = min(strip, tiles_of_m - first_m), within = tile - first_m * tiles_of_n;
    m0 = i64(first_m + within % width) * block_m;
    n0 = i64(within / width) * block_n;
  }
};

// What the epilogue needs of each token and each row, in shared memory behind the ring
struct Vectors {
  float factor[block_m], a_zero[block_m], bias[block_n];  // factor: alpha * a_scale

  __device__ __forceinline__ void fill(const Params& p, i64 n0, i64 m0) {
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
  }
};

template <int value_> struct Int { static constexpr int value = value_; };

template <int s = 0, class Body> __device__ __forceinline__ void each_step(const Body& body) {
  if constexpr (s < steps) {
    body(Int<s>{});
    each_step<s + 1>(body);
  }
}

// Sum this block's stripe [k_begin, k_end) of K: into `sum` if there is one scale a row, else into
// `total`. k_begin is a multiple of block_k.
__device__ __forceinline__ void mainloop(const Params& p, char* smem, Vectors& vectors, i64 n0,
                                         i64 m0, i64 k_begin, i64 k_end, Sums& sum, Totals& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_n = warp % warps_n, warp_m = warp / warps_n;
  const i64 row0 = n0 + warp_n * tiles_n * 16;
  const int num_tiles = int((k_end - k_begin + block_k - 1) / block_k);

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

  const u32 ring = smem_address(smem);
  TileFiller<TileW, threads, Config::aligned> fill_w(
      ring, p.w, p.w_stride, n0, p.n, int(k_begin * W::bits / 8), int((k_end * W::bits + 7) / 8));
  TileFiller<TileX, threads, Config::aligned> fill_x(ring + TileW::bytes, p.x, p.x_stride, m0, p.m,
                                                     int(k_begin * X::bits / 8),
                                                     int((k_end * X::bits + 7) / 8));
  if (num_tiles <= 0) fill_w.rows_left = fill_x.rows_left = 0;
  u32 filling = 0;
  // A share of a tile; the last one closes the copy group, an empty one past the end of K.
  auto fill_stage = [&](int tile, auto part, auto parts) {
    fill_w.template fill<part.value, parts.value>(filling);
    fill_x.template fill<part.value, parts.value>(filling);
    if constexpr (part.value == parts.value - 1) {
      fill_w.advance(tile + 1 < num_tiles);
      fill_x.advance(tile + 1 < num_tiles);
      filling = filling == (num_stages - 1) * stage_bytes ? 0 : filling + stage_bytes;
      cp_async_commit();
    }
  };

#pragma unroll 1
  for (int s = 0; s < num_stages - 1; ++s) fill_stage(s, Int<0>{}, Int<1>{});
  vectors.fill(p, n0, m0);
  const ReaderW read_w(ring, warp_n * tiles_n * 16, lane);
  const ReaderX read_x(ring + TileW::bytes, warp_m * tiles_m * 8, lane);
  StepW w[w_ahead ? 2 : 1];
  StepX x[x_ahead ? 2 : 1];
  u32 stage = 0;
  cp_async_wait<num_stages - 2>();
  __syncthreads();
  read_w.load<tiles_n * regs_w>(w[0].r, stage, 0);
  read_x.load<tiles_m * regs_x>(x[0].r, stage, 0);
#pragma unroll 1
  for (int tile = 0; tile < num_tiles; ++tile) {
    each_step([&](auto at) {
      constexpr int s = at.value;
      if constexpr (s == steps - 1) {
        cp_async_wait<num_stages - 2>();
        __syncthreads();
        stage = stage == (num_stages - 1) * stage_bytes ? 0 : stage + stage_bytes;
      }
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
      read_w.load<tiles_n * regs_w>(w[w_ahead ? 1 - s % 2 : 0].r, stage, next);
      if constexpr (x_ahead) read_x.load<tiles_m * regs_x>(x_next.r, stage, next);
      if constexpr (s < steps - 1) fill_stage(tile + num_stages - 1, at, Int<steps - 1>{});

      if constexpr (blank_x)
        if (k_end - k0 < F::step_k) blank_tail<tiles_m * regs_x, F::words_x, false>(x_now.r, valid);
      auto read_ahead = [&](int j) {
        if constexpr (!x_ahead) read_x.load<share * regs_x>(x_next.r + j * regs_x, stage, next, j);
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
  cp_async_wait<0>();
  if (grouping > tile_groups && k_end > group_begin)
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

// Scale, shift, round once, and write a lane's neighbouring rows of W for each of its tokens.
__device__ __forceinline__ void epilogue(const Params& p, const Vectors& vectors,
                                         const Totals& total) {
  const Place place(p);
  const i64 m0 = place.m0, n0 = place.n0;
  const int thread = anew(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int row = (warp % warps_n * 8 + lane / 4) * lane_rows;
  const int token0 = warp / warps_n * tiles_m * 8 + lane % 4 * 2;
  const i64 left = p.n - n0 - row;
  if (left <= 0) return;
  const bool whole = p.n % lane_rows == 0;  // the output is new, so a row starts aligned if N does
  Out* out = static_cast<Out*>(p.out) + (m0 + token0) * p.n + n0 + row;
#pragma unroll
  for (int j = 0; j < tiles_m; ++j)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int token = token0 + j * 8 + c;
      union {
        Out v[lane_rows];
        u32 words[lane_rows * sizeof(Out) / 4];
      } rounded;
#pragma unroll
      for (int i = 0; i < tiles_n; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float v = total.y[i][j][2 * h + c];
          if constexpr (has_a_zero) v -= vectors.a_zero[token] * total.w[i][h];
          v *= vectors.factor[token];
          if (p.bias) v += vectors.bias[row + 2 * i + h];
          store_rounded(&rounded.v[2 * i + h], v);
        }
      if (m0 + token < p.m) {
        Out* to = out + (j * 8 + c) * p.n;
        if (whole)
          store_global(to, rounded.words);
        else
#pragma unroll
          for (int i = 0; i < lane_rows; ++i)
            if (i < left) to[i] = rounded.v[i];
      }
    }
}

// One block an SM is enough for the compiler: it would rather spill than lose a second.
extern "C" __global__ void __launch_bounds__(threads, 1) gemm(const __grid_constant__ Params p) {
  extern __shared__ __align__(256) char smem[];
  const Place place(p);
  const i64 k_tiles = (p.k + block_k - 1) / block_k,
            per_stripe = (k_tiles + Config::split_k - 1) / Config::split_k;
  const i64 k_begin = min(i64(blockIdx.y) * per_stripe * block_k, p.k);
  const i64 k_end = min(k_begin + per_stripe * block_k, p.k);

  Vectors& vectors = *reinterpret_cast<Vectors*>(smem + ring_bytes);
  Sums sum;
  Totals total;
  clear(sum);
  if (grouping != channel) clear(total);
  mainloop(p, smem, vectors, place.n0, place.m0, k_begin, k_end, sum, total);
  if constexpr (Config::split_k > 1) {
    if constexpr (grouping == channel) {
      if (!add_stripes<Acc>(p, blockIdx.x, sum)) return;
    } else {
      if (!add_stripes<float>(p, blockIdx.x, total)) return;
    }
  }
  if constexpr (grouping == channel) {
    const int thread = anew(threadIdx.x), row = thread / 32 % warps_n * tiles_n * 16;
    GroupScales scales(p, Place(p).n0 + row, thread % 32, 0);
    clear(scales.s);
    clear(scales.z);
    if (p.k > 0) scales.load(p);  // an empty sum is zero, whatever the scale
    flush(total, sum, scales, int(p.k));
  }
  epilogue(p, vectors, total);
}
