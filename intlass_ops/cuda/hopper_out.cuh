// From the sums of a block of hopper.cu to the output: by itself, or with those of other blocks that have
// summed other parts of K.
#pragma once
#include "hopper_weights.cuh"

// What a block writes: all tokens of its tile, or its part of a tile that a cluster shares
constexpr int tokens = block_m / split_k, outputs = tokens / 2;
constexpr int slab = Config::slab;  // tokens staged at a time
static_assert(slab % 16 == 0 && tokens % slab == 0, "slabs of whole pairs of token tiles");
constexpr int pitch = 64 * sizeof(Out) + 16;
constexpr int vector = 16 / sizeof(Out);
constexpr int staging_bytes = slab * pitch + tokens * 4;  // of a warpgroup, with a factor a token
// Tiles that stage so few of their tokens at a time that the barriers count write from registers, if a
// row of the output has whole pairs. With stream_k that is slower.
constexpr bool may_skip_staging =
    block_m == 256 && X::bits == 16 && sizeof(Out) == 2 && !Config::residual && !Config::stream_k;

__device__ __forceinline__ u32 packed(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const u32&>(v);
}
__device__ __forceinline__ u32 packed(float, float, float) { return 0; }  // fp32 is not packed
__device__ __forceinline__ u32 packed(float a, float b, __half) {
  const __half2 v = __floats2half2_rn(a, b);
  return reinterpret_cast<const u32&>(v);
}

// What the epilogue reads for a thread's rows, and for the tokens whose factors it leaves for all
constexpr int factors_of_thread = (tokens + 127) / 128;
struct RowVectors {
  float bias[tiles_n][2], scale[tiles_n][2], factor[factors_of_thread];

  __device__ __forceinline__ void read(const Params& p, i64 m0, i64 row0, int lane, int warp) {
    const float alpha = alpha_of(p) * sum_unit;
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const i64 n = min(row0 + i * 64 + warp * 16 + h * 8 + lane / 4, p.n - 1);
        bias[i][h] = bias_of(p, n);
        scale[i][h] = grouping == channel ? scale_of(p, n, 0) * code_unit : weight_unit;
      }
#pragma unroll
    for (int t = 0; t < factors_of_thread; ++t) {
      const int token = min(t * 128 + warp * 32 + lane, tokens - 1);
      factor[t] = alpha * a_scale_of(p, min(m0 + token, p.m - 1));
    }
  }
};
// Read before the main loop, whose registers they take, or after it
constexpr bool early_vectors = direct && !in_turns && !by_stages && !Config::stream_k &&
                               !(rest_by_k && (Config::residual || block_m == 128));

// Tokens that are staged at a time, and how the threads of a warpgroup share out their outputs. With a
// residual, which a thread asks for one such part ahead, they are so few that it stays in registers.
constexpr int part = Config::residual && slab > 32 ? 32 : slab;
constexpr int columns = 64 / vector, step = 128 / columns;

// Whether sums of integers, which started at first_sum, are near enough to be floats as they stand: one
// check saves a slow conversion of each.
__device__ __forceinline__ bool are_near(const float (&)[tiles_n][outputs]) { return true; }
__device__ __forceinline__ bool are_near(const int (&sums)[tiles_n][outputs]) {
  u32 far = 0;
#pragma unroll
  for (int i = 0; i < tiles_n; ++i)
#pragma unroll
    for (int e = 0; e < outputs; ++e) far |= u32(sums[i][e] ^ first_sum);
  return first_sum != 0 && far < 1u << 23;
}
// A thread's sums of a part as floats
constexpr int of_part = part / 2;
__device__ __forceinline__ void numbers(float (&v)[of_part], const float* sums, bool) {
#pragma unroll
  for (int e = 0; e < of_part; ++e) v[e] = sums[e];
}
__device__ __forceinline__ void numbers(float (&v)[of_part], const int* sums, bool near) {
  if (near) {
#pragma unroll
    for (int e = 0; e < of_part; ++e) v[e] = __int_as_float(sums[e]) - __int_as_float(first_sum);
  } else {
#pragma unroll
    for (int e = 0; e < of_part; ++e) v[e] = value(int(u32(sums[e]) - u32(first_sum)));
  }
}

