// A fused product for up to 64 rows. Weights stream through a ring in shared memory, which the copy
// engine fills while tensor cores multiply; every weight byte is read once.
//
// A cluster of blocks works on a tile: each has a share of the features, the same for all tiles.
// What they find they send to each other, and each adds up and finishes some rows of x.
#pragma once

#include "gemm_finish.cuh"
#include "product.cuh"

namespace lmi {

// A step of a block: of which tile, and which of the block's share.
struct Step {
  unsigned tile, k = 0;

  __device__ void next(const Share& share) {
    if (++k == share.count) k = 0, tile += share.clusters;
  }
};

// The warp that copies: all of a block's steps, as many ahead of their use as there is room.
template <typename G>
__device__ void copy_steps(const GemmParams& p, const Share& share, const GemmMemory& memory) {
  const int height = p.gated ? HALF : 2 * HALF;
  const auto row = [&](Step step, int half) { return step.tile * height + half * p.upper; };
  const auto feature = [&](unsigned k) { return (share.first + k) * G::FEATURES; };
  const auto weights = [&](Step step, int slot, int half) {
    copy_box(memory.steps + slot * p.stride + half * HALF_BYTES, &p.weights, row(step, half),
             feature(step.k), memory.full + slot);
  };
  const auto x = [&](unsigned k, unsigned char* to, Barrier* full) {
#pragma unroll
    for (int box = 0; box < G::X_BOXES; ++box) {
      copy_box(to + box * G::BOX, &p.x, 0, feature(k) + box * G::X_FEATURES, full);
    }
  };
  const auto x_in_ring = [&](unsigned k, int slot) {
    if (!p.keep) x(k, memory.steps + slot * p.stride + G::WEIGHT_BYTES, memory.full + slot);
  };
  // Weights are nobody's results: the last kernel may still be at work.
  const unsigned total = share.tiles * share.count, begun = min(total, p.depth);
  Step step{share.cluster};
#pragma unroll 1
  for (unsigned i = 0; i < begun; ++i, step.next(share)) {
    memory.full[i].arrive_and_expect(p.stride);
    weights(step, i, 0), weights(step, i, 1);
  }
  wait_for_last();
#pragma unroll 1
  for (unsigned k = 0; p.keep && k < share.count; ++k) {
    memory.x_full[k].arrive_and_expect(G::X_BYTES);
    x(k, memory.x + k * G::X_BYTES, memory.x_full + k);
  }
  Step again{share.cluster};
#pragma unroll 1
  for (unsigned i = 0; i < begun; ++i, again.next(share)) x_in_ring(again.k, i);
  RingSlot slot;
#pragma unroll 1
  for (unsigned i = begun; i < total; ++i, step.next(share), slot.next(p.depth)) {
    memory.empty[slot.at].wait(slot.phase);
    memory.full[slot.at].arrive_and_expect(p.stride);
    weights(step, slot.at, 0), weights(step, slot.at, 1);
    x_in_ring(step.k, slot.at);
  }
}

// The products of a box of x (of quantized weights, half a step), on their way. Such weights are
// widened in `held`, which must stay as it is until they are done.
template <typename G>
__device__ void multiply_box(const unsigned char* weights, const unsigned char* x, int box,
                             float (&sums)[G::SUMS], uint32_t (&held)[G::IN_BOX][4]) {
  using T = typename G::T;
  using W = typename G::W;
  const uint64_t b = matrix(x + box * G::BOX);  // 2 units of 16 bytes to a product's next features
  if constexpr (sizeof(W) == 1) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    const unsigned char* row =
        weights + lane % 4 * 2 + (threadIdx.x / 32 % HALF_WARPS * 16 + g) * BOX_BYTES;
#pragma unroll
    for (int k = 0; k < G::IN_BOX; ++k) {
      // The swizzle: g is also the row modulo eight.
      const unsigned char* at = row + ((box * G::IN_BOX + k) ^ g) * 16;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto* two = reinterpret_cast<const uint16_t*>(at + i % 2 * 8 * BOX_BYTES + i / 2 * 8);
        held[k][i] = expand(*two, 0x4140, W(), T());
      }
    }
#pragma unroll
    for (int k = 0; k < G::IN_BOX; ++k) hold(held[k]);
    begin_products();
#pragma unroll
    for (int k = 0; k < G::IN_BOX; ++k) multiply_add<T, G::ROWS>(sums, held[k], b + 2 * k);
  } else {
    const uint64_t a = matrix(weights);
    begin_products();
#pragma unroll
    for (int k = 0; k < G::IN_BOX; ++k) multiply_add<T, G::ROWS>(sums, a + 2 * k, b + 2 * k);
  }
  close_products();
}

