// Sums of each token over spans of k, for the zero points of hopper.cu: sums[span, m], fp32, tokens
// side by side, zero past the end of K and of M. A group of lanes sums a span, always in the same
// order; lanes past the last span of the block hold sums that nobody stores.
#include "memory.cuh"

using X = Config::x_kind;
constexpr int span = Config::span, tokens = Config::tokens, spans = Config::spans;
constexpr int threads = Config::threads;
constexpr int lanes = span * X::bits / 128;  // that hold a span, 16 bytes each
static_assert(tokens == 32, "a lane stores a token");
static_assert(lanes >= 1 && lanes <= 32 && (lanes & (lanes - 1)) == 0, "a span is whole vectors");

__device__ __forceinline__ float sum_of(u32 v, s8) { return float(__dp4a(int(v), 0x01010101, 0)); }
__device__ __forceinline__ float sum_of(u32 v, bf16) {
  return __uint_as_float(v << 16) + __uint_as_float(v & 0xffff0000);
}
__device__ __forceinline__ float sum_of(u32 v, fp16) {
  const float2 f = __half22float2(reinterpret_cast<const __half2&>(v));
  return f.x + f.y;
}

struct Params {
  const char* x;
  float* sums;
  i64 m, k, x_stride, num_spans, sums_row;  // x_stride in bytes, sums_row in floats
};

extern "C" __global__ void __launch_bounds__(threads) token_sums(const __grid_constant__ Params p) {
  __shared__ float tile[spans][tokens + 1];
  const i64 m0 = i64(blockIdx.x) * tokens, span0 = i64(blockIdx.y) * spans;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int per_warp = 32 / lanes;  // spans a warp reads at once
#pragma unroll
  for (int t = warp; t < tokens; t += threads / 32)
#pragma unroll
    for (int s = 0; s < spans; s += per_warp) {
      const int mine = s + lane / lanes;
      const i64 byte = ((span0 + mine) * span * X::bits / 8) + lane % lanes * 16;
      const i64 bytes = p.k * X::bits / 8 - byte;
      float sum = 0;
      if (m0 + t < p.m && bytes > 0) {
        u32 v[4] = {0, 0, 0, 0};
        const char* from = p.x + (m0 + t) * p.x_stride + byte;
        if (bytes >= 16) {
          const uint4 q = *reinterpret_cast<const uint4*>(from);
          v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
        } else {
#pragma unroll
          for (int b = 0; b < 16; ++b)
            if (b < bytes) v[b / 4] |= u32(static_cast<unsigned char>(from[b])) << (8 * (b % 4));
        }
        sum = (sum_of(v[0], X{}) + sum_of(v[1], X{})) + (sum_of(v[2], X{}) + sum_of(v[3], X{}));
      }
#pragma unroll
      for (int d = lanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
      if (lane % lanes == 0 && mine < spans) tile[mine][t] = sum;
    }
  __syncthreads();
  for (int s = warp; s < spans; s += threads / 32)
    if (span0 + s < p.num_spans && m0 + lane < p.sums_row)
      p.sums[(span0 + s) * p.sums_row + m0 + lane] = tile[s][lane];
}