// Turns a block of eight by eight numbers of 16 bits, of which a lane has two neighbours
__device__ __forceinline__ u32 transposed(u32 v) {
  u32 t;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(v));
  return t;
}
// A warpgroup's outputs straight from registers, 32 bytes of a token at a time
template <class T>
__device__ __forceinline__ void write_unstaged(const Params& p, const float* factor, i64 m0,
                                               i64 row0, int lane, int warp,
                                               const RowVectors& vectors,
                                               const T (&sums)[tiles_n][outputs]) {
  const int quarter = lane % 4;
  const bool near = are_near(sums);
  const i64 m = m0 + lane / 8 * 2;
#pragma unroll
  for (int i = 0; i < tiles_n; ++i) {
    const i64 n = row0 + i * 64 + warp * 16 + lane / 4 % 2 * 8 + quarter * 2;
    Out* to = static_cast<Out*>(p.out) + m * p.n + n;
    const int tokens_left = n < p.n ? int(min(i64(tokens), p.m - m)) : 0;
#pragma unroll
    for (int m1 = 0; m1 < tokens; m1 += part) {
      if (m0 + m1 >= p.m) break;
      float v[of_part];
      numbers(v, sums[i] + m1 / 2, near);
      auto y = [&](int e, float f) {
        const int h = e % 4 / 2;
        return output(direct ? vectors.scale[i][h] * v[e] : v[e], f, vectors.bias[i][h], Out());
      };
#pragma unroll
      for (int j = 0; j < part / 8; ++j, to += 8 * p.n) {
        const int token = m1 + j * 8, e = j * 4;
        const float* f = factor + token + quarter * 2;
        const u32 even = transposed(packed(y(e, f[0]), y(e + 2, f[0]), Out{}));
        const u32 odd = transposed(packed(y(e + 1, f[1]), y(e + 3, f[1]), Out{}));
        if (token < tokens_left) *reinterpret_cast<u32*>(to) = even;
        if (token + 1 < tokens_left) *reinterpret_cast<u32*>(to + p.n) = odd;
      }
    }
  }
}

// A thread's outputs of a part, tokens from m on and rows from n on, from where they are staged
__device__ __forceinline__ void store_part(const Params& p, const char* from, i64 m, i64 n) {
  Out* to = static_cast<Out*>(p.out) + m * p.n + n;
  const int tokens_left = n < p.n ? int(min(i64(part), p.m - m)) : 0;
  if (p.n % vector == 0) {  // the output is freshly allocated, so its rows are aligned
#pragma unroll
    for (int r = 0; r < part; r += step, to += step * p.n)
      if (r < tokens_left)
        *reinterpret_cast<int4*>(to) = *reinterpret_cast<const int4*>(from + r * pitch);
  } else {
#pragma unroll 1
    for (int r = 0; r < part && r < tokens_left; r += step, to += step * p.n)
      for (int v = 0; v < vector && n + v < p.n; ++v)
        to[v] = reinterpret_cast<const Out*>(from + r * pitch)[v];
  }
}

// A thread's values of the residual in a part
struct ResidualPart {
  uint4 v[part / step];

  // of tokens from m on and rows from n on
  __device__ __forceinline__ void ask(const Params& p, i64 m, i64 n) {
    const Out* from = residual_at(p, m, n);
#pragma unroll
    for (int r = 0; r < part / step; ++r)
      if (m + r * step < p.m && n < p.n)
        v[r] = *reinterpret_cast<const uint4*>(from + r * step * p.residual_row);
  }
  // to where the outputs will be staged
  __device__ __forceinline__ void put(char* to) const {
#pragma unroll
    for (int r = 0; r < part / step; ++r) *reinterpret_cast<uint4*>(to + r * step * pitch) = v[r];
  }
};

