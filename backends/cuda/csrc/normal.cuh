// LayerNorm and RMSNorm: statistics of a row by the threads that share it. Code is kept short: in
// a persistent kernel it is run once a phase, and fetching instructions is what takes time.
#pragma once

#include "common.cuh"

namespace lmi {

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// The sum over `width` neighbouring threads (a multiple of 32), in each of them. All threads of the
// block come here. `scratch`: a float a warp.
__device__ inline float row_sum(float value, int width, float* scratch) {
  value = warp_sum(value);
  if (width == 32) return value;
  const int warp = threadIdx.x / 32, warps = width / 32, first = warp / warps * warps;
  __syncthreads();  // what was there has been read
  if (threadIdx.x % 32 == 0) scratch[warp] = value;
  __syncthreads();
  value = 0;
#pragma unroll 1
  for (int w = 0; w < warps; ++w) value += scratch[first + w];
  return value;
}

// What a row is shifted and scaled by: LayerNorm's where there is a bias, else RMSNorm's.
struct Normal {
  float shift = 0, factor = 1;
};

// Of a row of `features`, which `width` threads share. Two passes, without the cancellation of
// sums of squares.
template <typename T>
__device__ Normal normal(const T* x, int features, bool centred, float eps, int width,
                         float* scratch) {
  const int own = threadIdx.x % width * 8;
  Normal found;
  float values[8];
  if (centred) {
    float sum = 0;
#pragma unroll 4
    for (int at = own; at < features; at += width * 8) {
      load8(x + at, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += values[i];
    }
    found.shift = __fdividef(row_sum(sum, width, scratch), features);
  }
  float squares = 0;
#pragma unroll 4
  for (int at = own; at < features; at += width * 8) {
    load8(x + at, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float distance = values[i] - found.shift;
      squares += distance * distance;
    }
  }
  found.factor = rsqrtf(__fdividef(row_sum(squares, width, scratch), features) + eps);
  return found;
}

// Eight features of a normalized row, which have these weights and biases; a bias of zeros is none.
template <typename T>
__device__ void apply(const Normal& by, const Raw<T>& weight, const Raw<T>& bias, float (&x)[8]) {
  float w[8], b[8];
  weight.unpack(w), bias.unpack(b);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = (x[i] - by.shift) * by.factor * w[i] + b[i];
}

}  // namespace lmi
