// What only Hopper has, one PTX instruction a function: TMA, mbarriers, wgmma's fences.
// The wgmma instructions themselves name every register, so source.py writes them for each Config.
#pragma once
#include "memory.cuh"

typedef unsigned long long u64;

struct __align__(64) TensorMap { char bytes[128]; };  // CUtensorMap

// ---- mbarriers: addresses in shared memory, one 64-bit word each --------------------------------
__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void barrier_expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_times(u32 barrier, int times) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(times)
               : "memory");
}
// Wait until the phase of this parity is over
__device__ __forceinline__ void barrier_wait(u32 barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Barriers made by one thread, before anything else uses them
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// A queue of stages in shared memory that a producer fills and consumers empty, a pair of barriers
// each, and the stage of it that its owner comes to next
template <int stages, int stage_bytes> struct StageRing {
  u32 base, barriers;
  int stage = 0, phase = 0;
  __device__ __forceinline__ u32 full() const { return barriers + stage * 8; }
  __device__ __forceinline__ u32 empty() const { return barriers + (stages + stage) * 8; }
  __device__ __forceinline__ u32 data() const { return base + stage * stage_bytes; }
  __device__ __forceinline__ void advance(int count = 1) {
    move(step(count));
  }  // at most all of them
  // The same in two: how far the stage moves, back to the start if less than 0
  __device__ __forceinline__ int step(int count) const {
    return stage >= stages - count ? count - stages : count;
  }
  __device__ __forceinline__ void move(int step) { stage += step, phase ^= step < 0; }
  __device__ __forceinline__ void skip(int count) {
    stage += count;
    phase ^= stage / stages & 1, stage %= stages;
  }
};

// ---- TMA: a box of a row-major matrix of bytes, at (byte column, row) ---------------------------
__device__ __forceinline__ void tma_load(u32 smem, const TensorMap& map, int column, int row,
                                         u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(smem),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// The same into the same place of the first `blocks` blocks of the cluster, with a barrier each
template <int blocks>
__device__ __forceinline__ void tma_load_all(u32 smem, const TensorMap& map, int column, int row,
                                             u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(smem),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(short((1 << blocks) - 1))
      : "memory");
}
// `bytes`, a multiple of 16, of plain memory
__device__ __forceinline__ void bulk_load(u32 smem, const char* from, int bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- clusters -----------------------------------------------------------------------------------
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}
// The blocks wait for one another, but need not see what others wrote
__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::
                   : "memory");
}
// Arrive at the barrier that another block of the cluster has in the same place
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Four words to where another block of the cluster has this place of its shared memory
__device__ __forceinline__ void store_remote(u32 smem, int rank, const uint4& v) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.u32 [remote], {%2, %3, %4, %5};\n}" ::"r"(smem),
      "r"(rank), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
      : "memory");
}
// The same, and a barrier there counts the bytes as they come
__device__ __forceinline__ void send(u32 smem, int rank, const uint4& v, u32 barrier) {
  asm volatile(
      "{\n.reg .b32 to, counts;\n"
      "mapa.shared::cluster.u32 to, %0, %1;\n"
      "mapa.shared::cluster.u32 counts, %2, %1;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 "
      "[to], {%3, %4, %5, %6}, [counts];\n}" ::"r"(smem),
      "r"(rank), "r"(barrier), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
      : "memory");
}

// ---- memory -------------------------------------------------------------------------------------
__device__ __forceinline__ void add_release(int* to, int v) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}
__device__ __forceinline__ int load_acquire(const int* from) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}
__device__ __forceinline__ float2 load_shared_float2(u32 smem) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(smem));
  return v;
}

// ---- warpgroups ---------------------------------------------------------------------------------
template <int registers> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers> __device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
// The threads of one warpgroup; barrier 0 is __syncthreads
__device__ __forceinline__ void warpgroup_sync(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}
// Two consumers in turns: wait for one's own, and pass it on to `warpgroup`
__device__ __forceinline__ void await_turn(int warpgroup) {
  asm volatile("bar.sync %0, 256;" ::"r"(warpgroup + 8) : "memory");
}
__device__ __forceinline__ void pass_turn(int warpgroup) {
  asm volatile("bar.arrive %0, 256;" ::"r"(warpgroup + 8) : "memory");
}
// The threads of all consumers
template <int threads> __device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(threads) : "memory");
}
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int pending> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Registers an asynchronous wgmma writes or reads: no access may move across this point.
__device__ __forceinline__ void pin(float& v) { asm volatile("" : "+f"(v)::"memory"); }
__device__ __forceinline__ void pin(int& v) { asm volatile("" : "+r"(v)::"memory"); }
// Numbers that ptxas must not make anew where they are used
__device__ __forceinline__ void pin(u32& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void pin(i64& v) { asm volatile("" : "+l"(v)); }

// A tile of 128-byte rows with TMA's 128-byte swizzle, rows along n or m, read along k. Eight rows
// are 1024 bytes apart; a step along k adds its bytes to the start.
__device__ __forceinline__ u64 tile_descriptor(u32 smem) {
  return u64(smem >> 4 & 0x3fff) | u64(1024 >> 4) << 32 | u64(1) << 62;
}

// Four 8x8 blocks of 16-bit values, transposed: a lane's word of two neighbouring columns
// goes to two neighbouring rows.
__device__ __forceinline__ void store_transposed(u32 smem, const u32 (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem),
               "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}
// And back
__device__ __forceinline__ void load_transposed(u32 (&v)[4], u32 smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(smem)
               : "memory");
}
