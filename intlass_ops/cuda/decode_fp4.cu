// Rows of FP4 codes and the scales of their blocks to bf16 or fp16, exactly: the numbers divided by
// block_unit (fp4.cuh), or as bf16 with e4m3 the numbers. For products of many tokens, where decoding
// the activations costs little beside the product. A thread takes eight numbers of a few rows at a
// time: neighbouring k, or in `lane_order` two of each word of 32 k, as a lane of hopper.cu takes
// them.
#include "fp4.cuh"

using Scale = Config::scale_type;
constexpr int threads = Config::threads, rows = Config::rows;
constexpr bool lane_order = Config::lane_order;
constexpr int words = lane_order ? 4 : 1;  // of eight codes, that are read
constexpr int blocks = lane_order ? 32 / block_size<Scale> : 1;

struct Params {
  const unsigned char *codes, *scales;
  uint4* out;                              // [num_rows, words]
  const int* flag;                         // Config::only_if
  i64 num_rows, words, stride, scale_row;  // words of eight codes; bytes from row to row; scale_at
};

// Nibbles i and i + 4 of a word
__device__ __forceinline__ u32 two_codes(u32 w, int i, Factor factor) {
  w >>= 4 * i;
  return scaled_codes<Scale>(of_fp16 ? and_or(w << 12, 0x80008000, w << 9 & 0x0e000e00)
                                     : (w & 0x000f000f) * 0x1040 & 0x81c081c0,
                             factor);
}

extern "C" __global__ void __launch_bounds__(threads) decode_fp4(const __grid_constant__ Params p) {
  launch_dependents();
  wait_for_predecessors();
  if (Config::only_if >= 0 && *p.flag != Config::only_if) return;  // mx_codes.cu
  const i64 row0 = i64(blockIdx.x) * rows, word = i64(blockIdx.y) * threads + threadIdx.x;
  if (word >= p.words) return;
  const i64 first = word / words * words;
  u32 codes[rows][words];
  SpanScales<Scale> scales[rows];
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    const i64 row = min(row0 + r, p.num_rows - 1);
    load_global(codes[r], p.codes + row * p.stride + first * 4);
    const unsigned char* from =
        p.scales + scale_at<Config::blocked>(row, p.scale_row, int(first * 8 / block_size<Scale>));
    if constexpr (blocks == 2)
      scales[r].codes = *reinterpret_cast<const unsigned short*>(from);
    else
      scales[r].codes = *from;
  }
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    if (row0 + r >= p.num_rows) return;
    u32 f[4];
    if constexpr (lane_order)
#pragma unroll
      for (int q = 0; q < 4; ++q)
        f[q] = two_codes(codes[r][q], int(word % 4), scales[r].factor(q * blocks / 4, true));
    else  // pairs k with k + 4
      eight_codes<Scale>(codes[r][0], scales[r].factor(0, true), f);
    if constexpr (same<Scale, e4m3>::value && !of_fp16)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        f[i] = fma2<bf16>(f[i], 0x43804380, minus_zeros);  // its unit, 256
    uint4& out = p.out[(row0 + r) * p.words + word];
    if constexpr (lane_order)
      out = make_uint4(f[0], f[1], f[2], f[3]);
    else
      out = make_uint4(__byte_perm(f[0], f[1], 0x5410), __byte_perm(f[2], f[3], 0x5410),
                       __byte_perm(f[0], f[1], 0x7632), __byte_perm(f[2], f[3], 0x7632));
  }
}
