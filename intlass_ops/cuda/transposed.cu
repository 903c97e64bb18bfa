// x @ w for few tokens and an INT4 weight as it lies: dX of the GEMM that multiplies by its transpose.
//
//     y[m, k] = alpha * sum over n of x[m, n] * w[n, k],     w[n, k] = (q[n, k] - z[n, g]) * s[n, g]
//
// The sum runs over the rows of W. Tensor cores want neighbours of the sum in one register, so a
// lane loads the same bytes of eight rows and pairs their nibbles up; no weight passes through shared
// memory. A warp owns 64 columns of W and takes 32 rows of it at a time:
//
//                  | lane/4 = 0 | lane/4 = 1 | ... | lane/4 = 7 |     4 bytes each
//      rows  0..7  |                lane%4 = 0                  |
//      rows  8..15 |                lane%4 = 1                  |
//           ...    |
//
// Byte b of these rows holds columns 2b and 2b + 1 of the lane: rows lane/4 and lane/4 + 8 of one
// A tile of the MMA, whose sixteen k are the rows of W in the order in which x is loaded too.
// q - z and its product with s are rounded to x's type, the former exactly where z is an integer. The
// warps of a block and then the stripes of N, on Hopper a cluster's blocks, add up in their order: a
// result does not depend on timing.
#include "hopper.cuh"
#include "transposed.cuh"

struct Params {
  const char *x, *w;
  const void *scales, *zeros, *alpha;
  void* out;
  float* workspace;                 // stripes > 1: [tiles, stripes, values of a block]
  int* arrivals;                    // stripes > 1: one zero per tile, left at zero
  i64 m, n, k, x_stride, w_stride;  // strides in bytes
  i64 group_size, scale_row, scale_group, zero_row, zero_group, alpha_dtype;  // strides in elements
};

constexpr int lane_bytes = 4, lane_k = 2 * lane_bytes, columns = 8 * lane_k;
constexpr int step_n = 32, depth = 2;  // rows of a step, and how many a warp has in flight
constexpr int tiles_m = Config::tiles_m, tokens = 8 * tiles_m;
constexpr int warps_m = Config::warps_m, warps_n = Config::warps_n,
              threads = 32 * warps_m * warps_n;
constexpr int values = lane_bytes * tiles_m * 4;  // of a lane
constexpr int cluster = Config::cluster;          // its stripes, or 1: none, or through memory
static_assert((warps_n & (warps_n - 1)) == 0, "the warps' sums meet in a tree");

typedef float Sums[lane_bytes][tiles_m][4];

struct Step {
  u32 w[8];
  u32 s[4], z[4];  // of rows 2i and 2i + 1
  u32 x[tiles_m][4];
};

__device__ __forceinline__ void load(u32 (&v)[4], const void* from) {
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "l"(from));
}
__device__ __forceinline__ void load(u32& v, const void* from) {
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(from));
}

__device__ __forceinline__ void clear(u32 (&v)[4]) { v[0] = v[1] = v[2] = v[3] = 0; }

// Eight parameters of neighbouring rows, in pairs
__device__ __forceinline__ void load_parameters(u32 (&v)[4], const unsigned short* from, i64 row) {
  if constexpr (Config::parameter_vectors) {
    load(v, from);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = from[2 * i * row] | u32(from[(2 * i + 1) * row]) << 16;
  }
}

__device__ __forceinline__ void use(Sums& sums, const Step& step) {
  u32 z[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) z[i] = prepared(step.z[i]);
#pragma unroll
  for (int b = 0; b < lane_bytes; ++b) {
    u32 even[4], odd[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 bytes = __byte_perm(step.w[2 * i], step.w[2 * i + 1], 0x4400 + 0x1111 * b);
      even[i] = decoded<false>(bytes, step.s[i], z[i]);
      odd[i] = decoded<true>(bytes, step.s[i], z[i]);
    }
    const u32 first[4] = {even[0], odd[0], even[1], odd[1]};
    const u32 second[4] = {even[2], odd[2], even[3], odd[3]};
#pragma unroll
    for (int j = 0; j < tiles_m; ++j) {
      const u32 x0[2] = {step.x[j][0], step.x[j][1]}, x1[2] = {step.x[j][2], step.x[j][3]};
      mma_16816(sums[b][j], first, x0, X{});
      mma_16816(sums[b][j], second, x1, X{});
    }
  }
}

