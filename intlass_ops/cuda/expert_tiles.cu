// All tiles of a grouped GEMM's tokens in a table, for blocks that go from one to another (hopper.cu).
#include "expert_tile.cuh"

constexpr int threads = Config::threads;

struct Params {
  ExpertEnds ends;
  ExpertTile* tiles;  // [slots + 1], the last one's `count` is how many there are
  i64 slots;
};

extern "C" __global__ void __launch_bounds__(threads)
    expert_tiles(const __grid_constant__ Params p) {
  launch_dependents();
  wait_for_predecessors();
  const int slot = (blockIdx.x * threads + threadIdx.x) / 32;
  if (slot > p.slots) return;
  int used;
  ExpertTile tile = find_tile(p.ends, slot, used);
  if (slot == p.slots) tile.count = used;
  if (threadIdx.x % 32 == 0) p.tiles[slot] = tile;
}
