// Scales and zero points of a block's rows, group by group, on their way through shared memory: each
// thread fetches those of one row, and a lane finds those of its rows side by side.
#pragma once
#include "gemm_tile.cuh"

// What a row's scale and zero point become: floats, or where weights take them, halves of a word
template <class F> struct GroupTable {
  static constexpr bool floats = in_tables && !scaled, used = in_tables;
  static constexpr int entry_bytes = (floats ? 4 : 2) * (has_zeros ? 2 : 1);
  static constexpr int lane_words = lane_rows * entry_bytes / 4, bytes = block_n * entry_bytes;
  static_assert(!used || block_n <= threads, "a thread for each row");

  char* entries;       // of the group being summed, and of the next
  const Scale* scale;  // of the thread's row, in the group after those
  const Zero* zero;
  Scale s;
  Zero z;
  int tiles, left, unread;  // tiles of K in a group, and in this one; groups
  bool odd = false;

  __device__ __forceinline__ GroupTable(const Params& p, char* entries, i64 n0, i64 k_begin)
      : entries(entries) {
    if constexpr (used) {
      const i64 row = min(n0 + threadIdx.x, p.n - 1), group_size = floats ? block_k : p.group_size;
      // A stripe may be empty, and past the end of K.
      const i64 group = min(k_begin, p.k - group_size) / group_size;
      scale = static_cast<const Scale*>(p.scales) + row * p.scale_row + group * p.scale_group;
      zero = static_cast<const Zero*>(p.zeros) + row * p.zero_row + group * p.zero_group;
      tiles = int(group_size / block_k);
      left = int(((group + 1) * group_size - k_begin) / block_k);
      unread = int(p.k / group_size - group);
      fetch(p);
      write(entries);
      fetch(p);
    }
  }
  __device__ __forceinline__ void fetch(const Params& p) {
    s = *scale;
    if constexpr (has_zeros) z = *zero;
    if (--unread <= 0) return;
    scale += p.scale_group;
    zero += p.zero_group;
  }
  __device__ __forceinline__ void write(char* to) const {
    if (block_n < threads && threadIdx.x >= block_n) return;
    to += threadIdx.x * entry_bytes;
    if constexpr (floats) {
      reinterpret_cast<float*>(to)[0] = in_units_of_scale(s);
      if constexpr (has_zeros) reinterpret_cast<float*>(to)[1] = in_units_of_zero(z);
    } else if constexpr (scaled && has_zeros) {
      *reinterpret_cast<u32*>(to) = F::entry(as_float(s), as_float(z));
    } else if constexpr (scaled) {
      *reinterpret_cast<unsigned short*>(to) = F::entry(as_float(s));
    }
  }
  // Those of the next group, in a tile of K that is the last of its own. Between this and the next
  // reading of them, and the last one of what they replace, there is a barrier.
  __device__ __forceinline__ void write_next(const Params& p) {
    if (!used || (!floats && left > 1)) return;
    write(entries + (odd ? 0 : bytes));
    fetch(p);
  }
  // One tile of K less; true if a group begins with the next.
  __device__ __forceinline__ bool next() {
    if (!floats && --left > 0) return false;
    left = tiles;
    odd = !odd;
    return true;
  }
  // Of the lane's rows
  __device__ __forceinline__ void read(u32 (&v)[lane_words]) const {
    const int row = (threadIdx.x / 32 % warps_n * 8 + threadIdx.x % 32 / 4) * lane_rows;
    const char* from = entries + (odd ? bytes : 0) + row * entry_bytes;
    if constexpr (lane_words < 4) {
      load_shared(v, from);
    } else {
#pragma unroll
      for (int i = 0; i < lane_words; i += 4) {
        u32 four[4];
        load_shared(four, from + 4 * i);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i + j] = four[j];
      }
    }
  }
};
