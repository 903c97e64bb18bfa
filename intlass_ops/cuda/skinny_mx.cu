// The GEMM (formula in gemm.cu) for few tokens of two MXFP4 operands, on Hopper's wgmma (sm_90a).
//
// The blocks of a cluster share K. Each decodes its share of X into shared memory once, as wgmma's B
// operand, and walks down the rows of W, 64 a turn, whose codes its warps decode into the A operand.
// What its warpgroups have summed meets in shared memory and is added in their order. The blocks send
// one another that of a turn, each what others finish, who add it in the order of the blocks.
//
//      row tile:  | block 0: tiles of 128 k for warpgroup 0 1 2 3 0 1 2 3 ... | the next block | ...
//      or, plain: |                             0 0 0 ... 1 1 1 ... 2 ... 3 ..| the next block | ...
//
// A warp fills a ring with the codes and scales of its own 16 rows by cp.async, and needs no barrier
// but its own. Scales come in pieces of 16 bytes of a row: plain, they are those of four tiles of K,
// which are one warpgroup's. Blocked, they are those of rows 32 apart: a warp's rows are four times
// four of these, and a tile of rows half of 128.
//
// A block of 32 k is one wgmma of 8-bit numbers. Codes of W are e4m3, 2^-6 of their value, those of X
// e5m2, times their scale over that of the token's first block: e5m2 has room for 13 binades each
// way. So sums have 13 bits, which tensor cores add up exactly, and take W's scales. Where X needs
// more room its scales multiply the sums too (`x_apart`). The k of a block come in the order in which
// words are decoded, even before odd ones, in X and W alike.
#include "epilogue.cuh"
#include "hopper.cuh"

constexpr int warpgroups = Config::warpgroups, warps = 4 * warpgroups, threads = 32 * warps;
constexpr int split = Config::split_k, num_stages = Config::num_stages;
constexpr int tokens = Config::tokens, tiles_m = tokens / 8, values = 4 * tiles_m;
constexpr int rows = 64, block_k = 128, blocks = block_k / 32;  // of a tile
constexpr int x_bytes = tokens * block_k;                       // of a tile of K
// A warp's: codes, scales in pieces of 16 bytes, and the scales of one tile as floats
constexpr int stage_bytes = 16 * 64, piece_bytes = 16 * 16;
constexpr int ring_bytes = num_stages * (stage_bytes + piece_bytes) + 16 * 16;
constexpr int pitch = rows + 4, slab = tokens * pitch;  // of a token, of a warpgroup
constexpr int own_tokens = tokens / split;              // that a block finishes
constexpr int scale_pieces = Config::blocked ? 4 : 16;  // of a warp's rows
constexpr int scale_step_bytes = scale_step<Config::blocked, Scale>(block_k);
constexpr float sum_unit = 64.f;  // W's codes are too small by it
static_assert(same<Scale, e8m0>::value && same<X, e2m1>::value, "two MXFP4 operands");
static_assert(!Config::residual, "FP4 products end with their factor");
static_assert(warps * ring_bytes + (2 * warpgroups * slab + tokens) * 4 + 16 == Config::fixed_smem,
              "config/skinny_mx.py and the kernel disagree about shared memory");

// 0 is 2^-127, a subnormal number, and 255, which comes as infinity, none
__device__ __forceinline__ float power_of_two(int code) {
  const float v = __int_as_float(max(code << 23, 0x00400000));
  return fmaf(v, 0.f, v);
}
__device__ __forceinline__ const char* advanced(const void* from, int count, int bytes) {
  const char* at;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(at) : "r"(count), "r"(bytes), "l"(from));
  return at;
}

// 16 bytes from global memory, if a lane asks for any
__device__ __forceinline__ void cp_async_16_if(bool wanted, u32 smem, const void* gmem) {
  asm volatile(
      "{.reg .pred wanted; setp.ne.b32 wanted, %2, 0; "
      "@wanted cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(smem),
      "l"(gmem), "r"(int(wanted))
      : "memory");
}

// Row i of a warp's 16 rows of a tile
__device__ __forceinline__ int row_of(int tile, int warp, int i) {
  if constexpr (!Config::blocked) return tile * rows + warp % 4 * 16 + i;
  return tile / 2 * 128 + tile % 2 * 16 + warp % 4 * 4 + i % 4 + i / 4 * 32;
}

constexpr int tile_step = Config::blocked ? warpgroups : 1;  // from tile to tile of a warpgroup
// Whether a tile of K needs pieces of scales that the one before it did not
__device__ __forceinline__ bool starts_piece(int kt, int first) {
  return Config::blocked || kt % 4 == 0 || kt == first;
}

