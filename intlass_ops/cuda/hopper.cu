// The GEMM (formula in gemm.cu) on Hopper's own units: TMA fills a ring, wgmma empties it (sm_90a).
//
// A block is a few warpgroups. The first one's first thread is the producer: it copies tiles of W
// and X into the ring. The others are consumers: each owns 64 * tiles_n rows of W and all
// block_m tokens of the block's tile, with W as wgmma's A operand. INT8 weights under INT8
// activations go from shared memory straight to the tensor cores; all others become fragments in
// registers on the way, while the tensor cores work on the fragments before.
//
//     producer:   empty? -> TMA -> full          full/empty: one pair of mbarriers a stage
//     consumer:   full?  -> fragments, wgmma -> empty
//
// Blocks are persistent: each takes tile after tile. What a last, partly filled round of tiles would
// leave idle is shared out by k (`stream_k`): every block gets the same number of k tiles, and a
// block that begins a tile which others go on with adds their sums, in order, to its own.
//
// A lane's fragments hold the k that wgmma prescribes, two or four neighbours at a time; in a row
// of plain bytes these lie in every fourth piece of 1, 2 or 4 bytes, so the lanes of a quad read the
// same words and each picks its own pieces with one PRMT.
#include "hopper.cuh"
#include "problem.cuh"

constexpr int block_m = Config::block_m, tiles_n = Config::tiles_n, num_stages = Config::num_stages;
constexpr int consumers = Config::consumers, block_n = consumers * tiles_n * 64, block_k = 128;
constexpr bool from_registers = !(same<X, s8>::value && same<W, s8>::value);
constexpr int values = block_m / 2;  // of a thread, for one row tile of 64
// The launch gives all threads the same registers; the consumers then take what the producer leaves.
// A single consumer has two blocks on an SM, which hide each other's latencies.
constexpr int threads = 128 * (consumers + 1), blocks_per_sm = consumers == 1 ? 2 : 1;
constexpr int consumer_registers = consumers == 1 ? 208 : has_zeros ? 232 : 240;
constexpr int producer_registers = consumer_registers == 240 ? 24 : 40;
static_assert(consumers == 1 || consumers == 2, "the registers of an SM are shared out for 1 or 2");
static_assert(block_m % 16 == 0 && block_m <= 256, "wgmma takes up to 256 tokens");
static_assert(!has_a_zero, "a zero point of the activations needs row sums, which gemm.cu forms");

// A stage: X in columns of 128 bytes, W, and per group the sums of the tokens
constexpr int x_columns = block_k * X::bits / 1024, x_column_bytes = block_m * 128;
constexpr int x_bytes = x_columns * x_column_bytes;
constexpr int w_row_bytes = block_k * W::bits / 8, w_bytes = block_n * w_row_bytes;
constexpr int flushes = Config::groups_per_tile;  // in a tile of K, at least one
constexpr int sum_bytes = has_zeros ? flushes * block_m * 4 : 0;
constexpr int stage_bytes = (x_bytes + w_bytes + sum_bytes + 1023) / 1024 * 1024;
constexpr int barriers_bytes = 1024;

// Fragments come in chunks: 16 bytes of a row of W
constexpr int steps = x_columns * 4, chunks = from_registers ? w_row_bytes / 16 : steps;
constexpr int chunk_steps = steps / chunks;
[[maybe_unused]] constexpr int chunks_per_flush = chunks / flushes;
static_assert(steps % chunks == 0, "a chunk of W is one or two steps of wgmma");

// What a thread keeps of its rows and tokens: one accumulator for each row tile if there is one scale
// a row, else one that is emptied into the totals group by group
constexpr int acc_tiles = grouping == channel ? tiles_n : 1;
struct Sums { Acc acc[acc_tiles][values]; };
struct Totals { float acc[grouping == channel ? 1 : tiles_n][values]; };

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
struct Segment { int tile, begin, end; };  // k tiles [begin, end) of a tile

// How the tiles are shared out: config.Hopper.shares
struct Shares {
  int of_m, of_n, k_tiles;
  int whole;        // tiles that are shared out whole
  int each, extra;  // k tiles of the others for every block; the first `extra` get one more

  __device__ __forceinline__ int first_unit(int block) const {
    return block * each + min(block, extra);
  }
  __device__ __forceinline__ void locate(int tile, int& m0, int& n0) const {
    constexpr int raster = Config::raster;
    const int first = tile / (raster * of_n) * raster, height = min(raster, of_m - first);
    const int within = tile - first * of_n;
    m0 = (first + within % height) * block_m;
    n0 = within / height * block_n;
  }
};

