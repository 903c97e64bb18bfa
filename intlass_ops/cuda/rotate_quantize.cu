// Rotation and quantisation in one pass (formulas in fused_quantize.py): x, seen as rows of R values, is
// multiplied by h [R, R] and each group of the products gets a scale and codes.
//
// x is one flat stream, cut into units that a block takes in turn; cp.async brings the next ones into
// a ring of shared memory. A warp computes 16 rows by 32 columns at a time with x as the MMA's A
// operand and h as B, whose columns are permuted such that a lane owns of its two rows EIGHT
// CONSECUTIVE products:
//
//        lane%4:  | 0     | 1      | 2       | 3       |
//        columns    0..7    8..15    16..23    24..31      of row lane/4, and of row lane/4 + 8
//
// R = 16 has rows of 32 values too, of two blocks: a lane owns four values of each. A piece is what a
// warp computes of a row with one h: 32 values, or 16.
//
// Where the values that share a scale lie (`scope`):
//
//     quads   in a piece: shuffles find the scale
//     table   in several pieces, several groups in a unit: by way of shared memory
//     block   the unit is one group
//     twice   a group is several units, which are read and rotated once for the scale, then for the
//             codes
#include "fragments.cuh"
#include "memory.cuh"

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
constexpr int format = Config::format;
enum Scope { quads, table, block, twice };
constexpr int scope = Config::scope;
constexpr bool integers = format == int8 || format == int4, quest = Config::quest;
constexpr bool tensor_cores = sizeof(T) == 2;
template <bool first, class A, class B> struct Choose { using type = A; };
template <class A, class B> struct Choose<false, A, B> { using type = B; };
using Kind = typename Choose<same<T, __half>::value, fp16, bf16>::type;

constexpr int width = R < 32 ? 32 : R, piece = R < 32 ? R : 32;
constexpr int blocks = width / R, run = 8 / blocks;  // of a row; consecutive values of a lane
constexpr int pieces_per_row = width / piece;
constexpr int column_warps = width / 32, warps = column_warps * Config::row_warps;
constexpr int threads = 32 * warps;
constexpr int rows = Config::row_warps * tiles * 16, capacity = rows * pieces_per_row;
constexpr int steps = R / 16, columns = piece / 8;  // MMAs along k, and along the columns of a warp
// Of a group, or of a piece of it: parts of a lane's eight values, and lanes
constexpr int near = scope == quads ? Config::group_size : piece;
constexpr int parts = near < 32 && blocks == 2 ? 2 : 1, group_lanes = near * parts / 8;
static_assert(R >= 16 && (R & (R - 1)) == 0, "rows are whole MMAs");
static_assert(group_lanes >= 1 && group_lanes <= 4, "a group in a piece lies in one quad of lanes");
static_assert(integers || (scope == quads && group_lanes >= 2), "FP4 groups are 16 or 32 values");

// ---- shared memory: the ring, h behind it (over the last stage until that is filled) -----------
constexpr int row_bytes = width * sizeof(T), row_chunks = row_bytes / 16;
constexpr int stage_bytes = rows * row_bytes;
constexpr int h_row = 2 * R + 16, h_rows = R > 128 ? 64 : R;  // staged at a time
extern __shared__ __align__(128) char smem[];

// Eight rows meet eight banks.
__device__ __forceinline__ int swizzle(int row) { return row_chunks < 8 ? row >> 1 & 3 : row & 7; }
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return row * row_bytes + (chunk ^ swizzle(row)) * 16;
}

// The units of a block, one after the other: pieces [first, first + count) of x, none at its end
struct Units {
  const int group, size;            // pieces of a group, and of a unit or a longer group
  i64 first, left;                  // pieces from the first one's on
  int at = 0;                       // twice: pieces of the group before this unit
  bool searching = scope == twice;  // for the scale

  __device__ __forceinline__ Units(const Params& p)
      : group(int(p.group_pieces)),
        size(scope == quads   ? capacity
             : scope == table ? capacity / group * group
                              : group) {
    first = blockIdx.x * i64(size), left = p.pieces - first;
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
    first += gridDim.x * i64(size), left -= gridDim.x * i64(size);
  }
};

