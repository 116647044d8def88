// LayerNorm and RMSNorm by themselves, a block a row.
#include "moments.cuh"
#include "norm.h"

namespace lmi {
namespace {

constexpr int THREADS = 256, HELD = 4;  // vectors of eight, read at once

template <typename X, typename W>
__global__ void __launch_bounds__(THREADS) norm_kernel(const NormParams p) {
  __shared__ Moments of_warp[THREADS / 32];
  let_next_start();
  wait_for_last();
  const bool centred = p.bias.data != nullptr;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.features;
  const X* x = static_cast<const X*>(p.x.data) + row;
  const int vectors = p.features / 8, mine = (vectors - 1 - threadIdx.x + THREADS) / THREADS;
  Raw<X> held[HELD];
  const auto read = [&](int first) {
#pragma unroll
    for (int v = 0; v < HELD; ++v) {
      if (first + v < mine) held[v].read(x + (threadIdx.x + (first + v) * THREADS) * 8);
    }
  };
  Moments own;
  for (int first = 0; first < mine; first += HELD) {
    read(first);
    own = merge(own, moments(held, min(mine - first, HELD), centred));
  }
  own = warp_merge(own);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = own;
  __syncthreads();
  Moments all;
#pragma unroll
  for (int w = 0; w < THREADS / 32; ++w) all = merge(all, of_warp[w]);
  const Normal by = normal(all, centred, p.eps);
  for (int first = 0; first < mine; first += HELD) {
    if (mine > HELD) read(first);
#pragma unroll
    for (int v = 0; v < HELD; ++v) {
      if (first + v >= mine) break;
      const int at = (threadIdx.x + (first + v) * THREADS) * 8;
      float values[8];
      held[v].unpack(values);
      const W* bias = centred ? static_cast<const W*>(p.bias.data) + at : nullptr;
      apply(by, static_cast<const W*>(p.weight.data) + at, bias, values);
      store8(static_cast<W*>(p.out) + row + at, values);
    }
  }
}

template <typename X, typename W>
void launch_norm(const NormParams& p, const Device& gpu, cudaStream_t stream) {
  launch(&norm_kernel<X, W>, p, dim3(p.rows), THREADS, 0, gpu.major >= 9, stream);
}

// The types that occur: all alike, or a float32 stream.
template <typename W>
void from_type(const NormParams& p, const Device& gpu, cudaStream_t stream) {
  if (p.x.type == Type::float32) return launch_norm<float, W>(p, gpu, stream);
  launch_norm<W, W>(p, gpu, stream);
}

}  // namespace

void norm(const NormParams& p, const Device& gpu, cudaStream_t stream) {
  switch (p.weight.type) {
    case Type::float16: return from_type<__half>(p, gpu, stream);
    case Type::bfloat16: return from_type<__nv_bfloat16>(p, gpu, stream);
    default: return launch_norm<float, float>(p, gpu, stream);
  }
}

}  // namespace lmi
