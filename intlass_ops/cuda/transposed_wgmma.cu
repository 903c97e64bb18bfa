// x @ w for an INT4 weight as it lies, as transposed.cu computes it, on Hopper's units: for many tokens.
//
// The sum runs over the rows of W, which TMA brings to shared memory as they lie, 128 at a time, with
// as many columns of x [M, N]. wgmma computes two tiles of 64 columns of W by block_m tokens: W comes from
// registers, where two bytes of a row are four neighbouring columns, so a thread pairs the nibbles of
// neighbouring rows up, and owns these columns in every tile. They are neighbours in the output too,
// and are stored from registers. X is read by wgmma from shared memory.
//
// The consumers of a block have the same columns and take turns at the stages of the ring: what makes
// one wait is latency, which several hide from each other. A cluster of `split_n` blocks shares the
// rows of W, too. All sums of a tile then meet in shared memory, and are added in the same order
// always, each consumer those of some tokens.
#include "hopper.cuh"
#include "transposed.cuh"

struct Params {
  const void* alpha;
  void* out;
  i64 m, n, k, group_size, alpha_dtype;
};

constexpr int block_m = Config::block_m, consumers = Config::consumers;
constexpr int split_n = Config::split_n, num_stages = Config::num_stages, groups = Config::groups;
constexpr int threads = 128 * (consumers + 1), blocks_per_sm = consumers == 1 ? 2 : 1;
constexpr int consumer_registers = consumers == 1 ? 208 : 240;
constexpr int producer_registers = consumers == 1 ? 40 : 24;
constexpr int block_n = 128, steps = block_n / 16;  // rows of W in a stage
constexpr int tiles = 2, lane_columns = 2 * tiles, columns = 64 * tiles;
constexpr int values = block_m / 2;               // of a thread, for a tile of 64 columns
constexpr int slots = block_m / 4;                // tokens of a thread
constexpr int parts = split_n * consumers;        // sums of an output
constexpr int own = (slots + parts - 1) / parts;  // tokens that a consumer adds up, at most
static_assert(num_stages % consumers == 0,
              "a stage is always the same consumer's, in step with it");

// A stage: X in two columns of 128 bytes, W, scales and zero points of each group
constexpr int x_column_bytes = block_m * 128, x_bytes = 2 * x_column_bytes;
constexpr int w_row_bytes = columns / 2, w_bytes = block_n * w_row_bytes;
constexpr int parameters_at = x_bytes + w_bytes, parameter_bytes = groups * block_n * 2;
constexpr int filled_bytes = parameters_at + (has_zeros ? 2 : 1) * parameter_bytes;
constexpr int stage_bytes = (filled_bytes + 1023) / 1024 * 1024;
constexpr int barriers_bytes = 1024;

typedef StageRing<num_stages, stage_bytes> Ring;

struct Maps { const TensorMap &w, &x, &scales, &zeros; };

__device__ __forceinline__ void produce(const Params& p, const Maps& maps, Ring ring, int column,
                                        int token, int begin, int end) {
  const int group = int(column / p.group_size);
#pragma unroll 1
  for (int s = begin; s < end; ++s, ring.advance()) {
    barrier_wait(ring.empty(), ring.phase ^ 1);
    barrier_expect(ring.full(), filled_bytes);
    const u32 data = ring.data();
    const int row = s * block_n;
    tma_load(data + x_bytes, maps.w, column / 2, row, ring.full());
    if (s == begin) wait_for_predecessors();
#pragma unroll
    for (int c = 0; c < 2; ++c)
      tma_load(data + c * x_column_bytes, maps.x, row * 2 + c * 128, token, ring.full());
    tma_load(data + parameters_at, maps.scales, row * 2, group, ring.full());
    if constexpr (has_zeros)
      tma_load(data + parameters_at + parameter_bytes, maps.zeros, row * 2, group, ring.full());
  }
}

// Where a thread finds its columns of two neighbouring rows, and the same rows' parameters
struct Place {
  int rows[2], parameters;