// What a warp asks for, one tile of K after another, also from row tile to row tile
struct Requests {
  int tile, kt, first, end;
  u32 codes_at, scales_at, pieces_end;  // a lane's place in a stage, in the next pieces, behind all
  const char *w[2], *scales;

  __device__ __forceinline__ Requests(const Params& p, int tile, int first, int end, u32 pieces,
                                      int lane)
      : tile(tile), kt(first), first(first), end(end) {
    codes_at = lane / 4 * 64 + ((lane % 4 ^ lane / 8) << 4);
    scales_at = pieces + lane * 16, pieces_end = scales_at + num_stages * piece_bytes;
    pin(codes_at);
  }
  __device__ __forceinline__ void locate(const Params& p, int warp, int lane) {
    const int last = int(p.n) - 1;
#pragma unroll
    for (int h = 0; h < 2; ++h)
      w[h] = p.w + u64(u32(min(row_of(tile, warp, lane / 4 + h * 8), last))) * p.w_stride +
             lane % 4 * 16;
    const int row = row_of(tile, warp, lane % 16);
    scales = static_cast<const char*>(p.scales) +
             (Config::blocked ? scale_at<true>(row, p.scale_row, 0) : min(row, last) * p.scale_row);
  }
  template <bool codes, bool with_scales>
  __device__ __forceinline__ void next(const Params& p, u32 to, int tiles, int step, int warp,
                                       int lane) {
    if (tile >= tiles) return;
    if constexpr (codes)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        cp_async_16(to + codes_at + h * 512, advanced(w[h], kt, 64), false);
    if constexpr (with_scales)
      if (starts_piece(kt, first)) {
        cp_async_16_if(lane < scale_pieces, scales_at,
                       advanced(scales, kt - (Config::blocked ? 0 : kt % 4), scale_step_bytes));
        scales_at += piece_bytes;
        if (scales_at == pieces_end) scales_at -= num_stages * piece_bytes;
      }
    kt += tile_step;
    if (kt >= end) {
      kt = first, tile += step;
      locate(p, warp, lane);
    }
  }
};

// A word of eight codes of X in e5m2: `low` and `high` are the magnitudes of codes 0 to 3, 4 to 7
__device__ __forceinline__ void decode_x(u32 w, u32 low, u32 high, u32& even, u32& odd) {
  const u32 codes = w & 0x77777777;
  const u32 first = __byte_perm(low, high, codes), second = __byte_perm(low, high, codes >> 16);
  even = and_or(w << 4, 0x80808080, __byte_perm(first, second, 0x6420));
  odd = and_or(w, 0x80808080, __byte_perm(first, second, 0x7531));
}
__device__ __forceinline__ void decode_w(u32 w, u32& even, u32& odd) {
  constexpr u32 sign = 0x80808080, rest = 0x1c1c1c1c;
  even = and_or(w << 4, sign, w << 2 & rest), odd = and_or(w, sign, w >> 2 & rest);
}

// This block's share of X; tokens that are not there are left as they are. True if there was room for
// the scales, which are left out if they are to be `apart`.
template <bool apart, class Meanwhile>
__device__ __forceinline__ bool load_x(const Params& p, char* x, unsigned char* x_scales,
                                       float* token_scales, int begin, int count,
                                       Meanwhile meanwhile) {
  constexpr int batch = 4;                // of a thread's loads in flight
  constexpr u32 step = threads / tokens;  // eight threads, a line of L2, side by side
  bool fits = true;
  const u32 m = threadIdx.x / 8 % tokens, all = count * blocks;
  const auto* codes = p.x + m * p.x_stride + begin * blocks * 16;
  auto scale = [&](u32 b) -> int {
    return static_cast<const unsigned char*>(
        p.a_scale)[scale_at<Config::blocked>(m, p.a_scale_row, begin * blocks + b)];
  };
  const bool there = m < u32(p.m);
  const int anchor = there ? scale(0) : 0;
  const u32 own = threadIdx.x / (8 * tokens) * 8 + threadIdx.x % 8;
#pragma unroll 1
  for (u32 first = 0; first < all; first += batch * step) {
    const u32 b0 = there ? first + own : all;
    u32 w[batch][4];
    int s[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      if (b0 + i * step >= all) break;
      load_global(w[i], codes + (b0 + i * step) * 16);
      s[i] = scale(b0 + i * step);
    }
    if (first == 0) meanwhile();
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const u32 b = b0 + i * step;
      if (b >= all) break;
      const int ahead = apart ? 0 : s[i] - anchor;
      const bool zeros = ((w[i][0] | w[i][1] | w[i][2] | w[i][3]) & 0x77777777) == 0;
      if ((ahead < -13 || ahead > 13) && (!zeros || s[i] == 255)) fits = false;
      const u32 low = 0x3e3c3800 + ahead * 0x04040400, high = 0x46444240 + ahead * 0x04040404;
      u32 even[4], odd[4];
#pragma unroll
      for (int v = 0; v < 4; ++v) decode_x(w[i][v], low, high, even[v], odd[v]);
      char* row = x + b / blocks * x_bytes + m * 128;
      const u32 chunk = b % blocks * 2;
      *reinterpret_cast<uint4*>(row + ((chunk ^ m % 8) << 4)) =
          make_uint4(even[0], even[1], even[2], even[3]);
      *reinterpret_cast<uint4*>(row + ((chunk + 1 ^ m % 8) << 4)) =
          make_uint4(odd[0], odd[1], odd[2], odd[3]);
      if constexpr (apart)  // a lane's tokens together
        x_scales[b * tokens + m % 8 / 2 * (2 * tiles_m) + m / 8 * 2 + m % 2] = s[i];
      if (b == 0) token_scales[m] = apart ? 1.f : power_of_two(anchor);
    }
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads it
  return __shfl_sync(~0u, __syncthreads_and(fits), 0);          // uniform, as the compiler sees now
}

