// What a lane of skinny_ring.cu asks for ahead of its use: the codes and scales of the rows that come
// next, and X as it becomes fragments. How shared memory is laid out, and how sums leave it.
#pragma once

constexpr bool lut4_in_shared = true;
#include "lut4_pairs.cuh"
#include "skinny.cuh"

constexpr int warps = Config::warps, threads = 32 * warps;
constexpr int groups = Config::groups, group_warps = warps / groups;
constexpr int tokens = Config::tokens, tiles_m = (tokens + column_tokens - 1) / column_tokens;
constexpr int num_stages = Config::num_stages;
constexpr int segment_chunks = Config::segment_k / chunk_k;
constexpr int pieces = 2 * tiles_n;  // of 16 bytes that a lane holds of a chunk: one a row
// rows whose scales a lane fetches: a quad's share them, but where each lane has a group of its own
constexpr int quad_rows = own_group ? pieces : (pieces + 3) / 4;
static_assert(Config::segment_k % chunk_k == 0, "a segment of K is whole chunks");
static_assert(warps % groups == 0 && groups < 16, "a group has a barrier of its own");

constexpr int at_once = spans_at_once<tiles_m>;

// Shared memory: ring, fragments of x, the warps' sums, and sums of earlier segments.
constexpr int stage_bytes = pieces * 512;
constexpr int ring_bytes = warps * num_stages * stage_bytes;
// With groups in columns a chunk of zeros comes last, for the lanes of other groups.
constexpr int chunk_frags = spans * tokens * 4;
constexpr int x_bytes = (segment_chunks + in_columns) * chunk_frags * int(sizeof(typename P::B));
constexpr int pitch = rows + 4;  // of the sums of a token; the first of the four is a sum of x
constexpr int slab = tokens * pitch;
constexpr int buffers = tokens > 8 ? 1 : 2;
constexpr int left = pieces * left_floats;  // floats of a warp's scales, handed round
static_assert(ring_bytes + x_bytes + (buffers * slab + left) * warps * 4 == Config::fixed_smem,
              "config/skinny_ring.py and the kernel disagree about shared memory");

// Scales that weights take, of the rows that a lane holds pieces of: of a chunk, and where they lie.
// Other kernels keep nothing of it.
struct Taken {
  LaneScales of_row[pieces];

  __device__ __forceinline__ bool wide() const {
    bool found = false;
#pragma unroll
    for (int i = 0; i < pieces; ++i) found |= of_row[i].wide();
    return found;
  }
};
struct TakenRows {
  ScaleRow scale_row[pieces];

  __device__ __forceinline__ void enter_rows(const Params& p, i64 n0, int quarter) {
#pragma unroll
    for (int i = 0; i < pieces; ++i) scale_row[i] = ScaleRow(p, min(n0 + i * 8, p.n - 1), quarter);
  }
  __device__ __forceinline__ void prefetch_taken(const Params& p, int chunk) const {
#pragma unroll
    for (int i = 0; i < pieces; ++i) scale_row[i].prefetch(p, chunk);
  }
  __device__ __forceinline__ void load_taken(Taken& to, const Params& p, int chunk) const {
#pragma unroll
    for (int i = 0; i < pieces; ++i) to.of_row[i] = scale_row[i].load(p, chunk);
  }
};
struct NothingTaken {
  __device__ __forceinline__ bool wide() const { return false; }
};
struct NoTakenRows {
  __device__ __forceinline__ void enter_rows(const Params&, i64, int) {}
  __device__ __forceinline__ void prefetch_taken(const Params&, int) const {}
  __device__ __forceinline__ void load_taken(NothingTaken&, const Params&, int) const {}
};

// How far a lane has come in asking for W: the row pointers of a tile, and a chunk of it.
struct Cursor : Select<scaled, TakenRows, NoTakenRows>::type {
  const char* w_row[pieces];
  const Scale* s_row[quad_rows];
  const Zero* z_row[quad_rows];
  int segment, tile, chunk, end;