  __device__ __forceinline__ Place(int lane, int warp, i64 group_size) {
    const int quarter = lane % 4, row8 = lane / 4;
#pragma unroll
    for (int d = 0; d < 2; ++d)  // 16 bytes of a row are a warp's, and swizzled
      rows[d] = x_bytes + (2 * quarter + d) * w_row_bytes + (warp ^ quarter) * 16 + row8 * tiles;
    const int column = (warp * 8 + row8) * lane_columns;
    const int group = groups == 1 ? 0 : column / int(group_size);
    parameters = parameters_at + group * block_n * 2 + quarter * 4;
  }
};

struct Step {
  u32 w[2][2], s[2], z[2];  // of 16 rows: 2 * quarter and the next, and those 8 further on

  __device__ __forceinline__ void load(const char* data, const Place& at, int step) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = step * 16 + h * 8;
#pragma unroll
      for (int d = 0; d < 2; ++d)
        w[h][d] = *reinterpret_cast<const unsigned short*>(data + at.rows[d] + row * w_row_bytes);
      const char* from = data + at.parameters + row * 2;
      s[h] = *reinterpret_cast<const u32*>(from);
      z[h] = has_zeros ? *reinterpret_cast<const u32*>(from + parameter_bytes) : 0;
    }
  }
  __device__ __forceinline__ void fragments(u32 (&a)[tiles][4]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const u32 zeros = prepared(z[h]);
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        const u32 bytes = __byte_perm(w[h][0], w[h][1], 0x4400 + 0x1111 * i);
        a[i][2 * h] = decoded<false>(bytes, s[h], zeros);
        a[i][2 * h + 1] = decoded<true>(bytes, s[h], zeros);
      }
    }
  }
};

typedef float Sums[tiles][values];

__device__ __forceinline__ void multiply(Ring& ring, const char* smem, const Place& at, int count,
                                         int lane, Sums& sums) {
  u32 a[2][tiles][4];
#pragma unroll 1
  for (int s = 0; s < count; s += consumers, ring.advance(consumers)) {
    barrier_wait(ring.full(), ring.phase);
    const u64 x_tile = tile_descriptor(ring.data());
    const char* data = smem + barriers_bytes + ring.stage * stage_bytes;
    Step raw;
    raw.load(data, at, 0);
#pragma unroll
    for (int t = 0; t < steps; ++t) {
      raw.fragments(a[t % 2]);
      if (t + 1 < steps) raw.load(data, at, t + 1);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < tiles; ++i)
        wgmma(sums[i], a[t % 2][i], x_tile + (t / 4 * x_column_bytes + t % 4 * 32) / 16, true);
      wgmma_commit();
      if (t + 1 < steps)
        wgmma_wait<1>();
      else
        wgmma_wait<0>();
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(ring.empty());
  }
#pragma unroll
  for (int i = 0; i < tiles; ++i)
#pragma unroll
    for (int e = 0; e < values; ++e) pin(sums[i][e]);
}

// The sums of a token: neighbouring columns
__device__ __forceinline__ float4 of_slot(const Sums& sums, int slot) {
  const int e = slot / 2 * 4 + slot % 2;
  return make_float4(sums[0][e], sums[0][e + 2], sums[1][e], sums[1][e + 2]);
}
// Four words of shared memory of another block of the cluster
__device__ __forceinline__ uint4 load_remote(u32 smem, int rank) {
  uint4 v;
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [remote];\n}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "r"(smem), "r"(rank)
      : "memory");
  return v;
}
// What a block of the cluster has in the same place as this one
__device__ __forceinline__ float4 left_by(int block, const float4* here) {
  if constexpr (split_n == 1) return *here;
  const uint4 v = load_remote(smem_address(here), block);
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z),
                     __uint_as_float(v.w));
}