// Finish one warpgroup's rows, and write them through its own shared memory.
template <class T>
__device__ __forceinline__ void write_out(const Params& p, char* staging, int warpgroup, i64 m0,
                                          i64 row0, int lane, int warp, const RowVectors& vectors,
                                          const T (&sums)[tiles_n][outputs]) {
  const int thread = warp * 32 + lane, quarter = lane % 4;
  float* factor = reinterpret_cast<float*>(staging + slab * pitch);
#pragma unroll
  for (int t = 0; t < factors_of_thread; ++t)
    if (t * 128 + thread < tokens) factor[t * 128 + thread] = vectors.factor[t];
  const u32 staged = smem_address(staging);
  const bool near = are_near(sums);
  const int row = thread / columns, column = thread % columns * vector;
  char* own = staging + row * pitch + column * sizeof(Out);
  [[maybe_unused]] ResidualPart residual;
  if constexpr (Config::residual)
    residual.ask(p, m0 + row, row0 + column);
  else
    warpgroup_sync(warpgroup);
  if constexpr (may_skip_staging)
    if (p.n % 2 == 0) return write_unstaged(p, factor, m0, row0, lane, warp, vectors, sums);

#pragma unroll
  for (int i = 0; i < tiles_n; ++i) {
#pragma unroll
    for (int m1 = 0; m1 < tokens; m1 += part) {
      if (m0 + m1 >= p.m) break;
      float v[of_part];
      numbers(v, sums[i] + m1 / 2, near);
      auto y = [&](int e, float f, Out residual) {
        const int h = e % 4 / 2;
        return output(direct ? vectors.scale[i][h] * v[e] : v[e], f, vectors.bias[i][h], residual);
      };
      if constexpr (Config::residual) {
        residual.put(own);
        const bool end = m1 + part >= tokens || m0 + m1 + part >= p.m;  // of these rows
        if (!end || i + 1 < tiles_n)
          residual.ask(p, m0 + row + (end ? 0 : m1 + part), row0 + (i + end) * 64 + column);
        warpgroup_sync(warpgroup);
      }
#pragma unroll
      for (int j = 0; j < part / 8; j += 2) {
        // blocks: (tokens j, rows 0-7) (j, 8-15) (j+1, 0-7) (j+1, 8-15); a lane addresses one token
        const int token = (j + lane / 16) * 8 + lane % 8;
        [[maybe_unused]] const u32 blocks = staged + token * pitch + warp * 32 + lane / 8 % 2 * 16;
        union {
          u32 words[4];
          Out v[16 / sizeof(Out)];
        } r;
        if constexpr (Config::residual && sizeof(Out) == 2) load_transposed(r.words, blocks);
        [[maybe_unused]] u32 words[4];
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int token = m1 + (j + b) * 8 + quarter * 2, e = (j + b) * 4;
          const float f0 = factor[token], f1 = factor[token + 1];
          if constexpr (sizeof(Out) == 2) {
            const Out* of = r.v + 4 * b;
            words[2 * b] = packed(y(e, f0, of[0]), y(e + 1, f1, of[1]), Out{});
            words[2 * b + 1] = packed(y(e + 2, f0, of[2]), y(e + 3, f1, of[3]), Out{});
          } else {
            Out* at = reinterpret_cast<Out*>(staging + ((j + b) * 8 + quarter * 2) * pitch) +
                      warp * 16 + lane / 4;
            constexpr int next = pitch / 4;
            at[0] = y(e, f0, at[0]), at[next] = y(e + 1, f1, at[next]);
            at[8] = y(e + 2, f0, at[8]), at[next + 8] = y(e + 3, f1, at[next + 8]);
          }
        }
        if constexpr (sizeof(Out) == 2) store_transposed(blocks, words);
      }
      warpgroup_sync(warpgroup);
      store_part(p, own, m0 + m1 + row, row0 + i * 64 + column);
      warpgroup_sync(warpgroup);
    }
  }
}

// split_k: two blocks have summed half of a segment each, and go on with half of the tokens each. A thread
// sends the other half of its sums to the thread of the other block that has the same rows, and adds what
// comes.
static_assert(split_k <= 2, "a block sends its sums to one other");
constexpr int exchange_at = barriers_bytes + num_stages * stage_bytes + writers * staging_bytes;
constexpr int exchange_threads = writers * 128;
constexpr int exchange_bytes = exchange_threads * tiles_n * outputs * 4;
// Barriers behind the ring's: the other's sums are here; the other has read those that were sent before
constexpr int sums_here = num_stages * 16, sums_read = sums_here + 8;

