// Moving tiles: cp.async rings, swizzled shared memory, typed scalar loads.
#pragma once
#include "operands.cuh"

typedef long long i64;

// dtype of a pointer that is read once per output: a run-time code, since it costs nothing there
enum Dtype : int { none_t, f32_t, bf16_t, fp16_t, i32_t, i8_t, u8_t };

__device__ __forceinline__ float load_as_float(const void* p, i64 i, int dtype) {
  switch (dtype) {
    case f32_t: return static_cast<const float*>(p)[i];
    case bf16_t: return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    case fp16_t: return __half2float(static_cast<const __half*>(p)[i]);
    case i32_t: return float(static_cast<const int*>(p)[i]);
    case i8_t: return float(static_cast<const signed char*>(p)[i]);
    default: return float(static_cast<const unsigned char*>(p)[i]);
  }
}

template <class T> __device__ __forceinline__ float as_float(T v) { return float(v); }

__device__ __forceinline__ void store_rounded(float* p, float v) { *p = v; }
__device__ __forceinline__ void store_rounded(__nv_bfloat16* p, float v) {
  *p = __float2bfloat16_rn(v);
}
__device__ __forceinline__ void store_rounded(__half* p, float v) { *p = __float2half_rn(v); }

// int32 to float, rounded to odd: a later rounding to a narrower type is then the only one
__device__ __forceinline__ float to_float_odd(int v) {
  const float f = __int2float_rz(v);
  return __float2int_rz(f) == v ? f : __int_as_float(__float_as_int(f) | 1);
}

__device__ __forceinline__ u32 smem_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

// Kernels that start early (early_launch.py): let the next one start, and wait until those before have
// ended and what they wrote is there.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_predecessors() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void prefetch_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// 16 bytes from global memory, or zeros
__device__ __forceinline__ void cp_async_16(u32 smem, const void* gmem, bool zeros) {
  asm volatile(
      "{.reg .pred zeros; setp.ne.b32 zeros, %2, 0; "
      "cp.async.cg.shared.global [%0], [%1], 16, zeros;}" ::"r"(smem),
      "l"(gmem), "r"(int(zeros))
      : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }
template <int n> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// Plain loads, which the compiler may move ahead of the MMAs but not across a barrier.
template <int words>
__device__ __forceinline__ void load_shared(u32 (&v)[words], const char* from) {
  if constexpr (words == 4) {
    const uint4 t = *reinterpret_cast<const uint4*>(from);
    v[0] = t.x, v[1] = t.y, v[2] = t.z, v[3] = t.w;
  } else if constexpr (words == 2) {
    const uint2 t = *reinterpret_cast<const uint2*>(from);
    v[0] = t.x, v[1] = t.y;
  } else {
    v[0] = *reinterpret_cast<const u32*>(from);
  }
}

// Four, two or one 8x8 matrices of 16-bit words, one register of a lane each; every eight lanes give
// the addresses of the eight rows of one matrix.
template <int count> __device__ __forceinline__ void load_matrices(u32* r, u32 smem) {
  static_assert(count == 4 || count == 2 || count == 1, "what ldmatrix loads");
  if constexpr (count == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem)
                 : "memory");
  else if constexpr (count == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(smem)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(smem)
                 : "memory");
}

// `count` words of this lane alone
template <int count> __device__ __forceinline__ void load_words(u32* r, u32 smem) {
  static_assert(count == 4 || count == 2, "half a chunk or all of it");
  if constexpr (count == 4)
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem)
                 : "memory");
  else
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(smem) : "memory");
}

// Neighbouring words of global memory, in loads of up to 16 bytes; not __ldg: another kernel may have
// been writing them when this one started
template <int words>
__device__ __forceinline__ void load_global(u32 (&v)[words], const void* from) {
  if constexpr (words % 4 == 0) {
#pragma unroll
    for (int i = 0; i < words; i += 4) {
      const uint4 t = static_cast<const uint4*>(from)[i / 4];
      v[i] = t.x, v[i + 1] = t.y, v[i + 2] = t.z, v[i + 3] = t.w;
    }
  } else if constexpr (words == 2) {
    const uint2 t = *static_cast<const uint2*>(from);
    v[0] = t.x, v[1] = t.y;
  } else {
#pragma unroll
    for (int i = 0; i < words; ++i) v[i] = static_cast<const u32*>(from)[i];
  }
}

// Neighbouring words to global memory, in stores of up to 16 bytes
template <int words> __device__ __forceinline__ void store_global(void* to, const u32 (&v)[words]) {
  if constexpr (words % 4 == 0) {
#pragma unroll
    for (int i = 0; i < words; i += 4)
      static_cast<uint4*>(to)[i / 4] = make_uint4(v[i], v[i + 1], v[i + 2], v[i + 3]);
  } else if constexpr (words == 2) {
    *static_cast<uint2*>(to) = make_uint2(v[0], v[1]);
  } else {
#pragma unroll
    for (int i = 0; i < words; ++i) static_cast<u32*>(to)[i] = v[i];
  }
}
