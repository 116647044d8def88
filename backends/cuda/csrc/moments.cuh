// Mean and spread of a row in one pass, without the cancellation of sums of squares.
#pragma once

#include "common.cuh"

namespace lmi {

struct Moments {
  float count = 0, mean = 0, squares = 0;  // squares: of the distances from the mean
};

// Chan, Golub and LeVeque, 1979.
__device__ inline Moments merge(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  if (count == 0) return a;
  const float delta = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + delta * share, a.squares + b.squares + delta * delta * a.count * share};
}

// Of the first `count` vectors of eight; about zero if not `centred`, which is all RMSNorm needs.
template <typename T, int N>
__device__ Moments moments(const Raw<T> (&x)[N], int count, bool centred) {
  float sum = 0, squares = 0, values[8];
#pragma unroll
  for (int v = 0; v < N; ++v) {
    x[v].unpack(values);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += v < count ? values[i] : 0;
  }
  const float mean = centred && count ? sum / (8 * count) : 0;
#pragma unroll
  for (int v = 0; v < N; ++v) {
    x[v].unpack(values);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float distance = values[i] - mean;
      squares += v < count ? distance * distance : 0;
    }
  }
  return {8.0f * count, mean, squares};
}

// The same value in all lanes: each merge is done in lane order on both sides.
__device__ inline Moments warp_merge(Moments own) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const Moments other = {__shfl_xor_sync(~0u, own.count, offset),
                           __shfl_xor_sync(~0u, own.mean, offset),
                           __shfl_xor_sync(~0u, own.squares, offset)};
    own = threadIdx.x & offset ? merge(other, own) : merge(own, other);
  }
  return own;
}

// What a row is shifted and scaled by: LayerNorm's where there is a bias, else RMSNorm's.
struct Normal {
  float shift = 0, factor = 1;
};

__device__ inline Normal normal(const Moments& row, bool centred, float eps) {
  const float variance = row.squares / row.count;
  if (centred) return {row.mean, rsqrtf(variance + eps)};
  return {0, rsqrtf(variance + row.mean * row.mean + eps)};
}

// Eight features of a normalized row, which have these weights and biases.
template <typename T>
__device__ void apply(const Normal& by, const T* weight, const T* bias, float (&x)[8]) {
  float w[8], b[8] = {};
  load8(weight, w);
  if (bias) load8(bias, b);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = (x[i] - by.shift) * by.factor * w[i] + b[i];
}

}  // namespace lmi
