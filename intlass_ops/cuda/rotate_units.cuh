// What rotate_quantize.cu and rotate_hopper.cu have in common: parameters, formats, how x is cut into
// units and how these come into shared memory.
#pragma once
#include "memory.cuh"
#include "mma.cuh"

struct Params {
  const void* x;
  const void* h;
  void* codes;
  void* scales;
  unsigned char* mask;
  i64 pieces, group_pieces;    // in x, in a group (1 for quads)
  float global_scale, spread;  // spread: the scale over the group's rms or standard deviation
};

using T = Config::x_type;
constexpr int R = Config::rotation, tiles = Config::tiles, stages = Config::stages;
enum Format { int8, int4, mx, nv };
constexpr int format = Config::format, bits = Config::bits;  // of a code as it is stored
enum Scope { quads, table, block, twice };
constexpr int scope = Config::scope;
constexpr bool integers = format == int8 || format == int4, quest = Config::quest;
template <bool first, class A, class B> struct Choose { using type = A; };
template <class A, class B> struct Choose<false, A, B> { using type = B; };
using Kind = typename Choose<same<T, __half>::value, fp16, bf16>::type;
constexpr int piece = R < 32 ? R : 32;  // values

// The units that one of several takers has, one after the other: pieces [first, first + count) of x,
// none at its end. A unit has at most `capacity`.
template <int capacity> struct Units {
  const int group, size;            // pieces of a group, and of a unit or a longer group
  const i64 stride;                 // from a unit of a taker's to its next
  i64 first, left;                  // pieces from the first one's on
  int at = 0;                       // twice: pieces of the group before this unit
  bool searching = scope == twice;  // for the scale

  __device__ __forceinline__ Units(const Params& p, int taker, int takers)
      : group(int(p.group_pieces)),
        size(scope == quads   ? capacity
             : scope == table ? capacity / group * group
                              : group),
        stride(takers * i64(size)) {
    first = taker * i64(size), left = p.pieces - first;
  }
  __device__ __forceinline__ int count() const {
    if (left <= 0) return 0;
    return scope == twice ? min(capacity, size - at) : int(min(i64(size), left));
  }
  __device__ __forceinline__ bool ends_group() const { return at + capacity >= size; }
  __device__ __forceinline__ void advance() {
    if constexpr (scope == twice) {
      const bool more = at + capacity < size;
      at = more ? at + capacity : 0;
      if (more) return;
      searching = !searching;
      if (!searching) return;
    }
    first += stride, left -= stride;
  }
};

// Starts to copy a unit of Layout::capacity pieces into a stage of the ring, its end as zeros. A
// thread's 16 bytes lie Layout::threads chunks apart.
template <class Layout, class Units>
__device__ __forceinline__ void fill(const Params& p, const Units& units, u32 stage, int thread) {
  constexpr int threads = Layout::threads, row_chunks = Layout::row_chunks;
  const int bytes = units.count() * int(piece * sizeof(T));
  if (bytes) {
    const char* from = static_cast<const char*>(p.x) +
                       (units.first + units.at) * i64(piece * sizeof(T)) + thread * 16;
#pragma unroll
    for (int i = 0; i < Layout::rows * row_chunks / threads; ++i) {
      const int row = thread / row_chunks + i * (threads / row_chunks);
      cp_async_16(stage + Layout::chunk_at(row, thread % row_chunks), from + i * threads * 16,
                  (i * threads + thread) * 16 >= bytes);
    }
  }
  cp_async_commit();
}
