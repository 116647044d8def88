// A decode step's layers in one persistent kernel, for more rows than step.cuh's: products are shared by
// clusters of blocks.
#pragma once

#include "cluster_product.cuh"
#include "step.cuh"

namespace lmi {

// Not inlined: there are registers for it, but not where products' are kept as well.
template <typename X, typename Wait>
static __device__ __noinline__ void attend_apart(const AttentionParams& p, float* shared, Wait wait) {
  attend_phase<X, false>(p, shared, wait);
}

template <typename Product>
__global__ void __launch_bounds__(STEP_THREADS, 1) cluster_step_kernel(const StepParams s) {
#if __CUDA_ARCH__ >= 900
  using X = typename Product::X;
  using W = typename Product::W;
  // The warps' rings; sums from the cluster's blocks, what earlier passes have found, and x, whose place
  // attention has for itself; and what all products' weights are.
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr int WORDS = PHASE_BYTES / 16;
  __shared__ uint4 phases[2][WORDS];  // this one and the next
  __shared__ Exchange exchange;
  const auto* words = reinterpret_cast<const uint4*>(s.phases);
  const bool copies = threadIdx.x < WORDS;

  if (copies) phases[0][threadIdx.x] = words[threadIdx.x];
  auto* products = reinterpret_cast<Weights*>(shared + s.products_at);
#pragma unroll 1
  for (int i = threadIdx.x; i < s.products; i += STEP_THREADS) products[i] = s.weights[i];
  if (threadIdx.x == 0) exchange.begin();
  GridBarrier barrier(s.barrier);
  __syncthreads();
  arrive_in_cluster();
  Stream<W, PassTiles> weights(products, s.products, shared, s.slots);
  weights.fill();
  await_cluster();
#pragma unroll 1
  for (int i = 0; i < s.count; ++i) {
    const Phase& phase = reinterpret_cast<const Phase&>(phases[i % 2]);
    uint4 ahead = {};
    if (copies && i + 1 < s.count) ahead = words[(i + 1) * WORDS + threadIdx.x];
    const auto wait = [&] {
      if (phase.barrier) barrier.wait();
    };
    unsigned char* beside = shared + s.slots * (STEP_WARPS * SLOT_BYTES);
    if (phase.work == Work::linear) {
      auto* held = reinterpret_cast<float2*>(beside + TeamSums::BYTES);
      multiply_in_cluster<Product>(phase.linear, phase.passes, phase.staged, weights,
                                       reinterpret_cast<X*>(held + s.held * 32),
                                       reinterpret_cast<float4*>(beside), held, exchange, wait);
    } else if (phase.work == Work::attention) {
      attend_apart<X>(phase.attention, reinterpret_cast<float*>(beside), wait);
    } else {
      wait();
      normalize_phase<X>(phase.norm);
    }
    if (copies) phases[(i + 1) % 2][threadIdx.x] = ahead;
    __syncthreads();
    if (reinterpret_cast<const Phase&>(phases[(i + 1) % 2]).barrier) barrier.arrive();
  }
#endif
}

// Call `use` with the kernel for the program's weights. Weights of half types run here on request alone:
// cuBLAS is faster for them (docs/performance-notes.md).
template <typename X, typename Use>
auto with_kernel(const Program& program, Use use) {
  constexpr int NT = TeamSums::NT;
  switch (program.weight_type) {
    case Type::int8: return use(&cluster_step_kernel<TensorProduct<X, int8_t, NT>>);
    case Type::float8: return use(&cluster_step_kernel<TensorProduct<X, __nv_fp8_e4m3, NT>>);
    default: return use(&cluster_step_kernel<TensorProduct<X, X, NT>>);
  }
}

template <typename X>
int cluster_places(const Program& program) {
  return with_kernel<X>(program, [&](auto kernel) {
    return most_clusters(kernel, STEP_THREADS, program.shared_bytes, Start::together, CLUSTER);
  });
}

template <typename X>
void cluster_step(const Program& program, const StepParams& p, cudaStream_t stream) {
  with_kernel<X>(program, [&](auto kernel) {
    launch(kernel, p, dim3(program.blocks), STEP_THREADS, program.shared_bytes, Start::together, stream,
           CLUSTER);
  });
}

}  // namespace lmi