// A lane's places: in a stage of its words, and of the scales that it makes floats; of these, and of
// those of its rows
struct Places { u32 words, scales, own_float, floats; };

// A warp's 16 rows of a tile of K, as two halves: while the tensor cores work on the first, the
// second is decoded; while on the second, the next tile is fetched and the first's sums are scaled.
struct Tile {
  static constexpr int half = blocks / 2;  // blocks of one
  u32 raw[2][blocks], a[blocks][4];
  float sum[blocks][values];
  u32 scales[2][blocks];  // of rows

  __device__ __forceinline__ void load(u32 stage, u32 piece, const Places& at) {
#pragma unroll
    for (int h = 0; h < 2; ++h) load_matrices<blocks>(raw[h], stage + at.words + h * 512);
    u32 code[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)  // a lane of a quad converts the scales of one block
      asm volatile("ld.shared.u8 %0, [%1];"
                   : "=r"(code[h])
                   : "r"(piece + at.scales + h * (Config::blocked ? 8 : 128))
                   : "memory");
#pragma unroll
    for (int h = 0; h < 2; ++h)
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(at.own_float + h * 128),
                   "f"(power_of_two(code[h]))
                   : "memory");
    __syncwarp();
  }
  template <int first> __device__ __forceinline__ void multiply(u64 x) {
#pragma unroll
    for (int c = first; c < first + half; ++c) {
#pragma unroll
      for (int h = 0; h < 2; ++h) decode_w(raw[h][c], a[c][h], a[c][2 + h]);
#pragma unroll
      for (int e = 0; e < values; ++e) sum[c][e] = 0;
    }
    wgmma_fence();
#pragma unroll
    for (int c = first; c < first + half; ++c) wgmma(sum[c], a[c], x + c * 2, false);
    wgmma_commit();
  }
  __device__ __forceinline__ void load_scales(const Places& at) {
#pragma unroll
    for (int h = 0; h < 2; ++h) load_words<blocks>(scales[h], at.floats + h * 128);
  }
  template <int first, bool x_apart>
  __device__ __forceinline__ void add(float (&total)[values], const unsigned char* x_scales) {
    wgmma_wait<first == 0 ? 1 : 0>();
#pragma unroll
    for (int c = first; c < first + half; ++c)
#pragma unroll
      for (int e = 0; e < values; ++e) pin(sum[c][e]);
#pragma unroll
    for (int c = first; c < first + half; ++c)
#pragma unroll
      for (int e = 0; e < values; ++e) {
        if constexpr (x_apart) sum[c][e] *= power_of_two(x_scales[c * tokens + e / 4 * 2 + e % 2]);
        total[e] += sum[c][e] * __uint_as_float(scales[e % 4 / 2][c]);
      }
  }
};

// Four neighbouring rows of a token
__device__ __forceinline__ void finish(const Params& p, int n, int m, const float (&y)[4],
                                       float factor) {
  struct __align__(4 * sizeof(Out)) Four { Out v[4]; } four;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    store_rounded(four.v + i, output(y[i], factor, bias_of(p, min(n + i, int(p.n) - 1)), Out()));
  Out* to = static_cast<Out*>(p.out) + m * p.n + n;
  if (p.n % 4 == 0) {
    if (n < p.n) *reinterpret_cast<Four*>(to) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (n + i < p.n) to[i] = four.v[i];
  }
}

