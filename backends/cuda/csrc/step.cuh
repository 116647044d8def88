// A decode step's layers in one persistent kernel.
//
// A step of few rows is bound by reading its weights. Kernel by kernel, memory idles while one
// kernel ends and the next one begins. Here a block for every processor stays for all layers: its
// warps' streams (stream.cuh) read weights on and on, past the barriers between the phases, so that
// the next product's are there before its inputs are.
#pragma once

#include "attention.cuh"
#include "grid.cuh"
#include "multiply.cuh"
#include "normalize.cuh"
#include "step.h"

namespace lmi {

// The products of a program, for a stream.
struct RecordedProducts {
  const Phase* phases;
  int at;

  __device__ bool next(Weights& to) {
    if (at < 0) return false;
    to = phases[at].linear.weights;
    at = phases[at].next_linear;
    return true;
  }
};

// Ask for what all blocks are about to read, so that it comes from L2 then.
__device__ inline void prefetch(Operand vector, int count) {
  if (!vector.data) return;
  const int line = 128, bytes = count * (vector.type == Type::float32 ? 4 : 2);
  for (int at = threadIdx.x * line; at < bytes; at += THREADS * line) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(vector.data) + at));
  }
}

// Not inlined: each is compiled once, not for every kind of product. The fewer items, the more
// warps have one.
template <typename T, int G>
__device__ __noinline__ GridBarrier attend_phase(const AttentionParams& p, float* shared,
                                                 GridBarrier barrier, bool wait) {
  const int items = items_of(p), blocks = gridDim.x;
  const int warps = items <= blocks ? 8 : items <= 2 * blocks ? 4 : 2;
  attend_all<T, G>(p, warps, shared, [&] {
    if (wait) barrier.wait();
  });
  return barrier;
}

template <typename T>
__device__ GridBarrier attend_phase(const AttentionParams& p, float* shared, GridBarrier barrier,
                                    bool wait) {
  const int group = p.heads / p.kv_heads;
  if (group == 1) return attend_phase<T, 1>(p, shared, barrier, wait);
  if (group == 2) return attend_phase<T, 2>(p, shared, barrier, wait);
  return attend_phase<T, 4>(p, shared, barrier, wait);
}

template <typename Product, int NT>
__global__ void __launch_bounds__(THREADS, 1) step_kernel(const StepParams s) {
  using X = typename Product::X;
  using W = typename Product::W;
  // The warps' rings, the partial sums, and x; attention has what follows the rings for itself.
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr int WORDS = PHASE_BYTES / 16;
  __shared__ uint4 held[2][WORDS];  // this phase and the next
  const auto* words = reinterpret_cast<const uint4*>(s.phases);
  const bool copies = threadIdx.x < WORDS;
  float* partial = reinterpret_cast<float*>(shared + s.slots * RING_SLOTS);
  X* x = reinterpret_cast<X*>(partial + 2 * PARTIALS<NT>);

  if (copies) held[0][threadIdx.x] = words[threadIdx.x];
  Stream<W, RecordedProducts> weights(RecordedProducts{s.phases, s.first_linear}, shared, s.slots);
  weights.fill();
  GridBarrier barrier(s.barrier);
  __syncthreads();
  for (int i = 0; i < s.count; ++i) {
    const Phase& phase = reinterpret_cast<const Phase&>(held[i % 2]);
    uint4 ahead = {};
    if (copies && i + 1 < s.count) ahead = words[(i + 1) * WORDS + threadIdx.x];
    if (phase.work == Work::linear) {
      const LinearParams& p = phase.linear;
      prefetch(p.norm_weight, p.weights.inputs);
      prefetch(p.norm_bias, p.weights.inputs);
      if (phase.barrier) barrier.wait();
      const Part part(p.weights, blockIdx.x, gridDim.x);
      if (part.tile < p.weights.tiles) {
        const Rows rows(p, part, NT * 8);
        stage<X, W, X>(p, rows, part.begin, part.end, x, reinterpret_cast<Moments*>(partial));
        __syncthreads();
        multiply<Product, NT>(p, part, rows, weights, x, partial);
      }
    } else if (phase.work == Work::attention) {
      barrier = attend_phase<X>(phase.attention, partial, barrier, phase.barrier);
    } else {
      if (phase.barrier) barrier.wait();
      for (int row = blockIdx.x; row < phase.norm.rows; row += gridDim.x) {
        normalize<X, X>(phase.norm, row);
        __syncthreads();
      }
    }
    if (copies) held[(i + 1) % 2][threadIdx.x] = ahead;
    __syncthreads();
    if (reinterpret_cast<const Phase&>(held[(i + 1) % 2]).barrier) barrier.arrive();
  }
}

template <typename Product, int NT>
void launch_step(const Program& program, const StepParams& p, const Device& gpu,
                 cudaStream_t stream) {
  launch(&step_kernel<Product, NT>, p, dim3(gpu.processors), THREADS, program.shared_bytes,
         Start::together, stream);
}

}  // namespace lmi
