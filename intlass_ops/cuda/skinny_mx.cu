// The GEMM (formula in gemm.cu) for few tokens of two MXFP4 operands, on Hopper's wgmma (sm_90a).
//
// The blocks of a cluster share K. Each decodes its share of X into shared memory once, as wgmma's B
// operand, and walks down the rows of W, 64 a turn, whose codes its warps decode into the A operand.
// Its warpgroups take tiles of 128 k in turns; what they have summed meets in shared memory and is
// added in their order, what the blocks have at the end in theirs.
//
//      row tile:  | block 0: tiles of K for warpgroup 0 1 2 3 0 1 2 3 ... | the cluster's next | ...
//
// A warp fills a ring with the codes and scales of its own 16 rows by cp.async, and needs no barrier
// but its own.
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
constexpr int code_bytes = 16 * 64, stage_bytes = code_bytes + 16 * 16;
constexpr int ring_bytes = num_stages * stage_bytes + 16 * 16;
constexpr int pitch = rows + 4, slab = tokens * pitch;  // of a token, of a warpgroup
constexpr int scale_step_bytes = scale_step<Config::blocked, Scale>(block_k);
constexpr float sum_unit = 64.f;  // W's codes are too small by it
static_assert(same<Scale, e8m0>::value && same<X, e2m1>::value, "two MXFP4 operands");
static_assert(!Config::residual, "FP4 products end with their factor");
static_assert(warpgroups == 4, "a warpgroup's tiles of K have one place in 16 bytes of scales");
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

// What a warp asks for, one tile of K after another, also from row tile to row tile
struct Requests {
  int tile, kt, first, end;
  u32 codes_at, scales_at;  // a lane's place in a stage
  const char *w[2], *scales;

  __device__ __forceinline__ Requests(const Params& p, int tile, int first, int end, int lane)
      : tile(tile), kt(first), first(first), end(end) {
    codes_at = lane / 4 * 64 + ((lane % 4 ^ lane / 8) << 4);
    scales_at = code_bytes + lane * 16;
    pin(codes_at), pin(scales_at);
  }
  __device__ __forceinline__ void locate(const Params& p, int warp, int lane) {
    const int row0 = tile * rows + warp % 4 * 16, last = int(p.n) - 1;
#pragma unroll
    for (int h = 0; h < 2; ++h)
      w[h] = p.w + u64(u32(min(row0 + lane / 4 + h * 8, last))) * p.w_stride + lane % 4 * 16;
    // 16 bytes with a row's scales: blocked, those of rows 32 apart too, else of four tiles of K
    const int row = Config::blocked ? row0 + lane % 16 : min(row0 + lane % 16, last);
    scales = static_cast<const char*>(p.scales) +
             (Config::blocked ? (row >> 7) * p.scale_row * 512 + (row & 31) * 16
                              : row * p.scale_row - first % 4 * blocks);
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
      if (lane < 16) cp_async_16(to + scales_at, advanced(scales, kt, scale_step_bytes), false);
    kt += warpgroups;
    if (kt >= end) {
      kt = first, tile += step;
      locate(p, warp, lane);
    }
  }
};
// Of 16 bytes with a row's scales, the first that is of this row and tile of K
__device__ __forceinline__ int own_scales(int tile, int kt, int warp) {
  return (Config::blocked ? tile % 2 * 2 + warp % 4 / 2 : kt % 4) * 4;
}

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
template <bool apart>
__device__ __forceinline__ bool load_x(const Params& p, char* x, unsigned char* x_scales,
                                       float* token_scales, int begin, int count) {
  constexpr int batch = 4;  // of a thread's loads in flight
  bool fits = true;
  const u32 all = count * blocks, m_step = threads / all, b_step = threads % all;
  u32 m = threadIdx.x / all, b = threadIdx.x % all;
  auto scale = [&](u32 row, u32 of_share) -> int {
    return static_cast<const unsigned char*>(
        p.a_scale)[scale_at<Config::blocked>(row, p.a_scale_row, begin * blocks + of_share)];
  };
#pragma unroll 1
  while (m < u32(p.m)) {
    u32 w[batch][4], token[batch], block[batch];
    int s[batch], anchor[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      token[i] = m, block[i] = b;
      const u32 from = min(m, u32(p.m) - 1);
      load_global(w[i], p.x + from * p.x_stride + (begin * blocks + b) * 16);
      s[i] = scale(from, b);
      anchor[i] = apart ? s[i] : scale(from, 0);
      m += m_step, b += b_step;
      if (b >= all) b -= all, ++m;
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const u32 m = token[i], b = block[i];
      if (m >= u32(p.m)) break;
      const int ahead = s[i] - anchor[i];
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
      if (b == 0) token_scales[m] = apart ? 1.f : power_of_two(anchor[i]);
    }
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads it
  return __shfl_sync(~0u, __syncthreads_and(fits), 0);          // uniform, as the compiler sees now
}

__device__ __forceinline__ u32 load_word(u32 smem) {
  u32 v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(smem) : "memory");
  return v;
}

