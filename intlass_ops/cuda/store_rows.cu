// Rows of a quantised weight, proved and packed in one pass. What a graph computes for an element is
// affine in its code: known at the codes 0 and 1 and at its own, in double precision, and at its own as
// the graph rounds it. As lowering/weights.py has it in many passes: the code, a scale and a zero point
// for each group, and whether they reproduce the weight. A block takes a row.
#include "memory.cuh"

using W = Config::w_type;
constexpr int threads = Config::threads;

struct Params {
  const double *at_zero, *at_one, *at_code;  // [rows, k]
  const W* w;
  const i64* order;    // where the columns come from; none: as they are
  char *codes, *high;  // INT4 two to a byte; high: the upper four bits of 8, or none
  float *scales, *zeros, *high_scales;  // [rows, k / group]; the last two may be none
  int* flags;
  double eps, tiny;                             // of what the graph rounds to
  i64 num_columns, group_size, low, num_codes;  // the least code, and 16 or 256
};

enum Flag { not_affine = 1, scales_at = 1, zeros_at = 3, high_scales_at = 5 };

struct Line { double scale, zero, slope; };

// A group whose slope is 0 is a constant whatever its codes are: code 0, zero point -constant, scale 1.
__device__ __forceinline__ Line line(double at_zero, double at_one) {
  const double scale = at_one - at_zero, slope = scale == 0 ? 1 : scale;
  const double zero = -(at_zero / slope), nearest = rint(zero);
  return {scale == 0 && at_zero != 0 ? 1 : scale,
          fabs(zero - nearest) <= fabs(nearest) * 1e-12 ? nearest : zero, slope};
}

// Stores a parameter; returns which of the narrow types do not hold it, as bits from `at` on.
__device__ __forceinline__ int store_parameter(float* to, double value, int at) {
  *to = float(value);
  return (double(__bfloat162float(__float2bfloat16_rn(float(value)))) != value) << at |
         (double(__half2float(__float2half_rn(float(value)))) != value) << (at + 1);
}

extern "C" __global__ void __launch_bounds__(threads) store_rows(const __grid_constant__ Params p) {
  const int k = int(p.num_columns), group = int(p.group_size);
  const i64 row = blockIdx.x, first = row * k;
  const bool packed = p.num_codes == 16 || p.high;
  int flags = 0;
  // The code of an element: signed without zero points, else from 0 on
  const auto code_of = [&](int column) -> int {
    const int start = column / group * group;
    const i64 at = first + (p.order ? p.order[column] : column);
    const i64 start_at = first + (p.order ? p.order[start] : start);
    const double at_zero = p.at_zero[at], at_one = p.at_one[at];
    const double start_at_zero = p.at_zero[start_at], start_at_one = p.at_one[start_at];
    const Line of_group = line(start_at_zero, start_at_one);
    bool holds = true;
    if (at_zero != start_at_zero || at_one != start_at_one) {
      const Line own = line(at_zero, at_one);
      holds = own.scale == of_group.scale && own.zero == of_group.zero;
    }
    const double exact = (p.at_code[at] - at_zero) / of_group.slope;
    double code = rint(exact);
    const double w = double(as_float(p.w[at]));
    const double error = fabs((code - of_group.zero) * of_group.scale - w);
    const double size = (fabs(code) + fabs(of_group.zero)) * fabs(of_group.scale);
    holds &= fabs(exact - code) <= (fabs(code) + 1) * 1e-6;
    holds &= error <= size * 2 * p.eps + 2 * p.tiny + fabs(w) * 1e-12;
    if (!p.zeros) {
      holds &= of_group.zero == rint(of_group.zero) && fabs(of_group.zero) < 512;
      code -= of_group.zero;
    }
    code -= double(p.low);
    holds &= 0 <= code && code < double(p.num_codes);
    flags |= holds ? 0 : not_affine;
    if (column == start) {
      const i64 i = row * (k / group) + column / group;
      flags |= store_parameter(p.scales + i, of_group.scale, scales_at);
      if (p.zeros) flags |= store_parameter(p.zeros + i, of_group.zero - double(p.low), zeros_at);
      if (p.high_scales)
        flags |= store_parameter(p.high_scales + i, 16 * of_group.scale, high_scales_at);
    }
    return holds ? int(code) + (p.zeros ? 0 : int(p.low)) : 0;
  };
  if (packed) {
    const int bytes = (k + 1) / 2;
    for (int i = threadIdx.x; i < bytes; i += threads) {
      const int even = code_of(2 * i), odd = 2 * i + 1 < k ? code_of(2 * i + 1) : 0;
      p.codes[row * bytes + i] = char((even & 15) | (odd & 15) << 4);
      if (p.high) p.high[row * bytes + i] = char((even >> 4 & 15) | (odd >> 4) << 4);
    }
  } else {
    for (int i = threadIdx.x; i < k; i += threads) p.codes[first + i] = char(code_of(i));
  }
  flags = __reduce_or_sync(0xffffffff, flags);
  if (threadIdx.x % 32 == 0 && (flags & ~__ldcg(p.flags))) atomicOr(p.flags, flags);
}
