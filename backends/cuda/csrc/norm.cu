// LayerNorm and RMSNorm by themselves, a block a row.
#include "moments.cuh"
#include "norm.h"

namespace lmi {
namespace {

constexpr int THREADS = 256;

__global__ void __launch_bounds__(THREADS) norm_kernel(const NormParams p) {
  __shared__ Moments of_warp[THREADS / 32];
  let_next_start();
  wait_for_last();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.features;
  const Moments own = warp_merge(moments(p.x, row, threadIdx.x * 8, p.features, THREADS * 8));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = own;
  __syncthreads();
  Moments all;
#pragma unroll
  for (int w = 0; w < THREADS / 32; ++w) all = merge(all, of_warp[w]);
  const Normal by = normal(all, p.bias.data != nullptr, p.eps);
  for (int i = threadIdx.x * 8; i < p.features; i += THREADS * 8) {
    float values[8];
    load8(p.x, row + i, values);
    apply(by, p.weight, p.bias, i, values);
#pragma unroll
    for (int j = 0; j < 8; ++j) store(p.out, p.out_type, row + i + j, values[j]);
  }
}

}  // namespace

void norm(const NormParams& p, const Device& gpu, cudaStream_t stream) {
  launch(&norm_kernel, p, dim3(p.rows), THREADS, 0, gpu.major >= 9, stream);
}

}  // namespace lmi