// A lane's places: in a stage of its words, and of the scales that it makes floats; of these, and of
// those of its rows
struct Places { u32 words, scales, own_float, floats; };

// One tile of K of a warp's 16 rows
template <bool x_apart>
__device__ __forceinline__ void multiply(float (&total)[values], u32 stage, u64 x, const Places& at,
                                         const unsigned char* x_scales) {
  u32 raw[blocks][2];
#pragma unroll
  for (int c = 0; c < blocks; ++c)
#pragma unroll
    for (int h = 0; h < 2; ++h) raw[c][h] = load_word(((stage + at.words) ^ (c << 4)) + h * 512);
#pragma unroll
  for (int h = 0; h < 2; ++h) {  // a lane of a quad converts the scales of one block
    u32 code;
    asm volatile("ld.shared.u8 %0, [%1];"
                 : "=r"(code)
                 : "r"(stage + at.scales + h * 128)
                 : "memory");
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(at.own_float + h * 128), "f"(power_of_two(code))
                 : "memory");
  }
  __syncwarp();
  u32 a[blocks][4];
#pragma unroll
  for (int c = 0; c < blocks; ++c)
#pragma unroll
    for (int h = 0; h < 2; ++h) decode_w(raw[c][h], a[c][h], a[c][2 + h]);
  float sum[blocks][values];
#pragma unroll
  for (int c = 0; c < blocks; ++c)
#pragma unroll
    for (int e = 0; e < values; ++e) sum[c][e] = 0;
  wgmma_fence();
#pragma unroll
  for (int c = 0; c < blocks; ++c) wgmma(sum[c], a[c], x + c * 2, false);
  wgmma_commit();
  u32 scales[2][blocks];  // of rows
#pragma unroll
  for (int h = 0; h < 2; ++h) load_words<blocks>(scales[h], at.floats + h * 128);
  wgmma_wait<0>();
#pragma unroll
  for (int c = 0; c < blocks; ++c)
#pragma unroll
    for (int e = 0; e < values; ++e) pin(sum[c][e]);
#pragma unroll
  for (int c = 0; c < blocks; ++c)
#pragma unroll
    for (int e = 0; e < values; ++e) {
      if constexpr (x_apart) sum[c][e] *= power_of_two(x_scales[c * tokens + e / 4 * 2 + e % 2]);
      total[e] += sum[c][e] * __uint_as_float(scales[e % 4 / 2][c]);
    }
}

__device__ __forceinline__ void finish(const Params& p, i64 n, int m, float y, float factor) {
  store_rounded(static_cast<Out*>(p.out) + m * p.n + n, output(y, factor, bias_of(p, n), Out()));
}

// What a block of the cluster has in the same place of its shared memory
__device__ __forceinline__ float left_by(int block, const float* here) {
  float v;
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [remote];\n}"
      : "=f"(v)
      : "r"(smem_address(here)), "r"(block));
  return v;
}

template <bool v> struct Constant { static constexpr bool value = v; };

extern "C" __global__ void __cluster_dims__(split, 1, 1) __launch_bounds__(threads, 1)
    skinny_mx(const __grid_constant__ Params p) {
  launch_dependents();
  extern __shared__ __align__(1024) char smem[];
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0);
  const int wg = warp / 4, rank = split > 1 ? cluster_rank() : 0;
  const int tiles = int((p.n + rows - 1) / rows), k_tiles = int(p.k) / block_k;
  const int share = (k_tiles + split - 1) / split, begin = rank * share;
  const int end = min(begin + share, k_tiles);
  const int first_tile = int(blockIdx.x) / split, step = int(gridDim.x) / split;

  // Shared memory: X, the warps' rings, the warpgroups' sums of this turn and the one before, the
  // tokens' scales, this block's sums of all rows, and X's scales if they are apart
  char* x = smem;
  const u32 ring = smem_address(x + share * x_bytes) + warp * ring_bytes;
  const u32 ring_end = ring + num_stages * stage_bytes;
  float* partial = reinterpret_cast<float*>(x + share * x_bytes + warps * ring_bytes);
  float* token_scales = partial + 2 * warpgroups * slab;
  const u32 summed = smem_address(token_scales + tokens);  // a barrier for each of two turns
  float* kept = token_scales + tokens + 4;                 // [turns][tokens][rows]
  const int turns = (tiles - first_tile + step - 1) / step;
  const int most_turns = split > 1 ? (tiles + step - 1) / step : 0;
  auto* x_scales = reinterpret_cast<unsigned char*>(kept + most_turns * tokens * rows);
  if (threadIdx.x == 0) barrier_init(summed, threads), barrier_init(summed + 8, threads);

  const int first = begin + wg;
  Requests requests(p, first_tile, first, end, lane);
  requests.locate(p, warp, lane);
  Requests late = requests;