// Starts to copy a unit to a stage of the ring. A thread's 16 bytes lie `threads` chunks apart.
__device__ __forceinline__ void fill(const Params& p, const Units& units, int stage, int thread) {
  const int bytes = units.count() * int(piece * sizeof(T));
  if (bytes) {
    const char* from = static_cast<const char*>(p.x) +
                       (units.first + units.at) * i64(piece * sizeof(T)) + thread * 16;
    const u32 to = smem_address(smem) + stage * stage_bytes;
#pragma unroll
    for (int i = 0; i < rows * row_chunks / threads; ++i) {
      // of as many rows apart that the swizzle is the same
      static_assert(threads / row_chunks % 8 == 0 || sizeof(T) == 4, "see above");
      const int row = sizeof(T) == 4 ? i * (threads / row_chunks) : 0;
      const int at = chunk_at(thread / row_chunks + row, thread % row_chunks);
      cp_async_16(to + at + (sizeof(T) == 4 ? 0 : i * threads * 16), from + i * threads * 16,
                  (i * threads + thread) * 16 >= bytes);
    }
  }
  cp_async_commit();
}

// ---- rotation ----------------------------------------------------------------------------------
// h as B fragments of step s and column tile j. Columns n = 0..7 of a tile are, of the columns that
// the lanes with lane%4 == n / 2 own, those numbered 2j + n % 2.
struct Rotation {
  u32 b[tensor_cores ? steps : 1][columns][2];

  __device__ __forceinline__ void load(const Params& p, char* to, int column_warp, int lane,
                                       int thread) {
    const u32* h = static_cast<const u32*>(p.h);
#pragma unroll
    for (int first = 0; first < R; first += h_rows) {
      if (first) __syncthreads();
#pragma unroll 8
      for (int i = thread; i < h_rows * R / 2; i += threads) {
        const int row = i / (R / 2), c = i % (R / 2) * 2, inner = c % piece;
        const int at = c - inner + inner % run / 2 * 8 + inner / run * 2;
        *reinterpret_cast<u32*>(to + row * h_row + at * 2) = h[first * (R / 2) + i];
      }
      __syncthreads();
      const u32 from =
          smem_address(to) + lane % 16 * h_row + (column_warp * 32 + lane / 16 * 8) * 2;
#pragma unroll
      for (int s = 0; s < h_rows / 16; ++s)
#pragma unroll
        for (int j = 0; j < columns; j += 2)
          load_transposed(&b[first / 16 + s][j][0], from + s * 16 * h_row + j * 16);
    }
    __syncthreads();
  }
  static __device__ __forceinline__ void load_transposed(u32* r, u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  }
};

// Values of a lane: [tile][pair of columns][row lane / 4: two, row lane / 4 + 8: two]
using Values = float[tiles][4][4];

__device__ __forceinline__ void rotate(Values& v, const Rotation& h, u32 stage, int row, int lane) {
  const float zeros[4] = {0.f, 0.f, 0.f, 0.f};
  // ldmatrix takes the addresses of rows 0..15, first their left eight columns, then the right
  const int own = row + lane % 16, chunk = lane / 16 ^ swizzle(own);
  stage += own * row_bytes;
#pragma unroll
  for (int s = 0; s < width / 16; ++s)
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) {
      u32 a[4];
      load_matrices<4>(a, stage + (2 * s ^ chunk) * 16 + tile * 16 * row_bytes);
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        if constexpr (R == 16)
          mma(v[tile][2 * s + j], a, h.b[0][j], zeros, Kind{});
        else
          mma(v[tile][j], a, h.b[s][j], s ? v[tile][j] : zeros, Kind{});
      }
    }
}