// A block's place in the order of k of the shared tiles. The order of launch is the other way round: a
// block waits only for such as were launched before it, so all get on, however few run at a time.
__device__ __forceinline__ int place() { return gridDim.x - 1 - blockIdx.x; }

// What a block does, one segment after another
struct Schedule {
  int tile = blockIdx.x;  // the next one to take whole
  int done = 0;           // k tiles of the shared ones

  __device__ __forceinline__ bool next(const Shares& shares, Segment& s) {
    if (tile < shares.whole) {
      s = {tile, 0, shares.k_tiles};
      tile += gridDim.x;
      return true;
    }
    if constexpr (!Config::stream_k) return false;
    const int unit = shares.first_unit(place()) + done;
    const int left = shares.first_unit(place() + 1) - unit;
    s.tile = shares.whole + unit / shares.k_tiles, s.begin = unit % shares.k_tiles;
    s.end = min(shares.k_tiles, s.begin + left);
    done += s.end - s.begin;
    return left > 0;
  }
};

struct Ring {
  u32 base, barriers;
  int stage = 0, phase = 0;
  __device__ __forceinline__ u32 full() const { return barriers + stage * 8; }
  __device__ __forceinline__ u32 empty() const { return barriers + (num_stages + stage) * 8; }
  __device__ __forceinline__ u32 data() const { return base + stage * stage_bytes; }
  __device__ __forceinline__ void advance() {
    if (++stage == num_stages) stage = 0, phase ^= 1;
  }
};

__device__ __forceinline__ void produce(const Shares& shares, const TensorMap& w_map,
                                        const TensorMap& x_map, const char* x_sums, i64 x_sums_row,
                                        Ring ring) {
  Schedule schedule;
  for (Segment s; schedule.next(shares, s);) {
    int m0, n0;
    shares.locate(s.tile, m0, n0);
#pragma unroll 1
    for (int kt = s.begin; kt < s.end; ++kt, ring.advance()) {
      barrier_wait(ring.empty(), ring.phase ^ 1);
      barrier_expect(ring.full(), x_bytes + w_bytes + sum_bytes);
      const u32 data = ring.data();
      tma_load(data + x_bytes, w_map, kt * w_row_bytes, n0, ring.full());
#pragma unroll
      for (int c = 0; c < x_columns; ++c)
        tma_load(data + c * x_column_bytes, x_map, (kt * x_columns + c) * 128, m0, ring.full());
      if constexpr (has_zeros)
#pragma unroll
        for (int f = 0; f < flushes; ++f)
          bulk_load(data + x_bytes + w_bytes + f * block_m * 4,
                    x_sums + (i64(kt * flushes + f) * x_sums_row + m0) * 4, block_m * 4,
                    ring.full());
    }
  }
}

// How a lane finds its pieces of k in a word of W: four neighbours, or two
template <class X, class W> struct Pieces {
  static constexpr bool whole_chunk = X::bits == 16 && W::bits == 4;  // a byte of each word
  u32 selector;

  __device__ __forceinline__ Pieces(u32 quarter) {
    const u32 b = whole_chunk ? quarter : quarter % 2 * 2;
    selector = whole_chunk    ? b | (b + 4) << 8
               : W::bits == 4 ? (b + 4) | b << 4 | (b + 5) << 8 | (b + 1) << 12
                              : b | (b + 1) << 8;
  }
  // One register of wgmma's A
  __device__ __forceinline__ u32 fragment(u32 w) const {
    if constexpr (X::bits == 8) {
      return xor_and(__byte_perm(w, w << 4, selector), same<W, u4>::value ? 0x80808080u : 0u,
                     0xf0f0f0f0);
    } else if constexpr (W::bits == 8) {
      return Int8Float16Pair<X>::even_bytes(__byte_perm(w, 0, selector));
    } else {
      using C = half_words<X>;
      constexpr u32 flip = C::magic ^ (same<W, s4>::value ? 0x00080008u : 0u);
      return fma2<X>(and_xor(__byte_perm(w, w >> 4, selector), 0x000f000f, flip), C::one,
                     C::minus_offset4);
    }
  }
};

// One chunk of a lane's two rows, as stored, and the lane's place in a tile of W
struct Chunk { u32 lo[2 * chunk_steps], hi[2 * chunk_steps]; };

