// LayerNorm or RMSNorm of one row, by a block.
#pragma once

#include "norm.h"
#include "normal.cuh"

namespace lmi {

template <typename X, typename W>
__device__ void normalize(const NormParams& p, int index) {
  __shared__ float scratch[32];
  const W* weight = static_cast<const W*>(p.weight.data);
  const W* bias = static_cast<const W*>(p.bias.data);
  const int64_t row = static_cast<int64_t>(index) * p.features;
  const X* x = static_cast<const X*>(p.x.data) + row;
  const Normal by = normal(x, p.features, bias, p.eps, blockDim.x, scratch);
#pragma unroll 1
  for (int at = threadIdx.x * 8; at < p.features; at += blockDim.x * 8) {
    float values[8];
    load8(x + at, values);
    Raw<W> own, added;
    own.read(weight + at);
    if (bias) added.read(bias + at);
    apply(by, own, added, values);
    store8(static_cast<W*>(p.out) + row + at, values);
  }
}

}  // namespace lmi