// float32: without tensor cores
__device__ __forceinline__ void rotate_exactly(Values& v, const Params& p, const char* stage,
                                               int row, int column_warp, int lane) {
  const int g = lane / 4, t = lane % 4;
  const float* h = static_cast<const float*>(p.h) + column_warp * 32 + t * run;
#pragma unroll
  for (int i = 0; i < tiles * 16; ++i) v[i / 16][i / 4 % 4][i % 4] = 0.f;
#pragma unroll 1
  for (int k = 0; k < R; k += 4) {
    float4 m[4][run / 4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int c = 0; c < run / 4; ++c)
        m[i][c] = __ldg(reinterpret_cast<const float4*>(h + (k + i) * R) + c);
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int b = 0; b < blocks; ++b) {
          const int r = row + tile * 16 + half * 8 + g;
          const float4 x = *reinterpret_cast<const float4*>(stage + chunk_at(r, (b * R + k) / 4));
          const float xs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int c = 0; c < run / 4; ++c) {
              const float ms[4] = {m[i][c].x, m[i][c].y, m[i][c].z, m[i][c].w};
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const int at = b * run + c * 4 + e;
                float& sum = v[tile][at / 2][half * 2 + at % 2];
                sum = __fmaf_rn(xs[i], ms[e], sum);
              }
            }
        }
  }
}

// ---- scales ------------------------------------------------------------------------------------
struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Largest {  // lets NaN through
  __device__ __forceinline__ float operator()(float a, float b) const {
    float d;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
  }
};
// What the scale depends on: the largest magnitude, or the sum of squares
using Combine = typename Choose<quest, Sum, Largest>::type;

template <int lanes, class C> __device__ __forceinline__ float over_lanes(float v, C combine) {
#pragma unroll
  for (int d = 1; d < lanes; d *= 2) v = combine(v, __shfl_xor_sync(~0u, v, d));
  return v;
}

// 1 / d in two parts, and with it x / d rounded to nearest
struct Reciprocal {
  float high, low;

  __device__ __forceinline__ Reciprocal(float d, float rounded)
      : high(rounded), low(__fmaf_rn(-rounded, d, 1.f) * rounded) {}
  __device__ __forceinline__ float times(float x) const { return __fmaf_rn(x, high, x * low); }
};
template <int d> __device__ __forceinline__ float divided_by(float x) {
  const Reciprocal r(d, 1.f / d);
  return x < __int_as_float(0x7f800000) ? r.times(x) : x;
}

// A group's scale: codes round x * factor / divisor.
struct Scale {
  float divisor, reciprocal;
  bool boosted;
};

// The reciprocals of subnormal scales would overflow: these scales grow, and the values with them.
constexpr float boost = 0x1p120f;

__device__ __forceinline__ Scale divide_by(float scale) {
  const bool boosted = scale < 0x1p-100f;
  const float divisor = boosted ? scale * boost : scale;
  return {divisor, __frcp_rn(divisor), boosted};
}
__device__ __forceinline__ float integer_scale(const Params& p, float stat, float count) {
  float scale;
  if constexpr (quest)
    scale = p.spread * __fsqrt_rn(__fdiv_rn(stat, count));
  else
    scale = divided_by<format == int8 ? 127 : 7>(stat);
  return scale == 0.f ? 1.f : scale;
}

// `stat`: the largest magnitude or the standard deviation. `code`: the scale's byte
__device__ __forceinline__ Scale fp4_scale(const Params& p, float stat, u32& code) {
  if constexpr (format == mx) {
    const float base = __fadd_rn(quest ? p.spread * stat : stat, 1e-8f);
    const u32 exponent = __float_as_uint(base) & 0x7f800000;  // infinity for NaN too
    code = exponent >> 23;
    return {__uint_as_float(exponent), 0.f};
  } else {
    float base = p.global_scale * (quest ? p.spread * stat : divided_by<6>(stat));
    const float infinity = __int_as_float(0x7f800000);
    const bool finite = base < infinity;
    base = fminf(base, 448.f);
    // e4m3 has steps of 2^-9 below 2^-6, above of an eighth of the binade; adding 1.5 * 2^23 of
    // them rounds.
    const u32 field = max(__float_as_uint(base) >> 23, 121u);
    const float magic = __uint_as_float((field + 20) << 23 | 0x400000);
    const float value = __fadd_rn(__fadd_rn(base, magic), -magic);
    code = value >= 0x1p-6f ? (__float_as_uint(value) >> 20) - 960 : u32(value * 512.f);
    code = finite ? code : 127;
    // a scale too small for e4m3 stands for a group of zeros
    if (value == 0.f) return {1.f, 0.f};
    return {finite ? value : infinity, __frcp_rn(value)};
  }
}

