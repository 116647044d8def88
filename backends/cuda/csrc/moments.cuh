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

__device__ inline Moments moments(const float (&x)[8]) {
  float sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += x[i];
  const float mean = sum / 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) squares += (x[i] - mean) * (x[i] - mean);
  return {8, mean, squares};
}

// Of row[first], row[first + 1], ... row[first + 7], then `stride` further, up to `end`.
__device__ inline Moments moments(Operand x, int64_t row, int first, int end, int stride) {
  Moments total;
  float values[8];
  for (int i = first; i < end; i += stride) {
    load8(x, row + i, values);
    total = merge(total, moments(values));
  }
  return total;
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

// Eight features of a normalized row, from `at` on.
__device__ inline void apply(const Normal& by, Operand weight, Operand bias, int at,
                             float (&x)[8]) {
  float w[8], b[8] = {};
  load8(weight, at, w);
  if (bias.data) load8(bias, at, b);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = (x[i] - by.shift) * by.factor * w[i] + b[i];
}

}  // namespace lmi
