// The ring of gemm.cu: tiles of K on their way from memory to shared memory, and from there, step by
// step, into registers.
#pragma once
#include "gemm_tile.cuh"

// A tile of rows in shared memory, kept in 16-byte chunks. A warp reads eight rows `period` apart at
// a time, of each `read` neighbouring chunks; the chunks of a 128-byte line are permuted (XOR) so
// that such a read touches every bank once.
template <class Kind, int rows_, int block_k, int read, int stride> struct SmemTile {
  static constexpr int rows = rows_;
  static constexpr int row_bytes = block_k * Kind::bits / 8;
  static constexpr int bytes = rows * row_bytes;
  static constexpr int chunks = row_bytes / 16;  // of a row
  static constexpr int rows_per_line = chunks < 8 ? 8 / chunks : 1;
  static constexpr int period = stride > rows_per_line ? stride : rows_per_line;
  static_assert(row_bytes % 16 == 0 && (chunks & (chunks - 1)) == 0 && chunks >= read,
                "block_k must make a row of the tile a power-of-two number of 16-byte chunks");

  static __device__ __forceinline__ constexpr u32 swizzle(int row) {
    return (row / period * read & 7) << 4;
  }
  static __device__ __forceinline__ u32 chunk_offset(int row, int chunk) {
    return (row * row_bytes + chunk * 16) ^ swizzle(row);
  }
};

// A word of which `inside` bytes, if less than four, may be read; the others are zero
__device__ __forceinline__ u32 word_at(const char* from, int inside) {
  if (inside >= 4) return *reinterpret_cast<const u32*>(from);
  u32 v = 0;
#pragma unroll
  for (int b = 0; b < 3; ++b)
    if (b < inside) v |= u32(static_cast<unsigned char>(from[b])) << 8 * b;
  return v;
}

// Fills one tile after another along the rows of a row-major matrix. A thread copies the same
// 16-byte column of every row_step-th row, so that it keeps no more than a pointer and two counts.
// Past the end of a row it writes zeros; what it writes for rows past the last does not matter, since
// nothing that comes of them is stored. `aligned`: rows start and end on 16-byte boundaries.
template <class Tile, int threads, bool aligned> struct TileFiller {
  static constexpr int row_step = threads / Tile::chunks;
  static constexpr int copies = (Tile::rows + row_step - 1) / row_step;
  static_assert(threads % Tile::chunks == 0 && row_step % Tile::period == 0 &&
                    (row_step & (row_step - 1)) == 0,
                "the swizzles of a thread's rows differ by the bits of their number");

  const char* from;
  i64 step_bytes;
  u32 to;
  int rows_left, bytes_left;  // of the matrix from this thread's first row and column on

  __device__ __forceinline__ TileFiller(u32 smem, const char* gmem, i64 stride, i64 row0,
                                        i64 matrix_rows, int byte0, int matrix_bytes) {
    const int row = threadIdx.x / Tile::chunks, chunk = threadIdx.x % Tile::chunks;
    from = gmem + (row0 + row) * stride + byte0 + chunk * 16;
    step_bytes = row_step * stride;
    to = smem + Tile::chunk_offset(row, chunk);
    rows_left = int(min(i64(Tile::rows), matrix_rows - row0)) - row;
    bytes_left = matrix_bytes - byte0 - chunk * 16;
  }

  // The part-th of `parts` shares of a tile, `stage` bytes from the first one's place. Here it is to be
  // few instructions, measured: a test in `advance` of what is left of the rows took 2 % longer.
  template <int part, int parts> __device__ __forceinline__ void fill(u32 stage) const {
    const int rows = bytes_left > 0 ? rows_left : 0;
#pragma unroll
    for (int i = copies * part / parts; i < copies * (part + 1) / parts; ++i) {
      const u32 at = ((to + stage) ^ Tile::swizzle(i * row_step)) + i * row_step * Tile::row_bytes;
      const char* row = from + i * step_bytes;
      if constexpr (aligned) {
        if (Tile::rows % row_step == 0 || threadIdx.x / Tile::chunks + i * row_step < Tile::rows)
          cp_async_16(at, row, i * row_step >= rows);
      } else {
        if (i * row_step < rows_left) copy_words(at, row);
      }
    }
  }
  __device__ __forceinline__ void advance() {
    from += Tile::row_bytes;
    bytes_left -= Tile::row_bytes;
  }

  __device__ __forceinline__ void copy_words(u32 to, const char* from) const {
    // aligned words, each of which holds a byte that is wanted, shifted into place
    const int valid = bytes_left, skew = int(reinterpret_cast<unsigned long long>(from) & 3);
    const int inside = valid > 0 ? valid + skew : 0;
    u32 v[5];
#pragma unroll
    for (int i = 0; i < 5; ++i) v[i] = word_at(from - skew + 4 * i, inside - 4 * i);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int left = valid - 4 * i;
      v[i] = __funnelshift_r(v[i], v[i + 1], 8 * skew);
      if (left < 4) v[i] &= left <= 0 ? 0u : (1u << 8 * left) - 1;
    }
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]),
                 "r"(v[3])
                 : "memory");
  }
};