// ---- codes -------------------------------------------------------------------------------------
constexpr float magic = 0x1.8p23f;  // adding it rounds to an integer, ties to even
constexpr float qmax = format == int8 ? 127.f : 7.f;

// The lowest bytes of four floats
__device__ __forceinline__ u32 low_bytes(float a, float b, float c, float d) {
  return __byte_perm(__byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040),
                     __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040), 0x5410);
}
// Byte 3 of each: their signs, as bytes of all ones or zeros
__device__ __forceinline__ u32 signs(float a, float b, float c, float d) {
  u32 ab, cd;
  asm("prmt.b32 %0, %1, %2, 0x00fb;" : "=r"(ab) : "f"(a), "f"(b));
  asm("prmt.b32 %0, %1, %2, 0x00fb;" : "=r"(cd) : "f"(c), "f"(d));
  return __byte_perm(ab, cd, 0x5410);
}

// A code of e2m1, in the low bits of a float, from its magnitude times 2, 1 and 1/2. Rounding with
// the step of a lower binade gives a code that is no smaller, and so does a higher one's: the least
// of three is right.
__device__ __forceinline__ float e2m1(float a, float twice_scale, float scale, float half_scale) {
  return fminf(fminf(__fmaf_rn(a, twice_scale, magic), __fmaf_rn(a, scale, magic + 2.f)),
               __fmaf_rn(a, half_scale, magic + 4.f));
}

// The codes of a lane's eight values of a row: two words of INT8, one of four bits.
struct Codes {
  u32 word[2];
  u32 kept;
};

__device__ __forceinline__ Codes codes_of(const Params& p, float (&x)[8],
                                          const Scale (&scale)[parts]) {
  const float infinity = __int_as_float(0x7f800000);
  Codes r{};
  float y[8];
#pragma unroll
  for (int part = 0; part < parts; ++part) {
    const Scale& s = scale[part];
    const int from = 8 / parts * part, to = from + 8 / parts;
    if constexpr (integers) {
      u32 clipped = 0;
      if (s.boosted) {  // such scales are coarse
#pragma unroll
        for (int i = from; i < to; ++i) {
          x[i] *= boost;
          if constexpr (Config::mask) clipped |= u32(fabsf(x[i]) >= (qmax + .5f) * s.divisor) << i;
          x[i] = fminf(fmaxf(x[i], -qmax * s.divisor), qmax * s.divisor);
        }
      }
      const Reciprocal reciprocal(s.divisor, s.reciprocal);
#pragma unroll
      for (int i = from; i < to; ++i) {
        y[i] = reciprocal.times(x[i]);
        if constexpr (Config::mask) r.kept |= u32(fabsf(y[i]) < qmax + .5f) << i;
        if constexpr (quest) y[i] = fminf(fmaxf(y[i], -qmax), qmax);
        y[i] = __fadd_rn(y[i], format == int8 ? magic : magic + 8.f);
      }
      r.kept &= ~clipped;
    } else if constexpr (format == mx) {
      // the divisor is a power of two, and so is its reciprocal
      const float reciprocal =
          __uint_as_float(max(0x7f000000u - __float_as_uint(s.divisor), 1u << 22));
      const float bound = fminf(6.f * s.divisor, 0x1.fffffep127f);  // 3x may be infinite
#pragma unroll
      for (int i = from; i < to; ++i) {
        const float t = quest ? x[i] : 3.f * x[i];
        if constexpr (Config::mask)
          r.kept |= u32(fabsf(t) * reciprocal < (quest ? 6.f : 18.f)) << i;
        y[i] = e2m1(fminf(fabsf(t), bound), 2.f * reciprocal, reciprocal, .5f * reciprocal);
      }
    } else {
      if (p.global_scale != 1.f) {
#pragma unroll
        for (int i = from; i < to; ++i) x[i] *= p.global_scale;
      }
      const Reciprocal reciprocal(s.divisor, s.reciprocal);
#pragma unroll
      for (int i = from; i < to; ++i) {
        const float a = fabsf(reciprocal.times(x[i]));
        if constexpr (Config::mask) r.kept |= u32(a < 6.f) << i;
        y[i] = e2m1(fminf(a, 6.f), 2.f, 1.f, .5f);
      }
    }
  }
  if constexpr (format == int8) {
    r.word[0] = low_bytes(y[0], y[1], y[2], y[3]);
    r.word[1] = low_bytes(y[4], y[5], y[6], y[7]);
  } else {
    u32 even = low_bytes(y[0], y[2], y[4], y[6]), odd = low_bytes(y[1], y[3], y[5], y[7]);
    if constexpr (parts == 2) even &= 0x0f0f0f0f, odd &= 0x0f0f0f0f;  // NaN would spill over
    r.word[0] = even + odd * 16;
    if constexpr (integers)
      r.word[0] ^= 0x88888888;
    else
      r.word[0] |= (signs(x[0], x[2], x[4], x[6]) & 0x08080808) |
                   (signs(x[1], x[3], x[5], x[7]) & 0x80808080);
  }
  // where the scale is not finite, codes are zeros
#pragma unroll
  for (int part = 0; part < parts; ++part) {
    if (scale[part].divisor < infinity) continue;
    if (format == int8 && parts == 2)
      r.word[part] = 0;
    else
      r.word[0] &= parts == 1 ? 0 : part ? 0x0000ffff : 0xffff0000, r.word[1] = 0;
#pragma unroll
    for (int i = 8 / parts * part; i < 8 / parts * (part + 1); ++i) {
      // an integer is 0 then, which is in range
      const bool kept = integers && scale[part].divisor == infinity && fabsf(x[i]) < infinity;
      r.kept = (r.kept & ~(1u << i)) | u32(kept) << i;
    }
  }
  return r;
}