struct Lane {
  int row, quarter, swizzle;
  Pieces<X, W> pieces;

  __device__ __forceinline__ Lane(int lane, int warp)
      : row(warp * 16 + lane / 4), quarter(lane % 4), pieces(lane % 4) {
    swizzle = w_row_bytes == 64 ? row / 2 % 4 : row % 8;
  }
  __device__ __forceinline__ Chunk load(const char* tile, int i, int chunk) const {
    Chunk c;
    const char* at = tile + (i * 64 + row) * w_row_bytes + ((chunk ^ swizzle) << 4);
    load_row(c.lo, at);
    load_row(c.hi, at + 8 * w_row_bytes);
    return c;
  }
  __device__ __forceinline__ void load_row(u32 (&v)[2 * chunk_steps], const char* at) const {
    if constexpr (Pieces<X, W>::whole_chunk) {
      load_shared(v, at);
    } else {
      v[0] = *reinterpret_cast<const u32*>(at + quarter / 2 * 4);
      v[1] = *reinterpret_cast<const u32*>(at + quarter / 2 * 4 + 8);
    }
  }
  __device__ __forceinline__ void fragments(u32 (&a)[chunk_steps][4], const Chunk& c) const {
#pragma unroll
    for (int t = 0; t < chunk_steps; ++t) {
      a[t][0] = pieces.fragment(c.lo[2 * t]);
      a[t][1] = pieces.fragment(c.hi[2 * t]);
      a[t][2] = pieces.fragment(c.lo[2 * t + 1]);
      a[t][3] = pieces.fragment(c.hi[2 * t + 1]);
    }
  }
};

template <class T> __device__ __forceinline__ void pin_all(T (&v)[values]) {
#pragma unroll
  for (int e = 0; e < values; ++e) pin(v[e]);
}

// Scales and zero points of a thread's rows for the groups of one tile of K, as stored: converting
// them is left until they are used, so that nothing waits for their way from memory.
struct TileScales {
  Scale s[tiles_n][flushes][2];
  Zero z[has_zeros ? tiles_n : 1][flushes][2];
};

// Where a thread's rows have their scales; groups come one after another.
struct ScaleReader {
  const Scale* scales;
  const Zero* zeros;
  int last_row;  // of W, relative to the thread's first
  int tiles_per_group, tiles_left;

  __device__ __forceinline__ ScaleReader(const Params& p, i64 row0, int lane, int kt) {
    const i64 first = row0 + lane / 4;
    // whole groups per tile or whole tiles per group: config.why_not_hopper
    tiles_per_group = flushes > 1 ? 1 : int((min(p.group_size, p.k) + block_k - 1) / block_k);
    const int group = flushes > 1 ? kt * flushes : kt / tiles_per_group;
    tiles_left = tiles_per_group - kt % tiles_per_group;
    last_row = int(p.n - 1 - first);
    scales = static_cast<const Scale*>(p.scales) + first * p.scale_row + group * p.scale_group;
    if constexpr (has_zeros)
      zeros = static_cast<const Zero*>(p.zeros) + first * p.zero_row + group * p.zero_group;
  }
  // The groups of this tile of K; then go on to the next
  __device__ __forceinline__ void read(const Params& p, TileScales& to, int groups_left) {
#pragma unroll
    for (int f = 0; f < flushes; ++f)
#pragma unroll
      for (int i = 0; i < tiles_n; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          // past the last group the sums are zero, and must meet a number
          const int row = min(i * 64 + h * 8, last_row), group = min(f, groups_left - 1);
          to.s[i][f][h] = scales[row * p.scale_row + group * p.scale_group];
          if constexpr (has_zeros) to.z[i][f][h] = zeros[row * p.zero_row + group * p.zero_group];
        }
    if (--tiles_left == 0) {
      tiles_left = tiles_per_group;
      scales += flushes * p.scale_group;
      if constexpr (has_zeros) zeros += flushes * p.zero_group;
    }
  }
};

// total += s * (acc - z * xsum)
__device__ __forceinline__ void flush(float (&total)[values], const Acc (&acc)[values],
                                      const Scale (&scales)[2], const Zero (&zeros)[2], u32 sums,
                                      int lane) {
  float s[2], z[2] = {0, 0};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    s[h] = in_units_of_scale(scales[h]);
    if constexpr (has_zeros) z[h] = in_units_of_zero(zeros[h]);
  }