__device__ __forceinline__ void store(const Params& p, float4 v, float alpha, i64 token,
                                      i64 column) {
  const u32 packed[2] = {halves<X>(v.x * alpha, v.y * alpha), halves<X>(v.z * alpha, v.w * alpha)};
  if (token < p.m && column < p.k)
    store_global(static_cast<char*>(p.out) + (token * p.k + column) * 2, packed);
}

extern "C" __global__ void __cluster_dims__(split_n, 1, 1) __launch_bounds__(threads, blocks_per_sm)
    transposed_wgmma(const __grid_constant__ Params p, const __grid_constant__ TensorMap w_map,
                     const __grid_constant__ TensorMap x_map,
                     const __grid_constant__ TensorMap s_map,
                     const __grid_constant__ TensorMap z_map) {
  extern __shared__ __align__(1024) char smem[];
  Ring ring{smem_address(smem) + barriers_bytes, smem_address(smem)};
  launch_dependents();
  if (threadIdx.x == 0) {
    prefetch(w_map);
    prefetch(x_map);
#pragma unroll 1
    for (int s = 0; s < num_stages; ++s) {
      barrier_init(ring.barriers + s * 8, 1);
      barrier_init(ring.barriers + (num_stages + s) * 8, 4);
    }
    publish_barriers();
  }
  __syncthreads();

  const int rank = int(blockIdx.x) % split_n, column0 = int(blockIdx.x) / split_n * columns;
  const int token0 = int(blockIdx.y) * block_m;
  const int all = int((p.n + block_n - 1) / block_n);
  const int begin = all * rank / split_n, end = all * (rank + 1) / split_n;
  if (threadIdx.x < 128) {
    give_registers<producer_registers>();
    if (threadIdx.x == 0)
      produce(p, Maps{w_map, x_map, s_map, z_map}, ring, column0, token0, begin, end);
    __syncwarp();
    if constexpr (split_n > 1) {  // as the consumers do
      cluster_meet();
      cluster_meet();
    }
    return;
  }
  take_registers<consumer_registers>();
  wait_for_predecessors();
  const int thread = int(threadIdx.x) - 128, lane = thread % 32, warp = thread / 32 % 4;
  const int consumer = __shfl_sync(~0u, thread / 128, 0);  // ptxas sees that a warp agrees
  Sums sums = {};
  ring.advance(consumer);
  multiply(ring, smem, Place(lane, warp, p.group_size), end - begin - consumer, lane, sums);

  const float alpha = unit * (p.alpha ? load_as_float(p.alpha, 0, int(p.alpha_dtype)) : 1.f);
  const i64 column = column0 + (warp * 8 + lane / 4) * lane_columns;
  auto token_of = [&](int slot) { return token0 + slot / 2 * 8 + lane % 4 * 2 + slot % 2; };
  if constexpr (parts == 1) {
#pragma unroll
    for (int s = 0; s < slots; ++s) store(p, of_slot(sums, s), alpha, token_of(s), column);
    return;
  }
  consumers_sync<consumers * 128>();  // the ring is read to its end, and never filled again
  float4* exchange = reinterpret_cast<float4*>(smem + barriers_bytes) + thread % 128;
#pragma unroll
  for (int s = 0; s < slots; ++s) exchange[(s * consumers + consumer) * 128] = of_slot(sums, s);
  if constexpr (split_n > 1)
    cluster_sync();
  else
    consumers_sync<consumers * 128>();
#pragma unroll
  for (int s = 0; s < own; ++s) {
    const int slot = (rank * consumers + consumer) * own + s;
    if (slot >= slots) break;
    float4 found[parts];
#pragma unroll
    for (int b = 0; b < parts; ++b)
      found[b] = left_by(b / consumers, exchange + (slot * consumers + b % consumers) * 128);
    float4 v = found[0];
#pragma unroll
    for (int b = 1; b < parts; ++b)
      v.x += found[b].x, v.y += found[b].y, v.z += found[b].z, v.w += found[b].w;
    store(p, v, alpha, token_of(slot), column);
  }
  if constexpr (split_n > 1) cluster_meet();  // others may still read this block's sums
}