// `at`: the first of a lane's values in a unit that begins at `first`
__device__ __forceinline__ void store(const Params& p, i64 first, int pieces, int row,
                                      int column_warp, int lane, const Codes& c) {
  const int t = lane % 4;
  constexpr int bits = format == int8 ? 8 : 4;
  unsigned char* codes = static_cast<unsigned char*>(p.codes) + first * (piece * bits / 8);
  unsigned char* mask = p.mask + first * (piece / 8);
  if constexpr (blocks == 1) {
    const int at = row * pieces_per_row + column_warp;
    if (at >= pieces) return;
    const int value = at * 32 + t * 8;
    if constexpr (bits == 8)
      *reinterpret_cast<uint2*>(codes + value) = make_uint2(c.word[0], c.word[1]);
    else
      *reinterpret_cast<u32*>(codes + value / 2) = c.word[0];
    if constexpr (Config::mask) mask[value / 8] = (unsigned char)c.kept;
  } else {
    // a byte of the mask is four bits of two lanes
    const u32 kept = Config::mask ? __shfl_xor_sync(~0u, c.kept, 1) : 0;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      if (row * 2 + b >= pieces) continue;
      const int value = (row * 2 + b) * 16 + t * 4;
      if constexpr (bits == 8)
        *reinterpret_cast<u32*>(codes + value) = c.word[b];
      else
        *reinterpret_cast<unsigned short*>(codes + value / 2) =
            (unsigned short)(c.word[0] >> 16 * b);
      if (Config::mask && t % 2 == 0)
        mask[value / 8] = (unsigned char)((c.kept >> 4 * b & 15) | (kept >> 4 * b & 15) << 4);
    }
  }
}

__device__ __forceinline__ void row_of(float (&x)[8], const Values& v, int tile, int half) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = v[tile][i / 2][2 * half + i % 2];
}