#pragma unroll
  for (int j = 0; j < values / 4; ++j) {
    float x[2] = {0, 0};
    if constexpr (has_zeros) {
      const float2 t = load_shared_float2(sums + (j * 8 + lane % 4 * 2) * 4);
      x[0] = t.x, x[1] = t.y;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float v = value(acc[j * 4 + e]);
      if constexpr (has_zeros) v -= z[e / 2] * x[e % 2];
      total[j * 4 + e] += s[e / 2] * v;
    }
  }
}

// Done with a stage: tell the producer, one thread of every warp
__device__ __forceinline__ void release(u32 empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(empty);
}

// Sum a segment's k tiles: into `sum` if there is one scale a row, else into `total`.
__device__ __forceinline__ void mainloop(const Params& p, Ring& ring, const Segment& segment,
                                         i64 row0, int wg_row0, int lane, int warp, Sums& sum,
                                         Totals& total) {
  const Lane own(lane, warp);
  u32 previous = 0;  // the stage before this one, which wgmma may still be reading
  u32 a[2][chunk_steps][4];
  ScaleReader reader(p, row0, lane, segment.begin);
  TileScales scales, next;
  const int groups = int((p.k - 1) / p.group_size) + 1;
  auto groups_left = [&](int kt) { return flushes > 1 ? groups - kt * flushes : 1; };
  if (grouping != channel && segment.begin < segment.end)
    reader.read(p, next, groups_left(segment.begin));
#pragma unroll 1
  for (int kt = segment.begin; kt < segment.end; ++kt) {
    if constexpr (grouping != channel) {
      scales = next;
      if (kt + 1 < segment.end) reader.read(p, next, groups_left(kt + 1));
    }
    barrier_wait(ring.full(), ring.phase);
    const u32 x = ring.data(), w = x + x_bytes + wg_row0 * w_row_bytes;
    const u64 x_tile = tile_descriptor(x);
    auto x_step = [&](int s) { return x_tile + (s / 4 * x_column_bytes + s % 4 * 32) / 16; };

    if constexpr (!from_registers) {
      const u64 w_tile = tile_descriptor(w);
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < steps; ++s)
#pragma unroll
        for (int i = 0; i < tiles_n; ++i)
          wgmma(sum.acc[i], w_tile + (i * 64 * w_row_bytes + s * 32) / 16, x_step(s), true);
      wgmma_commit();
      wgmma_wait<1>();
      if (kt > segment.begin) release(previous);
    } else {
      const char* tile = static_cast<const char*>(__cvta_shared_to_generic(w));
      constexpr int turns = chunks * tiles_n;
      // one scale a row: the row tiles take turns at each chunk; groups: a row tile runs to its end
      auto chunk_of = [](int t) { return grouping == channel ? t / tiles_n : t % chunks; };
      auto tile_of = [](int t) { return grouping == channel ? t % tiles_n : t / chunks; };
      Chunk raw = own.load(tile, 0, 0);
#pragma unroll
      for (int t = 0; t < turns; ++t) {
        const int c = chunk_of(t), i = tile_of(t);
        own.fragments(a[t % 2], raw);
        if (t + 1 < turns) raw = own.load(tile, tile_of(t + 1), chunk_of(t + 1));
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < chunk_steps; ++s)
          wgmma(sum.acc[grouping == channel ? i : 0], a[t % 2][s], x_step(c * chunk_steps + s),
                grouping == channel || c % chunks_per_flush != 0 || s != 0);
        wgmma_commit();
        if (grouping != channel && (c + 1) % chunks_per_flush == 0) {
          wgmma_wait<0>();
          pin_all(sum.acc[0]);
          const int f = c / chunks_per_flush;
          flush(total.acc[i], sum.acc[0], scales.s[i][f], scales.z[has_zeros ? i : 0][f],
                x + x_bytes + w_bytes + f * block_m * 4, lane);
          pin_all(sum.acc[0]);
        } else if (t + 1 < turns) {
          wgmma_wait<1>();
        } else {
          wgmma_wait<0>();  // ptxas cannot follow the fragments around the loop: it would serialise
        }
      }
      release(ring.empty());
    }
    previous = ring.empty();
    ring.advance();
  }
  if constexpr (!from_registers) {
    wgmma_wait<0>();
    if (segment.end > segment.begin) release(previous);
  }