using TileX = SmemTile<X, block_m, block_k, F::matrix_x ? 1 : F::words_x, 1>;
using TileW = SmemTile<W, block_n, block_k, F::matrix_w ? 1 : F::words_w, lane_rows>;
constexpr int stage_bytes = TileX::bytes + TileW::bytes, ring_bytes = num_stages * stage_bytes;

template <int value_> struct Int { static constexpr int value = value_; };

template <int s = 0, class Body> __device__ __forceinline__ void each_step(const Body& body) {
  if constexpr (s < steps) {
    body(Int<s>{});
    each_step<s + 1>(body);
  }
}

// The stages of a block: which one is filled next, and which is read
struct Ring {
  TileFiller<TileW, threads, Config::aligned> w;
  TileFiller<TileX, threads, Config::aligned> x;
  u32 to = 0, from = 0;

  __device__ __forceinline__ Ring(const Params& p, u32 smem, i64 n0, i64 m0, i64 k_begin, i64 k_end)
      : w(smem, p.w, p.w_stride, n0, p.n, int(k_begin * W::bits / 8),
          int((k_end * W::bits + 7) / 8)),
        x(smem + TileW::bytes, p.x, p.x_stride, m0, p.m, int(k_begin * X::bits / 8),
          int((k_end * X::bits + 7) / 8)) {
#pragma unroll 1
    for (int s = 0; s < num_stages - 1; ++s) fill<0, 1>();
    fill<0, steps>();
  }
  // A share of a stage; the last one closes the copy group, an empty one past the end of K.
  template <int part, int parts> __device__ __forceinline__ void fill() {
    w.template fill<part, parts>(to);
    x.template fill<part, parts>(to);
    if constexpr (part == parts - 1) {
      w.advance();
      x.advance();
      to = after(to);
      cp_async_commit();
    }
  }
  // The next stage to read: wait until all threads have filled it, and read the one before.
  __device__ __forceinline__ void advance() {
    wait();
    from = after(from);
  }
  __device__ __forceinline__ void wait() const {
    cp_async_wait<num_stages - 2>();
    __syncthreads();
  }
  static __device__ __forceinline__ u32 after(u32 stage) {
    return stage == (num_stages - 1) * stage_bytes ? 0 : stage + stage_bytes;
  }
};

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

// What a lane holds of W for one step of k, and of X
constexpr int regs_w = 2 * F::words_w, regs_x = F::words_x;  // of an MMA tile
struct StepW { u32 r[tiles_n * regs_w]; };
struct StepX { u32 r[tiles_m * regs_x]; };

// Where registers are short, the next step's X takes the place of this step's, share by share, as
// soon as those have met all of W.
constexpr int registers_ahead =
    tiles_n * tiles_m * (direct ? 4 : 8) + 2 * tiles_n * regs_w + 2 * tiles_m * regs_x;
constexpr bool x_ahead = registers_ahead <= 176;
constexpr bool w_ahead = sizeof(F::A) == 4 * regs_w;  // else the decoded rows leave theirs free
// Token tiles that meet all of W before the next do: measured, docs/notes/kernels.md
constexpr int wanted_share = decodes_ahead && W::bits == 4  ? 8
                             : X::bits < 16 && tiles_n == 4 ? 2
                                                            : 4;
constexpr int share = x_ahead || tiles_m % wanted_share ? tiles_m : wanted_share;