// The stat of one part of a lane's eight values
__device__ __forceinline__ float stat_of(const float (&x)[8], int part) {
  float stat = 0.f;
#pragma unroll
  for (int i = 8 / parts * part; i < 8 / parts * (part + 1); ++i)
    stat = quest ? __fmaf_rn(x[i], x[i], stat) : Combine()(stat, fabsf(x[i]));
  return stat;
}

// One value for the group from the lanes that share it, of row lane / 4 in even lanes and of row
// lane / 4 + 8 in odd ones.
template <class C>
__device__ __forceinline__ float share(const float (&v)[2], bool odd, C combine) {
  float own = combine(odd ? v[1] : v[0], __shfl_xor_sync(~0u, odd ? v[0] : v[1], 1));
  if constexpr (group_lanes == 4) own = combine(own, __shfl_xor_sync(~0u, own, 2));
  return own;
}

// Mean squared distance from the mean, shared likewise. A difference of sums, unless it cancels.
__device__ __forceinline__ float variance(const float (&x)[2][8], int part, bool odd) {
  float total[2] = {}, squares[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 8 / parts * part; i < 8 / parts * (part + 1); ++i) {
      total[half] += x[half][i];
      squares[half] = __fmaf_rn(x[half][i], x[half][i], squares[half]);
    }
  const float mean = share(total, odd, Sum()) * (1.f / near);
  const float square = share(squares, odd, Sum()) * (1.f / near);
  const float difference = __fmaf_rn(-mean, mean, square);
  if (!__any_sync(~0u, difference < .25f * square)) return difference;
  const float other = __shfl_xor_sync(~0u, mean, 1);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    squares[half] = 0.f;
#pragma unroll
    for (int i = 8 / parts * part; i < 8 / parts * (part + 1); ++i) {
      const float d = x[half][i] - (odd == (half == 1) ? mean : other);
      squares[half] = __fmaf_rn(d, d, squares[half]);
    }
  }
  return share(squares, odd, Sum()) * (1.f / near);
}

// Groups that lie in a piece: two rows of a lane
__device__ __forceinline__ void quantise_rows(const Params& p, const Values& v, int tile, i64 first,
                                              int pieces, int row, int column_warp, int lane) {
  const int t = lane % 4, g = lane / 4;
  float x[2][8];
  row_of(x[0], v, tile, 0), row_of(x[1], v, tile, 1);
  Scale scale[2][parts];
#pragma unroll
  for (int part = 0; part < parts; ++part) {
    const auto store_scale = [&](int half, auto bits) {
      const int at = (row + half * 8 + g) * pieces_per_row + (blocks == 2 ? part : column_warp);
      if (at < pieces)
        static_cast<decltype(bits)*>(
            p.scales)[first * piece / near + (at * piece + t * run) / near] = bits;
    };
    const float stats[2] = {stat_of(x[0], part), stat_of(x[1], part)};
    if constexpr (integers) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float stat = over_lanes<group_lanes>(stats[half], Combine());
        const float made = integer_scale(p, stat, float(near));
        scale[half][part] = divide_by(made);
        if (t % group_lanes == 0) store_scale(half, made);
      }
    } else {
      // neighbours share their two rows: each works out the scale of one
      const bool odd = t & 1;
      u32 code;
      float stat;
      if constexpr (quest)
        stat = __fsqrt_rn(variance(x, part, odd));
      else
        stat = share(stats, odd, Combine());
      const Scale own = fp4_scale(p, stat, code);
      if (t % group_lanes < 2) store_scale(odd, (unsigned char)code);
      const float divisor = __shfl_xor_sync(~0u, own.divisor, 1);
      const float reciprocal = format == mx ? 0.f : __shfl_xor_sync(~0u, own.reciprocal, 1);
      scale[0][part] = {odd ? divisor : own.divisor, odd ? reciprocal : own.reciprocal};
      scale[1][part] = {odd ? own.divisor : divisor, odd ? own.reciprocal : reciprocal};
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
    store(p, first, pieces, row + half * 8 + g, column_warp, lane,
          codes_of(p, x[half], scale[half]));
}