__device__ __forceinline__ void init_exchange(u32 barriers) {
  barrier_init(barriers + sums_here, 1);
  barrier_init(barriers + sums_read, exchange_threads);
}

// `done`: how many segments were exchanged before
template <class T>
__device__ __forceinline__ void exchange(char* smem, int done, const T (&all)[tiles_n][values],
                                         T (&own)[tiles_n][outputs]) {
  const int thread = threadIdx.x - 128, rank = cluster_rank();
  const u32 barriers = smem_address(smem), here = barriers + sums_here;
  uint4* slot = reinterpret_cast<uint4*>(smem + exchange_at) + thread;
  if (thread == 0) barrier_expect(here, exchange_bytes);
  if (done == 0)
    cluster_wait();  // until the other one runs
  else
    barrier_wait(barriers + sums_read, (done - 1) & 1);
#pragma unroll
  for (int i = 0; i < tiles_n; ++i)
#pragma unroll
    for (int e = 0; e < outputs; e += 4) {
      T sent[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const T first = all[i][e + k], second = all[i][outputs + e + k];
        sent[k] = rank ? first : second;
        own[i][e + k] = rank ? second : first;
      }
      send(smem_address(slot + (i * outputs + e) / 4 * exchange_threads), 1 - rank,
           reinterpret_cast<const uint4&>(sent), here);
    }
  barrier_wait(here, done & 1);
#pragma unroll
  for (int i = 0; i < tiles_n; ++i)
#pragma unroll
    for (int e = 0; e < outputs; e += 4) {
      const uint4 part = slot[(i * outputs + e) / 4 * exchange_threads];
#pragma unroll
      for (int k = 0; k < 4; ++k) own[i][e + k] += reinterpret_cast<const T*>(&part)[k];
    }
  if constexpr (Config::stream_k) barrier_arrive_at(barriers + sums_read, 1 - rank);
}

// by_stages: the first consumer adds the others' sums to its own, in order, where the ring was
template <class T>
__device__ __forceinline__ void add_up(char* smem, int wg, T (&sums)[tiles_n][values]) {
  constexpr int words = tiles_n * values / 4 * 128;  // uint4, of a consumer
  static_assert((consumers - 1) * words * 16 <= num_stages * stage_bytes, "the ring has room");
  uint4* slot = reinterpret_cast<uint4*>(smem + barriers_bytes) + threadIdx.x % 128;
  consumers_sync<consumers * 128>();  // all stages are read, and the block has no other tile
  if (wg > 0)
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int e = 0; e < values; e += 4)
        slot[(wg - 1) * words + (i * values + e) / 4 * 128] =
            reinterpret_cast<const uint4&>(sums[i][e]);
  consumers_sync<consumers * 128>();
  if (wg > 0) return;
#pragma unroll
  for (int other = 0; other < consumers - 1; ++other)
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int e = 0; e < values; e += 4) {
        const uint4 part = slot[other * words + (i * values + e) / 4 * 128];
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[i][e + k] += reinterpret_cast<const T*>(&part)[k];
      }
}

// stream_k: a helper leaves what it has summed of a tile, a thread's values `others` apart. The pieces
// lie in the order of their tiles and helpers, of which each piece has at least one new one. (rest_by_k:
// a share ends with the beginning of a tile, if at all, so each block leaves no more than one.) Whatever
// a warp's threads do not all do costs the main loop its uniform registers: hence an arrival each.
constexpr int others = rest_by_k ? 128 : team * 128;
__device__ __forceinline__ int thread_of_team() { return (threadIdx.x - 128) % others; }
__device__ __forceinline__ void team_sync(int wg) {
  if constexpr (in_turns || rest_by_k)
    warpgroup_sync(wg + 1);
  else
    consumers_sync<others>();
}
// A cluster leaves as many pieces as it has blocks
__device__ __forceinline__ int piece_of(int of_clusters) {
  if constexpr (rest_by_k) return of_clusters;
  return of_clusters * cluster + int(blockIdx.x) % cluster;
}
__device__ __forceinline__ uint4* sums_of_piece(const Params& p, int piece) {
  return reinterpret_cast<uint4*>(p.workspace) + i64(piece) * (tiles_n * outputs / 4 * others) +
         thread_of_team();
}