// `count` times four neighbouring sums
template <int count, int apart>
__device__ __forceinline__ void add_four(float (&y)[4], const float* sums) {
#pragma unroll
  for (int g = 0; g < count; ++g) {
    const float4 v = *reinterpret_cast<const float4*>(sums + g * apart);
    y[0] += v.x, y[1] += v.y, y[2] += v.z, y[3] += v.w;
  }
}

template <bool v> struct Constant { static constexpr bool value = v; };

extern "C" __global__ void __cluster_dims__(split, 1, 1) __launch_bounds__(threads, 1)
    skinny_mx(const __grid_constant__ Params p) {
  launch_dependents();
  extern __shared__ __align__(1024) char smem[];
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0);
  const int wg = warp / 4, rank = split > 1 ? cluster_rank() : 0;
  const int tiles = Config::blocked ? int((p.n + 127) / 128) * 2 : int((p.n + rows - 1) / rows);
  const int k_tiles = int(p.k) / block_k;
  const int share = (k_tiles + split - 1) / split, begin = rank * share;
  const int share_end = min(begin + share, k_tiles);
  const int first_tile = int(blockIdx.x) / split, step = int(gridDim.x) / split;

  // Shared memory: X, the warps' rings, the warpgroups' sums of this turn and the one before, the
  // tokens' scales, what the cluster's blocks send for this one's tokens, and X's scales if they are apart
  char* x = smem;
  const u32 ring = smem_address(x + share * x_bytes) + warp * ring_bytes;
  const u32 pieces = ring + num_stages * stage_bytes;
  const u32 floats = pieces + num_stages * piece_bytes;
  float* partial = reinterpret_cast<float*>(x + share * x_bytes + warps * ring_bytes);
  float* token_scales = partial + 2 * warpgroups * slab;
  const u32 summed = smem_address(token_scales + tokens);  // a barrier for each of two turns
  const int turns = (tiles - first_tile + step - 1) / step;
  const int most_turns = split > 1 ? (tiles + step - 1) / step : 0;
  float* sent = token_scales + tokens + 4;  // [turns][blocks][own_tokens][rows]
  const u32 arrived = smem_address(sent + most_turns * tokens * rows);  // a barrier for each turn
  auto* x_scales = reinterpret_cast<unsigned char*>(sent + most_turns * (tokens * rows + 2));

  // a warpgroup's part of the share
  const int first = begin + (Config::blocked ? wg : wg * (share_end - begin) / warpgroups);
  const int end = Config::blocked ? share_end : begin + (wg + 1) * (share_end - begin) / warpgroups;
  Requests requests(p, first_tile, first, end, pieces, lane);
  requests.locate(p, warp, lane);
  Requests late = requests;
  constexpr int early = Config::early_tiles;
