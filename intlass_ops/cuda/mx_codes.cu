// Rows of MXFP4 as INT8 codes with one scale a row, exactly: twice a code of e2m1 is an integer up to 12, and
// where the scales of a row's blocks lie within a factor of 8 it has room for what they exceed the
// smallest by. If a row's do not, `failed` becomes 1 and the codes are none: what is launched after this looks
// there (Config::only_if of hopper.cu). Blocks of zeros count for nothing.
//
// A warp takes a row, and a lane half a block at a time: first the scales' range, then the codes.
#include "fp4.cuh"

constexpr int threads = Config::threads, least_scale = 127 - 60, most_scale = 127 + 60, room = 3;

struct Params {
  const unsigned char *codes, *scales;
  uint4* out;  // [num_rows, halves]
  float* row_scales;
  int* failed;
  i64 num_rows, halves, stride, scale_row;  // halves of blocks; bytes from row to row; scale_at
};

// Four codes, nibbles of the lower half of `w`, by a table of what 0..7 stand for and of its negatives
__device__ __forceinline__ u32 four_codes(u32 w, const u32 (&table)[2], const u32 (&minus)[2]) {
  const u32 place = w & 0x7777, negative = __byte_perm(0xff00, 0, w >> 3 & 0x1111);
  return (__byte_perm(table[0], table[1], place) & ~negative) |
         (__byte_perm(minus[0], minus[1], place) & negative);
}

extern "C" __global__ void __launch_bounds__(threads) mx_codes(const __grid_constant__ Params p) {
  launch_dependents();
  wait_for_predecessors();
  const int lane = threadIdx.x % 32, halves = int(p.halves);
  const i64 row = i64(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
  if (row >= p.num_rows || *static_cast<volatile int*>(p.failed)) return;
  const unsigned char* codes = p.codes + row * p.stride;
  auto load = [&](u32(&v)[2], int half) { load_global(v, codes + half * 8); };
  auto scale = [&](int half) {
    return int(p.scales[scale_at<Config::blocked>(row, p.scale_row, half / 2)]);
  };

  int least = 255, most = 0;
#pragma unroll 4
  for (int half = lane; half < halves; half += 32) {
    u32 v[2];
    load(v, half);
    const int s = scale(half);
    if (((v[0] | v[1]) & 0x77777777) || s == 255) least = min(least, s), most = max(most, s);
  }
  least = __reduce_min_sync(~0u, least);
  most = __reduce_max_sync(~0u, most);
  const bool zeros = least > most;
  if (!zeros && (most - least > room || least < least_scale || most > most_scale)) {
    if (lane == 0) *static_cast<volatile int*>(p.failed) = 1;
    return;
  }
  if (lane == 0) p.row_scales[row] = zeros ? 1.f : __uint_as_float((least - 1) << 23);  // of a half
#pragma unroll 4
  for (int half = lane; half < halves; half += 32) {
    u32 v[2], out[4];
    load(v, half);
    const int shift = max(0, min(scale(half) - least, room));
    const u32 table[] = {0x03020100u << shift, 0x0c080604u << shift};
    const u32 minus[] = {__vneg4(table[0]), __vneg4(table[1])};
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = four_codes(v[i / 2] >> i % 2 * 16, table, minus);
    p.out[row * p.halves + half] = make_uint4(out[0], out[1], out[2], out[3]);
  }
}
