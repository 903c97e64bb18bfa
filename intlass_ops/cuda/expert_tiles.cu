// Tokens that are sorted by expert, in tiles for a grouped GEMM: expert e has those from ends[e - 1] to
// ends[e] - 1, in as few tiles as hold them. A warp finds a tile. Each block of the GEMM by itself would take
// longer (docs/notes/kernels.md).
#include "expert_tile.cuh"
#include "memory.cuh"

constexpr int threads = Config::threads, neighbours = 8;  // experts of a lane

struct Params {
  const void* ends;
  ExpertTile* tiles;  // [slots + 1], the last one's `count` is how many there are
  i64 experts, tokens, tile, bytes, slots;  // tokens of all, and of a tile; bytes of one of `ends`

  __device__ __forceinline__ i64 end_of(i64 expert) const {
    if (expert < 0) return 0;
    if (expert >= experts) return tokens;  // no expert has those that come last
    return bytes == 8 ? static_cast<const i64*>(ends)[expert]
                      : static_cast<const int*>(ends)[expert];
  }
};

extern "C" __global__ void __launch_bounds__(threads)
    expert_tiles(const __grid_constant__ Params p) {
  launch_dependents();
  wait_for_predecessors();
  const int slot = (blockIdx.x * threads + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (slot > p.slots) return;
  const int tile = int(p.tile), tokens = int(p.tokens);
  ExpertTile found = {no_expert, 0, 0, 0};
  int before = 0;  // tiles of the experts before
  bool bad = false;
#pragma unroll 1
  for (int e0 = 0; e0 <= p.experts; e0 += 32 * neighbours) {
    const int e = e0 + lane * neighbours;
    i64 end[neighbours + 1];  // all on their way at once
#pragma unroll
    for (int i = 0; i <= neighbours; ++i) end[i] = p.end_of(e + i - 1);
    int own[neighbours], sum = 0;
#pragma unroll
    for (int i = 0; i < neighbours; ++i) {
      bad |= end[i] < 0 || end[i] > end[i + 1] || end[i + 1] > tokens;
      own[i] = (int(max(end[i + 1] - end[i], i64(0))) + tile - 1) / tile;
      sum += own[i];
    }
    int upto = sum;  // with those of the lanes before
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, upto, distance);
      if (lane >= distance) upto += other;
    }
    int index = slot - (before + upto - sum);
#pragma unroll
    for (int i = 0; i < neighbours; ++i) {
      if (index >= 0 && index < own[i]) {
        const int first = int(end[i]) + index * tile, last = int(end[i + 1]);
        found = {e + i < p.experts ? e + i : no_expert, first, min(tile, last - first), 0};
      }
      index -= own[i];
    }
    before += __shfl_sync(~0u, upto, 31);
  }
  bad = __any_sync(~0u, bad);
  const int used = bad ? (tokens + tile - 1) / tile : before;
  if (bad) {
    const int first = min(slot, used) * tile;
    found = {bad_ends, first, max(0, min(tile, tokens - first)), 0};
  }
  if (slot == p.slots) found.count = used;
  // the lane that has found it, or if none has, any
  const u32 owners = __ballot_sync(~0u, found.count > 0);
  if (lane == (owners ? __ffs(owners) - 1 : 0)) p.tiles[slot] = found;
}
