// Clusters of blocks, which reach each other's shared memory.
#pragma once

#include "hopper.cuh"

namespace lmi {

// Where a place in this block's shared memory lies in block `rank` of the cluster.
__device__ inline uint32_t in_block(const void* own, unsigned rank) {
  uint32_t found;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(found) : "r"(shared_address(own)), "r"(rank));
  return found;
}

// Every warp of a cluster arrives once, as a whole, and waits before it first touches another
// block's memory.
__device__ inline void arrive_in_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ inline void await_cluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Send sixteen bytes to another block's memory; its barrier counts them when they are there.
__device__ inline void send(uint32_t to, const float (&x)[4], uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(barrier)
      : "memory");
}

// Arrive at the barrier that lies at `own` in this block, in block `rank`.
__device__ inline void arrive_at(const Barrier* own, unsigned rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   in_block(own, rank))
               : "memory");
}

// The same where nothing has been written that the other block should see: without a fence, which costs
// as much as half a step of a large product.
__device__ inline void release_at(const Barrier* own, unsigned rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(in_block(own, rank)) : "memory");
}

// The same box to the same place in every block of `blocks`, a bit for each of the cluster; the barrier
// at `done` in each of them counts its bytes.
__device__ inline void copy_box_to(uint16_t blocks, void* to, const CUtensorMap* from, int row,
                                   int feature, Barrier* done) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(from), "r"(feature), "r"(row), "r"(shared_address(done)), "h"(blocks)
      : "memory");
}

}  // namespace lmi