// The sums of the warps that share out N end up in the first of them, `place` one of its lanes.
__device__ __forceinline__ void add_warps(float* sums, int warp_n, int place) {
  extern __shared__ float shared[];
  constexpr int room = warps_m * 32;
#pragma unroll
  for (int half = warps_n / 2; half; half /= 2) {
    float* slot = shared + (warp_n % half * values) * room + place;
    if (warp_n >= half && warp_n < 2 * half)
#pragma unroll
      for (int v = 0; v < values; ++v) slot[v * room] = sums[v];
    __syncthreads();
    if (warp_n < half)
#pragma unroll
      for (int v = 0; v < values; ++v) sums[v] += slot[v * room];
    if (half > 1) __syncthreads();
  }
}

// Whether this block has come last of those that share a tile, and so holds the sums of all.
__device__ __forceinline__ bool add_stripes(const Params& p, float* sums, int warp_n, int place) {
  __shared__ bool last;
  constexpr int room = warps_m * 32;
  const int tile = blockIdx.y * gridDim.x + blockIdx.x, stripes = gridDim.z;
  float* parts = p.workspace + i64(tile) * stripes * values * room + place;
  if (warp_n == 0)
#pragma unroll
    for (int v = 0; v < values; ++v) __stcg(parts + (i64(blockIdx.z) * values + v) * room, sums[v]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(p.arrivals + tile, 1) == stripes - 1;
    if (last) p.arrivals[tile] = 0;
  }
  __syncthreads();
  if (!last || warp_n) return false;
  __threadfence();
#pragma unroll
  for (int v = 0; v < values; ++v) sums[v] = 0;
#pragma unroll 1
  for (int s = 0; s < stripes; ++s)
#pragma unroll
    for (int v = 0; v < values; ++v) sums[v] += __ldcg(parts + (i64(s) * values + v) * room);
  return true;
}

// The same of a cluster: its first block has the others' sums pushed to its shared memory.
__device__ __forceinline__ bool add_cluster(float* sums, int warp_n, int place) {
  extern __shared__ float shared[];
  constexpr int room = warps_m * 32;
  float* parts = shared + values * room * (warps_n / 2) + place * 4;
  cluster_wait();  // the first has begun
  if (blockIdx.z && warp_n == 0)
#pragma unroll
    for (int v = 0; v < values; v += 4)
      store_remote(smem_address(parts + ((blockIdx.z - 1) * values + v) * room), 0,
                   make_uint4(__float_as_uint(sums[v]), __float_as_uint(sums[v + 1]),
                              __float_as_uint(sums[v + 2]), __float_as_uint(sums[v + 3])));
  cluster_sync();
  if (blockIdx.z || warp_n) return false;
#pragma unroll
  for (int s = 0; s < cluster - 1; ++s)
#pragma unroll
    for (int v = 0; v < values; v += 4) {
      const float4 other = *reinterpret_cast<const float4*>(parts + (s * values + v) * room);
      sums[v] += other.x, sums[v + 1] += other.y, sums[v + 2] += other.z, sums[v + 3] += other.w;
    }
  return true;
}