#pragma unroll
  for (int i = 0; i < acc_tiles; ++i) pin_all(sum.acc[i]);
}

// ---- the way out --------------------------------------------------------------------------------
constexpr int slab = block_m % 64 == 0   ? 64
                     : block_m % 32 == 0 ? 32
                                         : 16;  // tokens staged at a time
constexpr int pitch = 64 * sizeof(Out) + 16;
constexpr int vector = 16 / sizeof(Out);
constexpr int staging_bytes = slab * pitch + block_m * 4;  // of a warpgroup, with a factor a token

__device__ __forceinline__ u32 packed(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const u32&>(v);
}
__device__ __forceinline__ u32 packed(float, float, float) { return 0; }  // fp32 is not packed
__device__ __forceinline__ u32 packed(float a, float b, __half) {
  const __half2 v = __floats2half2_rn(a, b);
  return reinterpret_cast<const u32&>(v);
}

// 16 bytes of the output, or what of them lies inside
__device__ __forceinline__ void store_vector(const Params& p, i64 m, i64 n, const Out* from) {
  Out* to = static_cast<Out*>(p.out) + m * p.n + n;
  if (p.n % vector == 0) {  // the output is freshly allocated, so its rows are aligned
    if (n < p.n) *reinterpret_cast<int4*>(to) = *reinterpret_cast<const int4*>(from);
  } else {
    for (int v = 0; v < vector && n + v < p.n; ++v) to[v] = from[v];
  }
}

// Scale, shift, round once, and write one warpgroup's rows through its own shared memory.
__device__ __forceinline__ void write_out(const Params& p, char* staging, int warpgroup, i64 m0,
                                          i64 row0, int lane, int warp, const Sums& sum,
                                          const Totals& total) {
  const int thread = warp * 32 + lane, quarter = lane % 4;
  float* factor = reinterpret_cast<float*>(staging + slab * pitch);
  const float alpha = alpha_of(p);
  for (int t = thread; t < block_m; t += 128)
    factor[t] = alpha * a_scale_of(p, min(m0 + t, p.m - 1));
  const u32 staged = smem_address(staging);
  warpgroup_sync(warpgroup);

#pragma unroll
  for (int i = 0; i < tiles_n; ++i) {
    float bias[2], scale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const i64 n = min(row0 + i * 64 + warp * 16 + h * 8 + lane / 4, p.n - 1);
      bias[h] = bias_of(p, n);
      scale[h] = grouping == channel ? scale_of(p, n, 0) : 1.f;
    }
    auto y = [&](int e, float f) {
      const int h = e % 4 / 2;
      float v;
      if constexpr (grouping == channel)
        v = scale[h] * value(sum.acc[i][e]);
      else
        v = total.acc[i][e];
      return v * f + bias[h];
    };
#pragma unroll
    for (int m1 = 0; m1 < block_m; m1 += slab) {
      if (m0 + m1 >= p.m) break;
#pragma unroll
      for (int j = 0; j < slab / 8; j += 2) {
        u32 v[4];
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int token = m1 + (j + b) * 8 + quarter * 2, e = (m1 / 8 + j + b) * 4;
          const float f0 = factor[token], f1 = factor[token + 1];
          if constexpr (sizeof(Out) == 2) {
            v[2 * b] = packed(y(e, f0), y(e + 1, f1), Out{});
            v[2 * b + 1] = packed(y(e + 2, f0), y(e + 3, f1), Out{});
          } else {
            float* at = reinterpret_cast<float*>(staging + ((j + b) * 8 + quarter * 2) * pitch) +
                        warp * 16 + lane / 4;
            constexpr int next = pitch / 4;
            at[0] = y(e, f0), at[next] = y(e + 1, f1);
            at[8] = y(e + 2, f0), at[next + 8] = y(e + 3, f1);
          }
        }
        if constexpr (sizeof(Out) == 2) {
          // blocks: (tokens j, rows 0-7) (j, 8-15) (j+1, 0-7) (j+1, 8-15); a lane addresses one token
          const int token = (j + lane / 16) * 8 + lane % 8;
          store_transposed(staged + token * pitch + warp * 32 + lane / 8 % 2 * 16, v);
        }
      }
      warpgroup_sync(warpgroup);
      constexpr int columns = 64 / vector;
#pragma unroll 2
      for (int r = thread / columns; r < slab; r += 128 / columns) {
        const int column = thread % columns * vector;
        if (m0 + m1 + r < p.m)
          store_vector(p, m0 + m1 + r, row0 + i * 64 + column,
                       reinterpret_cast<const Out*>(staging + r * pitch) + column);
      }
      warpgroup_sync(warpgroup);
    }
  }
}

