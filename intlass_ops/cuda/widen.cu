// INT4 activations as INT8, for GPUs whose tensor cores take no INT4: codes[m, k] of packed [M, K/2], rows
// of the result a multiple of 16 bytes. A block has a row or a part of one, a thread the codes of `vector`
// bytes.
#include "memory.cuh"

constexpr int vector = Config::vector, threads = Config::threads;
static_assert(vector == 16 || vector == 1, "rows that are whole vectors, or bytes");

struct Params {
  const char* packed;
  char* codes;
  i64 row_vectors, packed_stride, codes_stride;  // bytes from row to row
};

// The low nibbles of a word's bytes, as bytes
__device__ __forceinline__ u32 low_codes(u32 v) {
  v &= 0x0f0f0f0f;
  return Config::is_signed ? v | (v & 0x08080808) * 0x1e : v;  // 8 * 0x1e is 0xf0
}

__device__ __forceinline__ void widen_vector(const char* from, char* to) {
  if constexpr (vector == 16) {
    const uint4 q = *reinterpret_cast<const uint4*>(from);
    const u32 w[4] = {q.x, q.y, q.z, q.w};
    u32 v[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const u32 even = low_codes(w[j]), odd = low_codes(w[j] >> 4);
      if constexpr (Config::lane_order)
        v[j] = even, v[4 + j] = odd;
      else
        v[2 * j] = __byte_perm(even, odd, 0x5140), v[2 * j + 1] = __byte_perm(even, odd, 0x7362);
    }
    store_global(to, v);
  } else {
    const u32 w = static_cast<unsigned char>(*from);
    to[0] = char(low_codes(w)), to[1] = char(low_codes(w >> 4));
  }
}

extern "C" __global__ void __launch_bounds__(threads) widen(const __grid_constant__ Params p) {
  launch_dependents();
  wait_for_predecessors();
  const char* from = p.packed + blockIdx.x * p.packed_stride;
  char* to = p.codes + blockIdx.x * p.codes_stride;
#pragma unroll 1
  for (i64 i = blockIdx.y * threads + threadIdx.x; i < p.row_vectors; i += gridDim.y * threads)
    widen_vector(from + i * vector, to + i * (2 * vector));
}