#if __CUDA_ARCH__ >= 900
#define CLUSTER __cluster_dims__(1, 1, cluster)
#else
#define CLUSTER
#endif
extern "C" __global__ void CLUSTER __launch_bounds__(threads, 1)
    transposed(const __grid_constant__ Params p) {
  if constexpr (cluster > 1) cluster_arrive();
  launch_dependents();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row8 = lane / 4, quarter = lane % 4;
  const int warp_m = warp % warps_m, warp_n = warp / warps_m;
  const int column = int(blockIdx.x) * columns + row8 * lane_k;
  const i64 token0 = (i64(blockIdx.y) * warps_m + warp_m) * tokens;
  const bool inside_k = column < int(p.k);
  const int group = (inside_k ? column : 0) / int(p.group_size);

  const int n = int(p.n), all_steps = (n + step_n - 1) / step_n;
  const int steps = (all_steps + gridDim.z - 1) / gridDim.z, begin = blockIdx.z * steps;
  const int end = min(begin + steps, all_steps);
  // A lane's rows of the next step, and where it finds what belongs to them: pointers that move along,
  // since a product by a stride is four instructions.
  const int limit = inside_k ? min(end * step_n, n) : 0;
  constexpr int stride = warps_n * step_n;
  int row = (begin + warp_n) * step_n + quarter * 8;
  const char* w = p.w + row * p.w_stride + column / 2;
  const char* x[tiles_m];
#pragma unroll
  for (int j = 0; j < tiles_m; ++j)  // a repeated token is never stored
    x[j] = p.x + min(token0 + j * 8 + row8, p.m - 1) * p.x_stride + row * 2;
  const unsigned short* scales =
      static_cast<const unsigned short*>(p.scales) + group * p.scale_group + row * p.scale_row;
  const unsigned short* zeros =
      static_cast<const unsigned short*>(p.zeros) + group * p.zero_group + row * p.zero_row;

  auto load_codes = [&](Step& step) {
    const char* from = w;
#pragma unroll
    for (int i = 0; i < 8; ++i, from += p.w_stride) {
      step.w[i] = 0;
      if (row < limit) load(step.w[i], from);
    }
    w += stride * p.w_stride;
  };
  auto load_rest = [&](Step& step) {
    clear(step.s);
    clear(step.z);
    if (row < limit) {
      load_parameters(step.s, scales, p.scale_row);
      if constexpr (has_zeros) load_parameters(step.z, zeros, p.zero_row);
    }
    scales += stride * p.scale_row, zeros += stride * p.zero_row;
#pragma unroll
    for (int j = 0; j < tiles_m; ++j) {
      clear(step.x[j]);
      if (row < limit) load(step.x[j], x[j]);
      x[j] += stride * 2;
    }
    row += stride;
  };

  Sums sums = {};
  Step step[depth];
  load_codes(step[0]);
  wait_for_predecessors();
  load_rest(step[0]);
#pragma unroll 1
  for (int first = begin + warp_n; first < end; first += depth * warps_n)
#pragma unroll
    for (int d = 0; d < depth; ++d) {
      Step& next = step[(d + 1) % depth];
      load_codes(next);
      load_rest(next);
      use(sums, step[d]);
    }

  float* all = &sums[0][0][0];
  const int place = warp_m * 32 + lane;
  if constexpr (warps_n > 1) add_warps(all, warp_n, place);
  if constexpr (cluster > 1) {
    if (!add_cluster(all, warp_n, place)) return;
  } else if (gridDim.z > 1) {
    if (!add_stripes(p, all, warp_n, place)) return;
  }
  if (warp_n || !inside_k) return;
  const float alpha = unit * (p.alpha ? load_as_float(p.alpha, 0, p.alpha_dtype) : 1.f);
#pragma unroll
  for (int j = 0; j < tiles_m; ++j)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const i64 token = token0 + j * 8 + quarter * 2 + c;
      u32 v[lane_bytes];
#pragma unroll
      for (int b = 0; b < lane_bytes; ++b)
        v[b] = halves<X>(sums[b][j][c] * alpha, sums[b][j][2 + c] * alpha);
      if (token < p.m) store_global(static_cast<char*>(p.out) + (token * p.k + column) * 2, v);
    }
}