// A shared tile: every block but its first leaves what it has summed, a thread's values `others` apart.
template <class T, int tiles>
__device__ __forceinline__ void leave(const Params& p, const T (&v)[tiles][values]) {
  constexpr int others = consumers * 128;
  uint4* slot = reinterpret_cast<uint4*>(p.workspace) +
                i64(place()) * (tiles * values / 4 * others) + threadIdx.x - 128;
#pragma unroll
  for (int i = 0; i < tiles; ++i)
#pragma unroll
    for (int e = 0; e < values; e += 4)
      __stcg(slot + (i * values + e) / 4 * others, reinterpret_cast<const uint4&>(v[i][e]));
  __threadfence();
  consumers_sync<consumers * 128>();
  if (threadIdx.x == 128) store_release(p.arrivals + place(), 1);
}

// Its first block adds them, in the order of k.
template <class T, int tiles>
__device__ __forceinline__ void add_others(const Params& p, const Shares& shares, int tile,
                                           T (&v)[tiles][values]) {
  constexpr int others = consumers * 128;
  const int end = (tile - shares.whole + 1) * shares.k_tiles;
#pragma unroll 1
  for (int block = place() + 1; shares.first_unit(block) < end; ++block) {
    if (shares.first_unit(block + 1) == shares.first_unit(block)) continue;
    if (threadIdx.x == 128) {
      while (!load_acquire(p.arrivals + block)) {}
      p.arrivals[block] = 0;  // for the next launch
    }
    consumers_sync<consumers * 128>();
    const uint4* slot = reinterpret_cast<const uint4*>(p.workspace) +
                        i64(block) * (tiles * values / 4 * others) + threadIdx.x - 128;
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
      for (int e = 0; e < values; e += 4) {
        const uint4 part = __ldcg(slot + (i * values + e) / 4 * others);
        const T* t = reinterpret_cast<const T*>(&part);
#pragma unroll
        for (int k = 0; k < 4; ++k) v[i][e + k] += t[k];
      }
  }
}

extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm)
    hopper(const __grid_constant__ Params p, const __grid_constant__ Shares shares,
           const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map,
           const char* x_sums, i64 x_sums_row) {
  extern __shared__ __align__(1024) char smem[];
  Ring ring{smem_address(smem) + barriers_bytes, smem_address(smem)};

  if (threadIdx.x == 0) {
    prefetch(w_map);
    prefetch(x_map);
#pragma unroll 1
    for (int s = 0; s < num_stages; ++s) {
      barrier_init(ring.barriers + s * 8, 1);
      barrier_init(ring.barriers + (num_stages + s) * 8, consumers * 4);
    }
    publish_barriers();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    give_registers<producer_registers>();
    if (threadIdx.x == 0) produce(shares, w_map, x_map, x_sums, x_sums_row, ring);
    return;
  }
  take_registers<consumer_registers>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, wg = threadIdx.x / 128 - 1;
  const int wg_row0 = wg * tiles_n * 64;
  Schedule schedule;
#pragma unroll 1
  for (Segment s; schedule.next(shares, s);) {
    int m0, n0;
    shares.locate(s.tile, m0, n0);
    Sums sum;
    Totals total;
#pragma unroll
    for (int i = 0; i < acc_tiles; ++i)
#pragma unroll
      for (int e = 0; e < values; ++e) sum.acc[i][e] = 0;
    if constexpr (grouping != channel)
#pragma unroll
      for (int i = 0; i < tiles_n; ++i)
#pragma unroll
        for (int e = 0; e < values; ++e) total.acc[i][e] = 0;
    mainloop(p, ring, s, n0 + wg_row0 + warp * 16, wg_row0, lane, warp, sum, total);
    if constexpr (Config::stream_k) {
      auto& result = Select<grouping == channel, Sums, Totals>::of(sum, total).acc;
      if (s.begin > 0) {
        leave(p, result);
        continue;
      }
      if (s.end < shares.k_tiles) add_others(p, shares, s.tile, result);
    }
    char* staging = smem + barriers_bytes + num_stages * stage_bytes + wg * staging_bytes;
    write_out(p, staging, wg + 1, m0, n0 + wg_row0, lane, warp, sum, total);
  }
}
