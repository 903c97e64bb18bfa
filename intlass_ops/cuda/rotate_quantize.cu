// Rotation and quantisation in one pass (formulas in fused_quantize.py), on any GPU: x, seen as rows of R
// values, is multiplied by h [R, R], and each group of the products gets a scale and codes.
//
// x is one flat stream, cut into units that a block takes in turn; cp.async brings the next ones
// into a ring of shared memory. A warp computes 16 rows by 32 columns at a time with x as the MMA's
// A operand and h as B, whose columns are permuted such that a lane owns of its two rows EIGHT
// CONSECUTIVE products:
//
//        lane%4:  | 0     | 1      | 2       | 3       |
//        columns    0..7    8..15    16..23    24..31      of row lane/4, and of row lane/4 + 8
//
// R = 16 has rows of 32 values too, of two blocks: a lane owns four values of each. A piece is what
// a warp computes of a row with one h: 32 values, or 16.
//
// Where the values that share a scale lie (`scope`):
//
//     quads   in a piece: shuffles find the scale
//     table   in several pieces, several groups in a unit: by way of shared memory
//     block   the unit is one group
//     twice   a group is several units, which are read and rotated once for the scale, then for the
//             codes
#include "rotate_codes.cuh"
#include "rotate_tile.cuh"

// A lane's codes of one row of a unit, whose first piece is `first` of x
__device__ __forceinline__ void store(const Params& p, char* collection, i64 first, int pieces,
                                      int row, int column_warp, int lane, const Codes& c) {
  const int t = lane % 4;
  unsigned char* codes = static_cast<unsigned char*>(p.codes) + first * (piece * bits / 8);
  unsigned char* mask = p.mask + first * (piece / 8);
  if constexpr (blocks == 1) {
    const int at = row * pieces_per_row + column_warp;
    if constexpr (collected) *reinterpret_cast<u32*>(collection + at * 16 + t * 4) = c.word[0];
    if (at >= pieces) return;
    const int value = at * 32 + t * 8;
    if constexpr (bits == 8)
      *reinterpret_cast<uint2*>(codes + value) = make_uint2(c.word[0], c.word[1]);
    else if constexpr (!collected)
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

// A unit's codes, from where `store` has collected them
struct Collection {
  i64 first;
  int count = 0;
  int half = 0;  // where the next unit's go

  static __device__ __forceinline__ char* at(int half) {
    return smem + codes_at + half * capacity * 16;
  }
  __device__ __forceinline__ void flush(const Params& p, int thread) {
#pragma unroll
    for (int i = 0; i < capacity; i += threads)
      if (i + thread < count)
        static_cast<uint4*>(p.codes)[first + i + thread] =
            reinterpret_cast<const uint4*>(at(half ^ 1))[i + thread];
    count = 0;
  }
};

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
  const float mean = share<group_lanes>(total, odd, Sum()) * (1.f / near);
  const float square = share<group_lanes>(squares, odd, Sum()) * (1.f / near);
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
  return share<group_lanes>(squares, odd, Sum()) * (1.f / near);
}

// Groups that lie in a piece: two rows of a lane
__device__ __forceinline__ void quantise_rows(const Params& p, char* collection, const Values& v,
                                              int tile, i64 first, int pieces, int row,
                                              int column_warp, int lane) {
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
        stat = share<group_lanes>(stats, odd, Combine());
      const Scale own = fp4_scale(p, stat, code);
      if (t % group_lanes < 2) store_scale(odd, (unsigned char)code);
      swap_rows(scale[0][part], scale[1][part], own, odd);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
    store(p, collection, first, pieces, row + half * 8 + g, column_warp, lane,
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
  const u32 ring = smem_address(smem);
  wait_for_predecessors();
  UnitsOfBlock ahead(p, blockIdx.x, gridDim.x), units(p, blockIdx.x, gridDim.x);
#pragma unroll
  for (int i = 0; i < stages - 1; ++i)
    fill<Layout>(p, ahead, ring + i * stage_bytes, thread), ahead.advance();
  Rotation h;
  if constexpr (tensor_cores)
    h.load(p, smem + (stages - 1) * stage_bytes, column_warp, lane, thread);

  Collection collection;
  float running = 0.f;
  Scale kept;
  i64 groups_before = blockIdx.x * i64(units.size / units.group);  // this unit
  for (int stage = 0, next = stages - 1; units.count(); units.advance()) {
    cp_async_wait<stages - 2>();
    __syncthreads();
    if (!ahead.count()) launch_dependents();  // the last stages
    fill<Layout>(p, ahead, ring + next * stage_bytes, thread), ahead.advance();
    if constexpr (collected) collection.flush(p, thread);
    next = next == stages - 1 ? 0 : next + 1;
    Values v;
    if constexpr (tensor_cores)
      rotate(v, h, ring + stage * stage_bytes, first_row, lane);
    else
      rotate_exactly(v, p, smem + stage * stage_bytes, first_row, column_warp, lane);
    stage = stage == stages - 1 ? 0 : stage + 1;

    const i64 first = units.first + units.at;
    const int count = units.count();
    char* const codes = Collection::at(collection.half);
    if (scope != twice || !units.searching) collection = {first, count, collection.half ^ 1};
    if constexpr (scope == quads) {
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile)
        quantise_rows(p, codes, v, tile, first, count, first_row + tile * 16, column_warp, lane);
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
        store(p, codes, first, count, row, column_warp, lane, codes_of(p, x, scale));
      }
  }
  if constexpr (collected) {
    __syncthreads();
    collection.flush(p, thread);
  }
}