#pragma unroll 1
  for (int s = 0; s < early; ++s)
    requests.next<true, false>(p, ring + s * stage_bytes, tiles, step, warp, lane);
  if (threadIdx.x == 0) {  // all of them, since racecheck takes a thread's own for those of others
    barrier_init(summed, threads), barrier_init(summed + 8, threads);
    if constexpr (split > 1) {
#pragma unroll 1
      for (int turn = 0; turn < turns; ++turn) barrier_init(arrived + turn * 8, 1);
      publish_barriers();
#pragma unroll 1
      for (int turn = 0; turn < turns; ++turn)
        barrier_expect(arrived + turn * 8, tokens * rows * 4);
    }
  }
  if constexpr (split > 1) cluster_arrive();
  wait_for_predecessors();
  const bool x_fits = load_x<false>(p, x, x_scales, token_scales, begin, share_end - begin, [&] {
#pragma unroll 1
    for (int s = 0; s < early; ++s) {
      late.next<false, true>(p, ring + s * stage_bytes, tiles, step, warp, lane);
      cp_async_commit();
    }
    requests.scales_at = late.scales_at;
#pragma unroll 1
    for (int s = early; s < num_stages - 1; ++s) {
      requests.next<true, true>(p, ring + s * stage_bytes, tiles, step, warp, lane);
      cp_async_commit();
    }
  });
  if (!x_fits) load_x<true>(p, x, x_scales, token_scales, begin, share_end - begin, [] {});
  if constexpr (split > 1) cluster_wait();  // all have made their barriers
  const float alpha = alpha_of(p) * sum_unit;
  Places at;
  at.words = lane % 8 * 64 + ((lane / 8 ^ lane % 8 / 2) << 4);
  at.scales = lane % 4 + (Config::blocked ? lane / 4 % 4 * 16 + lane / 16 * 4 : lane / 4 * 16);
  at.floats = floats + lane / 4 * 16, at.own_float = floats + lane * 4;
  pin(at.words), pin(at.scales), pin(at.floats), pin(at.own_float);

  auto finish_rows = [&](int turn, int m, int r, const float (&y)[4]) {
    if (m < p.m) finish(p, row_of(first_tile + turn * step, r / 16, r % 16), m, y, alpha);
  };
  auto add_up = [&](int turn) {  // what the warpgroups have left
    barrier_wait(summed + turn % 2 * 8, turn / 2 % 2);
    const int m = threadIdx.x / (rows / 4), r = threadIdx.x % (rows / 4) * 4;
    if (m >= tokens) return;
    float y[4] = {};
    add_four<warpgroups, slab>(y, partial + turn % 2 * warpgroups * slab + m * pitch + r);
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] *= token_scales[m];
    if constexpr (split > 1)
      send(smem_address(sent + ((turn * split + rank) * own_tokens + m % own_tokens) * rows + r),
           m / own_tokens, reinterpret_cast<const uint4&>(y), arrived + turn * 8);
    else
      finish_rows(turn, m, r, y);
  };
  auto finish_turn = [&](int turn) {  // of what the cluster's blocks have sent
    const int i = threads - 1 - threadIdx.x, m = i / (rows / 4), r = i % (rows / 4) * 4;
    if (split == 1 || turn < 0 || m >= own_tokens) return;
    barrier_wait(arrived + turn * 8, 0);
    float y[4] = {};
    add_four<split, own_tokens * rows>(y, sent + (turn * split * own_tokens + m) * rows + r);
    finish_rows(turn, rank * own_tokens + m, r, y);
  };

  auto walk = [&](auto x_apart) {
    constexpr bool apart = decltype(x_apart)::value;
    const u64 x_first = tile_descriptor(smem_address(x) + (first - begin) * x_bytes);
    const unsigned char* scales_first =
        x_scales + (first - begin) * blocks * tokens + lane % 4 * (2 * tiles_m);
    u64 x_tile = x_first;
    const unsigned char* scales = scales_first;
    u32 stage = ring, left = pieces - stage_bytes, piece = floats - piece_bytes;
    int turn = 0, kt = first;
    Tile t;
    float total[values] = {};
    auto fetch = [&] {
      cp_async_wait<num_stages - 2>();
      __syncwarp();
      // into the stage that the tile before this one has left
      requests.next<true, true>(p, left, tiles, step, warp, lane);
      cp_async_commit();
      if (starts_piece(kt, first)) {
        piece += piece_bytes;
        if (piece == floats) piece = pieces;
      }
      t.load(stage, piece + (Config::blocked ? 0 : kt % 4 * 4), at);
      left = stage, stage += stage_bytes;
      if (stage == pieces) stage = ring;
    };
    fetch();
#pragma unroll 1
    while (turn < turns) {
      t.multiply<0>(x_tile);
      t.multiply<Tile::half>(x_tile);
      t.load_scales(at);
      kt += tile_step;
      const bool ends = kt >= end;
      if (ends) kt = first;
      fetch();  // after the last one, another that nobody multiplies
      t.add<0, apart>(total, scales);
      t.add<Tile::half, apart>(total, scales);
      x_tile += tile_step * x_bytes / 16;
      scales += tile_step * blocks * tokens;
      if (ends) {
        if (turn > 0) add_up(turn - 1);  // the last warpgroup was there long ago
        finish_turn(turn - 2);
        float* own = partial + (turn % 2 * warpgroups + wg) * slab + lane % 4 * 2 * pitch +
                     warp % 4 * 16 + lane / 4;
#pragma unroll
        for (int e = 0; e < values; ++e) {
          own[(e / 4 * 8 + e % 2) * pitch + e % 4 / 2 * 8] = total[e];
          total[e] = 0;
        }
        barrier_arrive(summed + turn % 2 * 8);  // all threads: racecheck sees no warp's arrival
        x_tile = x_first, scales = scales_first, ++turn;
      }
    }
  };
  if (x_fits)
    walk(Constant<false>());
  else
    walk(Constant<true>());
  add_up(turns - 1);
  finish_turn(turns - 2);
  finish_turn(turns - 1);
}