  __device__ __forceinline__ void enter_tile(const Params& p, int lane) {
    const i64 n0 = i64(tile) * rows + lane / 4;
    const char* w = p.w + lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < pieces; ++i)  // a repeated row is never stored
      w_row[i] = w + min(n0 + i * 8, p.n - 1) * p.w_stride;
    enter_rows(p, n0, lane % 4);
    if constexpr (grouped)  // the lanes of a quad share out its rows
#pragma unroll
      for (int i = 0; i < quad_rows; ++i) {
        const int group = own_group ? group_of_lane(lane % 4) : 0;
        const i64 row = min(n0 + (own_group ? i : (i * 4 + lane % 4) % pieces) * 8, p.n - 1);
        s_row[i] = static_cast<const Scale*>(p.scales) + row * p.scale_row + group * p.scale_group;
        z_row[i] = static_cast<const Zero*>(p.zeros) + row * p.zero_row + group * p.zero_group;
      }
  }
};

struct Scales : Select<scaled, Taken, NothingTaken>::type {
  Scale s[quad_rows];
  Zero z[quad_rows];
};

// Row i's factor of word t of a chunk
template <class Row, class Scales>
__device__ __forceinline__ void take_factor(Row& row, const Scales& scales, bool wide, int i,
                                            int t) {
  if constexpr (scaled) row = scales.of_row[i].factor(t * LaneScales::count / spans, wide);
}

template <int count> __device__ __forceinline__ void group_sync(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(count) : "memory");
}

// Neighbouring rows of one token. Few outputs are better spread over many threads.
constexpr int width = tokens > 8 ? 4 : 1;
struct Rows {
  Sum v[width];
  __device__ __forceinline__ void add(const Sum* from) {
    u32 words[width];
    load_shared(words, reinterpret_cast<const char*>(from));
#pragma unroll
    for (int i = 0; i < width; ++i) v[i] += *reinterpret_cast<const Sum*>(&words[i]);
  }
  __device__ __forceinline__ void store(Sum* to) const {
#pragma unroll
    for (int i = 0; i < width; ++i) to[i] = v[i];
  }
};

__device__ __forceinline__ void finish(const Params& p, i64 n, int m, const Rows& y, Acc sum_x,
                                       float alpha) {
  const float factor = alpha * a_scale_of(p, m);
#pragma unroll
  for (int i = 0; i < width; ++i)
    if (n + i < p.n) finish(p, n + i, m, y.v[i], sum_x, factor);
}

// Eight k of every token become fragments, as many a thread as there are registers for.
constexpr int x_blocks = segment_chunks * chunk_k / 8;
constexpr int x_ahead = (x_blocks + threads - 1) / threads < 16 / tokens
                            ? (x_blocks + threads - 1) / threads
                            : (16 / tokens ? 16 / tokens : 1);
struct XBlock {
  u32 v[tokens][span_words<X>];
  unsigned char s[fp4_x ? tokens : 1];  // of FP4

  __device__ __forceinline__ void load(const Params& p, int k0) {
#pragma unroll
    for (int m = 0; m < tokens; ++m) {
      const char* from = p.x + min(i64(m), p.m - 1) * p.x_stride + i64(k0) * X::bits / 8;
      if (k0 < int(p.k)) {
        load_global(v[m], from);
      } else {
#pragma unroll
        for (int i = 0; i < span_words<X>; ++i) v[m][i] = 0;
      }
      if constexpr (fp4_x) {
        const i64 at = scale_at<Config::blocked>(min(i64(m), p.m - 1), p.a_scale_row,
                                                 min(k0, int(p.k) - 1) / block_size<Scale>);
        s[m] = static_cast<const unsigned char*>(p.a_scale)[at];
      }
    }
  }
  __device__ __forceinline__ void store(typename P::B* x_frags, int b) const {
    // word t of lane q of a quad (first_k), of chunk c
    const int t = spread ? b / 4 % spans : b % spans, q = spread ? b % 4 : b / spans % 4;
    const int c = b / spans / 4;
#pragma unroll
    for (int m = 0; m < tokens; ++m)
      x_frags[((c * spans + t) * tokens + m) * 4 + q] =
          token_fragment<P>(v[m], block_factor<Scale>(s[fp4_x ? m : 0]));
  }
};
