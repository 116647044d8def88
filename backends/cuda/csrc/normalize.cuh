// LayerNorm or RMSNorm of one row, by a block.
#pragma once

#include "moments.cuh"
#include "norm.h"

namespace lmi {

constexpr int NORM_THREADS = 256, NORM_HELD = 4;  // vectors of eight, read at once

template <typename X, typename W>
__device__ void normalize(const NormParams& p, int index) {
  __shared__ Moments of_warp[NORM_THREADS / 32];
  const bool centred = p.bias.data != nullptr;
  const int64_t row = static_cast<int64_t>(index) * p.features;
  const X* x = static_cast<const X*>(p.x.data) + row;
  const int vectors = p.features / 8, mine = (vectors - 1 - threadIdx.x + NORM_THREADS) / NORM_THREADS;
  Raw<X> held[NORM_HELD];
  const auto read = [&](int first) {
#pragma unroll
    for (int v = 0; v < NORM_HELD; ++v) {
      if (first + v < mine) held[v].read(x + (threadIdx.x + (first + v) * NORM_THREADS) * 8);
    }
  };
  Moments own;
  for (int first = 0; first < mine; first += NORM_HELD) {
    read(first);
    own = merge(own, moments(held, min(mine - first, NORM_HELD), centred));
  }
  own = warp_merge(own);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = own;
  __syncthreads();
  Moments all;
#pragma unroll
  for (int w = 0; w < NORM_THREADS / 32; ++w) all = merge(all, of_warp[w]);
  const Normal by = normal(all, centred, p.eps);
  for (int first = 0; first < mine; first += NORM_HELD) {
    if (mine > NORM_HELD) read(first);
#pragma unroll
    for (int v = 0; v < NORM_HELD; ++v) {
      if (first + v >= mine) break;
      const int at = (threadIdx.x + (first + v) * NORM_THREADS) * 8;
      float values[8];
      held[v].unpack(values);
      const W* bias = centred ? static_cast<const W*>(p.bias.data) + at : nullptr;
      apply(by, static_cast<const W*>(p.weight.data) + at, bias, values);
      store8(static_cast<W*>(p.out) + row + at, values);
    }
  }
}

}  // namespace lmi
