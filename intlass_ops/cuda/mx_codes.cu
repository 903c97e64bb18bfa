// Both operands of an MXFP4 product as INT8 codes with one scale a row, exactly: twice a code of e2m1 is an
// integer up to 12, and has room for a factor of 8 beside it. So the scales of a row's blocks must lie
// within a factor of 8 of the largest, but for blocks of zeros. mx_range sees whether they do: it leaves
// each row's scale, and 1 in `failed` if there is a row that none fits. Then what is launched after it does
// nothing (mx_codes, and Config::only_if of hopper.cu). Rows are whole words of four scales.
#include "fp4.cuh"

constexpr int threads = Config::threads;
constexpr int room = 3;                                       // bits that a code has beside its own
constexpr int least_scale = 127 - 60, most_scale = 127 + 60;  // products are no subnormals

struct Params {
  const unsigned char *codes[2], *scales[2];
  uint4* out[2];  // [rows, words * 8]
  float* row_scales[2];
  int* failed;
  i64 rows[2], stride[2], scale_row, words;  // bytes from row to row; scale_at; of four scales
};

// A warp for a row
extern "C" __global__ void __launch_bounds__(threads) mx_range(const __grid_constant__ Params p) {
  launch_dependents();
  wait_for_predecessors();
  const int lane = threadIdx.x % 32, of = blockIdx.y, words = int(p.words);
  const i64 row = i64(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
  if (row >= p.rows[of]) return;
  auto word = [&](int i) {
    return *reinterpret_cast<const u32*>(p.scales[of] +
                                         scale_at<Config::blocked>(row, p.scale_row, i * 4));
  };
  u32 largest = 0;
  for (int i = lane; i < words; i += 32) largest = __vmaxu4(largest, word(i));
  largest = __vmaxu4(largest, largest >> 16);
  const int most = __reduce_max_sync(~0u, max(largest & 255, largest >> 8 & 255));

  const bool fits = least_scale + room <= most && most <= most_scale;
  const int least = fits ? most - room : 256;  // what a block that is not zeros needs
  bool failed = most == 255;                   // no number, nor times zero
  for (int i = lane; i < words; i += 32) {
    const u32 scales = word(i);
#pragma unroll 1
    for (int block = 0; block < 4; ++block) {
      if (int(scales >> block * 8 & 255) >= least) continue;
      u32 v[4];
      load_global(v, p.codes[of] + row * p.stride[of] + (i * 4 + block) * 16);
      failed |= ((v[0] | v[1] | v[2] | v[3]) & 0x77777777) != 0;
    }
  }
  if (__any_sync(~0u, failed) && lane == 0) *p.failed = 1;
  if (lane == 0) p.row_scales[of][row] = fits ? __uint_as_float((least - 1) << 23) : 1.f;  // of 1/2
}

// Four codes, nibbles of the lower half of `w`, by a table of what 0..7 stand for and of its negatives
__device__ __forceinline__ u32 four_codes(u32 w, const u32 (&table)[2], const u32 (&minus)[2]) {
  const u32 place = w & 0x7777, negative = __byte_perm(0xff00, 0, w >> 3 & 0x1111);
  return (__byte_perm(table[0], table[1], place) & ~negative) |
         (__byte_perm(minus[0], minus[1], place) & negative);
}

// A thread takes half a block of a few rows at a time
extern "C" __global__ void __launch_bounds__(threads) mx_codes(const __grid_constant__ Params p) {
  constexpr int rows = Config::rows;
  launch_dependents();
  wait_for_predecessors();
  const int of = blockIdx.z, half = blockIdx.y * threads + threadIdx.x;
  const i64 num_rows = p.rows[of];
  if (half >= p.words * 8 || *p.failed) return;
  for (i64 row0 = i64(blockIdx.x) * rows; row0 < num_rows; row0 += i64(gridDim.x) * rows) {
    u32 v[rows][2];
    int shift[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const i64 row = min(row0 + r, num_rows - 1);  // a repeated row is stored with its own codes
      load_global(v[r], p.codes[of] + row * p.stride[of] + half * 8);
      const int least = (__float_as_int(p.row_scales[of][row]) >> 23) + 1;
      const int s = p.scales[of][scale_at<Config::blocked>(row, p.scale_row, half / 2)];
      shift[r] = max(0, min(s - least, room));  // of zeros whatever
    }
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const i64 row = min(row0 + r, num_rows - 1);
      const u32 table[] = {0x03020100u << shift[r], 0x0c080604u << shift[r]};
      const u32 minus[] = {__vneg4(table[0]), __vneg4(table[1])};
      u32 out[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = four_codes(v[r][i / 2] >> i % 2 * 16, table, minus);
      p.out[of][row * p.words * 8 + half] = make_uint4(out[0], out[1], out[2], out[3]);
    }
  }
}