#pragma unroll
  for (int s = 0; s < num_stages - 1; ++s)
    requests.next<true, false>(p, ring + s * stage_bytes, tiles, step, warp, lane);
  wait_for_predecessors();
#pragma unroll
  for (int s = 0; s < num_stages - 1; ++s) {
    late.next<false, true>(p, ring + s * stage_bytes, tiles, step, warp, lane);
    cp_async_commit();
  }
  const bool x_fits = load_x<false>(p, x, x_scales, token_scales, begin, end - begin);
  if (!x_fits) load_x<true>(p, x, x_scales, token_scales, begin, end - begin);
  const float alpha = alpha_of(p) * sum_unit;
  Places at;
  at.words = lane / 4 * 64 + lane / 8 * 16 + lane % 4 * 4;
  at.floats = ring_end + lane / 4 * 16, at.own_float = ring_end + lane * 4;
  pin(at.words), pin(at.floats), pin(at.own_float);

  auto add_up = [&](int turn) {  // what the warpgroups have left
    barrier_wait(summed + turn % 2 * 8, turn / 2 % 2);
    const int r = threadIdx.x % rows, n = (first_tile + turn * step) * rows + r;
    const float* sums = partial + turn % 2 * warpgroups * slab + r;
#pragma unroll
    for (int i = 0; i < tokens * rows; i += threads) {
      const int m = (i + int(threadIdx.x)) / rows;
      float y = 0;
#pragma unroll
      for (int g = 0; g < warpgroups; ++g) y += sums[g * slab + m * pitch];
      y *= token_scales[m];
      if constexpr (split > 1)
        kept[(turn * tokens + m) * rows + r] = y;
      else if (n < int(p.n) && m < int(p.m))
        finish(p, n, m, y, alpha);
    }
  };

  u32 stage = ring, left = ring_end - stage_bytes;
  auto walk = [&](auto x_apart) {
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
      const int tile = first_tile + turn * step;
      float total[values];
#pragma unroll
      for (int e = 0; e < values; ++e) total[e] = 0;
      u64 x_tile = tile_descriptor(smem_address(x) + wg * x_bytes);
      const unsigned char* scales = x_scales + wg * blocks * tokens + lane % 4 * (2 * tiles_m);
      at.scales = code_bytes + lane / 4 * 16 + own_scales(tile, first, warp) + lane % 4;
      auto next_tile = [&] {
        cp_async_wait<num_stages - 2>();
        __syncwarp();
        // into the stage that the tile before this one has left
        requests.next<true, true>(p, left, tiles, step, warp, lane);
        cp_async_commit();
        multiply<decltype(x_apart)::value>(total, stage, x_tile, at, scales);
        left = stage, stage += stage_bytes;
        if (stage == ring_end) stage = ring;
        x_tile += warpgroups * x_bytes / 16;
        scales += warpgroups * blocks * tokens;
      };
      next_tile();
      if (turn > 0) add_up(turn - 1);  // when the last warpgroup is likely to be there
#pragma unroll 1
      for (int kt = first + warpgroups; kt < end; kt += warpgroups) next_tile();
      float* own = partial + (turn % 2 * warpgroups + wg) * slab + lane % 4 * 2 * pitch +
                   warp % 4 * 16 + lane / 4;
#pragma unroll
      for (int e = 0; e < values; ++e) own[(e / 4 * 8 + e % 2) * pitch + e % 4 / 2 * 8] = total[e];
      barrier_arrive(summed + turn % 2 * 8);  // all threads: racecheck sees no warp's arrival
    }
  };
  if (x_fits)
    walk(Constant<false>());
  else
    walk(Constant<true>());
  if (turns > 0) add_up(turns - 1);

  if constexpr (split > 1) {  // each block finishes a part of the rows of all
    cluster_sync();
    constexpr int batch = 4;  // of a thread's sums on their way
    const int all = turns * tokens * rows;
#pragma unroll 1
    for (int i0 = rank * threads + int(threadIdx.x); i0 < all; i0 += batch * split * threads) {
      float y[batch] = {};
#pragma unroll
      for (int j = 0; j < batch; ++j)
#pragma unroll
        for (int b = 0; b < split; ++b)
          y[j] += left_by(b, kept + min(i0 + j * split * threads, all - 1));
#pragma unroll
      for (int j = 0; j < batch; ++j) {
        const int i = i0 + j * split * threads, r = i % rows, m = i / rows % tokens;
        const i64 n = i64(first_tile + i / (tokens * rows) * step) * rows + r;
        if (i < all && m < p.m && n < p.n) finish(p, n, m, y[j], alpha);
      }
    }
    cluster_meet();  // others may still read this block's sums
  }
}