// The warpgroups that multiply.
template <typename G>
__device__ void multiply_steps(const GemmParams& p, const Share& share, const GemmMemory& memory) {
  const int half = threadIdx.x / (HALF_WARPS * 32), lane = threadIdx.x % 32;
  const Finish<G> finish(p, share);
  RingSlot slot;
  int before = -1;  // the slot of the step whose products may not be done yet
  float sums[G::SUMS];
  // In turn: those of the last box are still being read while this one's are widened.
  uint32_t held[G::X_BOXES][G::IN_BOX][4];
  const auto multiply = [&](unsigned k) {
    const unsigned char* step = memory.steps + slot.at * p.stride;
    if (p.keep) memory.x_full[k].wait(0);
    memory.full[slot.at].wait(slot.phase);
    const unsigned char* x = p.keep ? memory.x + k * G::X_BYTES : step + G::WEIGHT_BYTES;
#pragma unroll
    for (int box = 0; box < G::X_BOXES; ++box) {
      multiply_box<G>(step + half * HALF_BYTES, x, box, sums, held[box]);
      await_products<1>();
      if (box == 0 && lane == 0 && before >= 0) memory.empty[before].arrive();
    }
    before = slot.at;
    slot.next(p.depth);
  };
#pragma unroll 1
  for (unsigned i = 0; i < share.tiles; ++i) {
    const unsigned tile = share.cluster + i * share.clusters;
    if (threadIdx.x == 0) memory.sent->arrive_and_expect(G::PARTS);
    GemmTerms terms;
    finish.read_terms(terms, threadIdx.x, tile);
#pragma unroll
    for (int j = 0; j < G::SUMS; ++j) sums[j] = 0;
    hold(sums);
#pragma unroll 1
    for (unsigned k = 0; k < share.count; ++k) multiply(k);
    await_products<0>();
    hold(sums);
    if (lane == 0) memory.empty[before].arrive();
    before = -1;

    if (i == 0) {
      await_cluster();
    } else {
      memory.taken->wait_for_cluster((i - 1) % 2);
    }
    finish.send_sums(memory, sums);
    memory.sent->wait_for_cluster(i % 2);
    finish(memory, terms, tile);
    __syncwarp();
    // After the last tile nobody asks, and others may have ended.
    if (i + 1 < share.tiles && lane < p.splits) arrive_at(memory.taken, lane);
  }
}

template <typename G>
__global__ void __launch_bounds__(GEMM_THREADS, G::AT_ONCE)
    gemm_kernel(const __grid_constant__ GemmParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char shared[];
  __shared__ Barrier full[MOST_DEPTH], empty[MOST_DEPTH], x_full[MOST_KEPT], sent, taken;
  unsigned char* steps = shared + (-shared_address(shared) & (G::ALIGNED - 1));
  unsigned char* parts = steps + p.depth * p.stride;
  const GemmMemory memory{steps,  parts + G::PARTS, reinterpret_cast<float4*>(parts),
                          full,   empty,            x_full,
                          &sent, &taken};
  const Share share(p);
  const bool multiplies = threadIdx.x / 32 < GEMM_WARPS;
  const int lane = threadIdx.x % 32;

  let_next_start();
  if (!multiplies) {
    if (lane == 0) {
      prefetch(&p.weights), prefetch(&p.x);
      sent.init(1), taken.init(p.splits * GEMM_WARPS);
    }
    if (lane < MOST_DEPTH) full[lane].init(1), empty[lane].init(GEMM_WARPS);
    if (lane < MOST_KEPT) x_full[lane].init(1);
    fence_barriers();
  }
  __syncthreads();
  arrive_in_cluster();
  if (multiplies) {
    wait_for_last();
    multiply_steps<G>(p, share, memory);
  } else {
    if (lane == 0) copy_steps<G>(p, share, memory);
    __syncwarp();
    await_cluster();
  }
#endif
}

}  // namespace lmi
