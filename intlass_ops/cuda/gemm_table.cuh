// Scales and zero points of a block's rows, for weights that take them, on their way through shared
// memory: each thread fetches those of one row, and a lane finds those of its rows side by side.
#pragma once
#include "gemm_tile.cuh"

// Of the group being summed and of the next; groups are whole tiles of K. Or, if they are steps, of those of
// a tile and of the next.
template <class F> struct GroupTable {
  static constexpr int entry_bytes = (split_scales ? 4 : 2) * (1 + has_zeros);
  static constexpr int group_bytes = block_n * entry_bytes, bytes = tile_scales * group_bytes;
  static constexpr int lane_words = lane_rows * entry_bytes / 4;
  static_assert(!scaled || block_n <= threads, "a thread for each row");

  char* entries;
  const Scale* scale;  // of the thread's row, in the group after those it has
  const Zero* zero;
  Scale s, second;  // of a step
  Zero z;
  int tiles, left, unread;  // tiles of K in a group, and in this one; groups
  bool odd = false;

  __device__ __forceinline__ GroupTable(const Params& p, char* entries, i64 n0, i64 k_begin)
      : entries(entries) {
    if constexpr (scaled) {
      const i64 row = min(n0 + threadIdx.x, p.n - 1);
      // A stripe may be empty, and past the end of K.
      const i64 group = min(k_begin, p.k - p.group_size) / p.group_size;
      scale = static_cast<const Scale*>(p.scales) + row * p.scale_row + group * p.scale_group;
      zero = static_cast<const Zero*>(p.zeros) + row * p.zero_row + group * p.zero_group;
      tiles = int(p.group_size / block_k);
      left = int(((group + 1) * p.group_size - k_begin) / block_k);
      unread = int(p.k / p.group_size - group);
      fetch(p);
#pragma unroll
      for (int g = 0; g < tile_scales; g += step_scales) {
        write(entries + g * group_bytes);
        fetch(p);
      }
    }
  }
  __device__ __forceinline__ void fetch(const Params& p) {
    fetch(p, s);
    if constexpr (step_scales == 2) fetch(p, second);
  }
  __device__ __forceinline__ void fetch(const Params& p, Scale& s) {
    s = *scale;
    if constexpr (has_zeros) z = *zero;
    if (--unread <= 0) return;
    scale += p.scale_group;
    zero += p.zero_group;
  }
  __device__ __forceinline__ void write(char* to) const {
    if (block_n < threads && threadIdx.x >= block_n) return;
    to += threadIdx.x * entry_bytes;
    write_entry(to, s);
    if constexpr (step_scales == 2) write_entry(to + group_bytes, second);
  }
  __device__ __forceinline__ void write_entry(char* to, Scale s) const {
    if constexpr (split_scales) {
      u32* words = reinterpret_cast<u32*>(to);
      words[0] = split_scale(as_float(s) * scale_factor);
      if constexpr (has_zeros)
        words[1] = split_offset(Nibbles<X>::bottom(as_float(z)), 1 / F::unit, as_float(s));
    } else if constexpr (same<W, e2m1>::value)
      *reinterpret_cast<unsigned short*>(to) = F::entry(s);
    else if constexpr (has_zeros)
      *reinterpret_cast<u32*>(to) = F::entry(as_float(s), as_float(z));
    else
      *reinterpret_cast<unsigned short*>(to) = F::entry(as_float(s));
  }
  // Those of the next group, in the last tile of K of this one; or of a step's in the next tile. Between
  // this and the next reading of them, and the last one of what they replace, there is a barrier.
  __device__ __forceinline__ void write_next(const Params& p, int step) {
    if (of_span ? false : step > 0 || left > 1) return;
    write(entries + (odd ? 0 : bytes) + (of_span ? step * step_scales * group_bytes : 0));
    fetch(p);
  }
  // One tile of K less; true if a group begins with the next.
  __device__ __forceinline__ bool next() {
    if (!of_span && --left > 0) return false;
    left = tiles;
    odd = !odd;
    return true;
  }
  // Of the lane's rows, for a step
  __device__ __forceinline__ void read(u32 (&v)[lane_words], int step) const {
    const int row = (threadIdx.x / 32 % warps_n * 8 + threadIdx.x % 32 / 4) * lane_rows;
    const char* from = entries + (odd ? bytes : 0) + row * entry_bytes;
    if constexpr (of_span) from += step * step_scales * group_bytes;
    if constexpr (step_scales == 2) from += threadIdx.x % 4 / 2 * group_bytes;  // the lane's k
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