template <class T>
__device__ __forceinline__ void leave(const Params& p, const Shares& shares, int tile,
                                      const T (&v)[tiles_n][outputs]) {
  const int piece = rest_by_k ? shares.share_of_block()
                              : piece_of(int(blockIdx.x) / cluster + tile - shares.whole);
  uint4* slot = sums_of_piece(p, piece);
#pragma unroll
  for (int i = 0; i < tiles_n; ++i)
#pragma unroll
    for (int e = 0; e < outputs; e += 4)
      __stcg(slot + (i * outputs + e) / 4 * others, reinterpret_cast<const uint4&>(v[i][e]));
  add_release(p.arrivals + piece, 1);
}

// The tile's own block adds them, in the order of k, when all are there.
template <class T>
__device__ __forceinline__ void add_others(const Params& p, const Shares& shares, int tile, int wg,
                                           T (&v)[tiles_n][outputs]) {
  const int of_tile = tile - shares.whole, begin = of_tile * shares.tail;
  const int first = shares.helper_of(begin) + (rest_by_k ? 1 : of_tile);
  const int last = shares.helper_of(begin + shares.tail - 1) + (rest_by_k ? 0 : of_tile);
  for (int at = first + thread_of_team() % 32; at <= last; at += 32)
    while (load_acquire(p.arrivals + piece_of(at)) != others) {}
  __syncwarp();
#pragma unroll 1
  for (int at = first; at <= last; ++at) {
    const uint4* slot = sums_of_piece(p, piece_of(at));
#pragma unroll
    for (int i = 0; i < tiles_n; ++i)
#pragma unroll
      for (int e = 0; e < outputs; e += 4) {
        const uint4 part = __ldcg(slot + (i * outputs + e) / 4 * others);
        const T* t = reinterpret_cast<const T*>(&part);
#pragma unroll
        for (int k = 0; k < 4; ++k) v[i][e + k] += t[k];
      }
  }
  team_sync(wg);
  for (int at = first + thread_of_team(); at <= last; at += others)
    p.arrivals[piece_of(at)] = 0;  // for the next launch
}

// What is left to do for a segment when this block's sums of it are complete
template <class T>
__device__ __forceinline__ void finish_sums(const Params& p, const Shares& shares, const Segment& s,
                                            char* smem, int wg, i64 first_token, i64 row0, int lane,
                                            int warp, RowVectors& vectors,
                                            T (&sums)[tiles_n][outputs]) {
  if constexpr (leaves_sums) {
    if (!s.is_owned(shares.k_tiles)) return leave(p, shares, s.tile, sums);
    if (s.end < shares.k_tiles) add_others(p, shares, s.tile, wg, sums);
  }
  if constexpr (!early_vectors) vectors.read(p, first_token, row0, lane, warp);
  char* staging = smem + barriers_bytes + num_stages * stage_bytes + wg * staging_bytes;
  write_out(p, staging, wg + 1, first_token, row0, lane, warp, vectors, sums);
}

// And before that: `s` is the cluster's segment, `done` how many others were before it
template <class T>
__device__ __forceinline__ void finish(const Params& p, const Shares& shares, const Segment& s,
                                       char* smem, int done, int wg, i64 first_token, i64 row0,
                                       int lane, int warp, RowVectors& vectors,
                                       T (&sums)[tiles_n][values]) {
  if constexpr (split_k > 1) {
    T own[tiles_n][outputs];
    exchange(smem, done, sums, own);
    finish_sums(p, shares, s, smem, wg, first_token, row0, lane, warp, vectors, own);
  } else {
    finish_sums(p, shares, s, smem, wg, first_token, row0, lane, warp, vectors, sums);
  }
}