// Combine a value of every thread, in the same order in all of them.
__device__ __forceinline__ float over_block(float v, int thread) {
  __shared__ float slots[warps];
  v = over_lanes<32>(v, Combine());
  if (thread % 32 == 0) slots[thread / 32] = v;
  __syncthreads();
  v = slots[0];
#pragma unroll
  for (int w = 1; w < warps; ++w) v = Combine()(v, slots[w]);
  return v;
}

extern "C" __global__ void __launch_bounds__(threads, Config::blocks_per_sm)
    rotate_quantize(const __grid_constant__ Params p) {
  int thread;  // volatile: or it would be read, and all that follows from it computed, every time
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  const int lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const int column_warp = warp % column_warps, first_row = warp / column_warps * tiles * 16;
  wait_for_predecessors();
  Units ahead(p), units(p);
#pragma unroll
  for (int i = 0; i < stages - 1; ++i) fill(p, ahead, i, thread), ahead.advance();
  Rotation h;
  if constexpr (tensor_cores)
    h.load(p, smem + (stages - 1) * stage_bytes, column_warp, lane, thread);

  float running = 0.f;
  Scale kept;
  i64 groups_before = blockIdx.x * i64(units.size / units.group);  // this unit
  for (int stage = 0, next = stages - 1; units.count(); units.advance()) {
    cp_async_wait<stages - 2>();
    __syncthreads();
    if (!ahead.count()) launch_dependents();  // the last stages
    fill(p, ahead, next, thread), ahead.advance();
    next = next == stages - 1 ? 0 : next + 1;
    Values v;
    if constexpr (tensor_cores)
      rotate(v, h, smem_address(smem) + stage * stage_bytes, first_row, lane);
    else
      rotate_exactly(v, p, smem + stage * stage_bytes, first_row, column_warp, lane);
    stage = stage == stages - 1 ? 0 : stage + 1;

    const i64 first = units.first + units.at;
    const int count = units.count();
    if constexpr (scope == quads) {
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile)
        quantise_rows(p, v, tile, first, count, first_row + tile * 16, column_warp, lane);
      continue;
    }
    __shared__ float stats[scope == table ? capacity : 1], made[scope == table ? capacity : 1];
    if (scope != twice || units.searching) {
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int part = 0; part < parts; ++part) {
            float x[8];
            row_of(x, v, tile, half);
            const float stat = stat_of(x, part);
            if constexpr (scope == table) {
              const float over = over_lanes<4>(stat, Combine());
              const int row = first_row + tile * 16 + half * 8 + g;
              if (t == 0) stats[row * pieces_per_row + (blocks == 2 ? part : column_warp)] = over;
            } else {
              running = Combine()(running, stat);
            }
          }
    }
    const float values = float(i64(units.group) * piece);
    float* scales = static_cast<float*>(p.scales) + groups_before;
    if constexpr (scope == table) {
      __syncthreads();
      for (int i = thread; i < capacity / units.group; i += threads) {
        float stat = stats[i * units.group];
        for (int j = 1; j < units.group; ++j) stat = Combine()(stat, stats[i * units.group + j]);
        made[i] = integer_scale(p, stat, values);
        if (i * units.group < count) scales[i] = made[i];
      }
      __syncthreads();
    } else if (scope == block || (units.searching && units.ends_group())) {
      const float scale = integer_scale(p, over_block(running, thread), values);
      kept = divide_by(scale);
      running = 0.f;
      if (thread == 0) *scales = scale;
    }
    if (scope == twice && units.searching) continue;
    if (scope != twice || units.ends_group())
      groups_before += gridDim.x * i64(units.size / units.group);
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[8];
        row_of(x, v, tile, half);
        const int row = first_row + tile * 16 + half * 8 + g;
        Scale scale[parts];
#pragma unroll
        for (int part = 0; part < parts; ++part) {
          scale[part] = kept;
          if constexpr (scope == table) {
            // pieces after the last group are not stored
            const int at = row * pieces_per_row + (blocks == 2 ? part : column_warp);
            scale[part] = divide_by(made[min(at, count - 1) / units.group]);
          }
        }
        store(p, first, count, row, column_warp, lane, codes_of(p, x, scale));
      }
  }
}
