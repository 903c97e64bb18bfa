// Rows of FP4 codes and the scales of their blocks to bf16, exactly: with e8m0 a quarter of the numbers
// (fp4.cuh). For products of many tokens, where decoding the activations costs little beside the product. A
// thread takes eight k of a few rows at a time.
#include "fp4.cuh"

using Scale = Config::scale_type;
constexpr int threads = Config::threads, rows = Config::rows;

struct Params {
  const unsigned char *codes, *scales;
  uint4* out;                              // [num_rows, words]
  i64 num_rows, words, stride, scale_row;  // words of eight codes; bytes from row to row; scale_at
};

extern "C" __global__ void __launch_bounds__(threads) decode_fp4(const __grid_constant__ Params p) {
  launch_dependents();
  wait_for_predecessors();
  const i64 row0 = i64(blockIdx.x) * rows, word = i64(blockIdx.y) * threads + threadIdx.x;
  if (word >= p.words) return;
  u32 codes[rows];
  unsigned char scales[rows];
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    const i64 row = min(row0 + r, p.num_rows - 1);
    codes[r] = *reinterpret_cast<const u32*>(p.codes + row * p.stride + word * 4);
    scales[r] =
        p.scales[scale_at<Config::blocked>(row, p.scale_row, int(word * 8 / block_size<Scale>))];
  }
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    if (row0 + r >= p.num_rows) return;
    u32 f[4];  // eight_codes pairs k with k + 4
    eight_codes<Scale>(codes[r], SpanScales<Scale>{scales[r]}.factor(0, true), f);
    if constexpr (same<Scale, e4m3>::value)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        f[i] = fma2<bf16>(f[i], 0x43804380, minus_zeros);  // its unit, 256
    p.out[(row0 + r) * p.words + word] =
        make_uint4(__byte_perm(f[0], f[1], 0x5410), __byte_perm(f[2], f[3], 0x5410),
                   __byte_perm(f[0], f[1], 0x7632), __byte_perm(f[2], f[3], 0x7632));
  }
}
