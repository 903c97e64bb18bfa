// Codes of a table as fragments by way of shared memory, where there is room for 32 KB and PRMT (lut4.cuh) is what a
// kernel waits for: a byte of two codes is the number of a word that holds both numbers. Each lane has all
// 256 words in a bank of its own, so that no two wait for one another: twelve instructions a word of codes
// in place of 21, which are spread over three pipes.
//
// The kernel says before if it has the room: lut4_in_shared.
#pragma once
#include "problem.cuh"

constexpr bool lut4_pairs_in_shared = lut4_in_shared && looks_up<W>;
__shared__ __align__(16) u32 lut4_pairs[lut4_pairs_in_shared ? 256 * 32 : 4];

// By all threads of the block, before anything is decoded
template <int threads> __device__ __forceinline__ void fill_lut4_pairs() {
  if constexpr (lut4_pairs_in_shared) {
#pragma unroll 1
    for (int i = threadIdx.x; i < 256 * 8; i += threads) {
      u32 f[2];
      four_numbers<X, W>(f, i / 8);
      reinterpret_cast<uint4*>(lut4_pairs)[i] = make_uint4(f[0], f[0], f[0], f[0]);
    }
    __syncthreads();
  }
}

// The numbers of a byte. A product finds them, which the pipe of look-ups and shifts has no part in
__device__ __forceinline__ u32 lut4_pair(u32 byte) {
  u32 at;
  asm("mad.lo.u32 %0, %1, 128, %2;" : "=r"(at) : "r"(byte), "r"(threadIdx.x % 32 * 4));
  return *reinterpret_cast<const u32*>(reinterpret_cast<const char*>(lut4_pairs) + at);
}
template <class X, class W, bool> struct Lut4FewShifts : Pair<X, W> {
  using typename Pair<X, W>::A;
  struct Row {};
  static __device__ __forceinline__ Row zero(float) { return {}; }
  static __device__ __forceinline__ A w(const u32 (&lo)[1], Row, const u32 (&hi)[1], Row) {
    A a;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // PRMT: zeros above
      const u32 byte = 0x4440 + i;
      a.r[i / 2][i % 2 * 2] = lut4_pair(__byte_perm(lo[0], 0, byte));
      a.r[i / 2][i % 2 * 2 + 1] = lut4_pair(__byte_perm(hi[0], 0, byte));
    }
    return a;
  }
};
template <class X, class W> struct Lut4FewShifts<X, W, false> : Pair<X, W> {
  using typename Pair<X, W>::A;
  struct Row {};
  static __device__ __forceinline__ Row zero(float) { return {}; }
  static __device__ __forceinline__ A w(const u32 (&lo)[1], Row, const u32 (&hi)[1], Row) {
    return Pair<X, W>::w(lo, hi);
  }
};
template <class X> struct FewShifts<X, nf4> : Lut4FewShifts<X, nf4, lut4_pairs_in_shared> {};
template <class X> struct FewShifts<X, iq4nl> : Lut4FewShifts<X, iq4nl, lut4_pairs_in_shared> {};
template <class X> struct FewShifts<X, fp4> : Lut4FewShifts<X, fp4, lut4_pairs_in_shared> {};
template <class X> struct FewShifts<X, bnbfp4> : Lut4FewShifts<X, bnbfp4, lut4_pairs_in_shared> {};
