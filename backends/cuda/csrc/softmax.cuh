// A softmax in parts: taken in key by key, and merged.
#pragma once

#include "common.cuh"

namespace lmi {

// exp2(from - to), where nothing at all (-inf) stays nothing. As exp2f does it, but what is below the
// smallest normal number is zero, which spares three instructions.
__device__ inline float rescale(float from, float to) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(from - to));
  return from == -INFINITY ? 0.0f : power;
}

// What a group of lanes has seen: the largest score (base 2), the sum of weights, and its
// features of the weighted values.
struct Softmax {
  float top = -INFINITY, sum = 0, values[8] = {};

  template <typename T, int N>
  __device__ void add(const float (&scores)[N], const Raw<T> (&v)[N]) {
    float highest = top;
#pragma unroll
    for (int j = 0; j < N; ++j) highest = fmaxf(highest, scores[j]);
    const float kept = rescale(top, highest);
    sum *= kept;
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= kept;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float weight = rescale(scores[j], highest);
      sum += weight;
      float own[8];
      v[j].unpack(own);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] += weight * own[i];
    }
    top = highest;
  }

  // Take in what the lane `offset` further has.
  __device__ void merge_lane(int offset) {
    const float other = __shfl_xor_sync(~0u, top, offset), highest = fmaxf(top, other);
    const float kept = rescale(top, highest), added = rescale(other, highest);
    sum = sum * kept + __shfl_xor_sync(~0u, sum, offset) * added;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      values[i] = values[i] * kept + __shfl_xor_sync(~0u, values[i], offset) * added;
    }
    top = highest;
  }
};

// A head's largest score, sum of weights, and one feature of its weighted values.
struct Feature {
  float top = -INFINITY, sum = 0, value = 0;

  // Of no tokens nothing; what is not a number stays so, and is noticed in the logits.
  __device__ float result() const { return sum == 0 ? 0 : __fdividef(value, sum); }
};

// Feature d from `count` softmaxes, `step` floats apart, N at a time: values, top and sum.
template <int N, typename Load>
__device__ Feature merge(const float* records, int count, int step, int dim, int d, Load load) {
  Feature of;
#pragma unroll 1
  for (int i = 0; i < count; i += N) {
    float tops[N], sums[N], values[N], highest = of.top;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float* record = records + min(i + j, count - 1) * step;
      tops[j] = i + j < count ? load(record + dim) : -INFINITY;
      sums[j] = load(record + dim + 1), values[j] = load(record + d);
      highest = fmaxf(highest, tops[j]);
    }
    const float kept = rescale(of.top, highest);
    of.sum *= kept, of.value *= kept, of.top = highest;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float weight = rescale(tops[j], highest);
      of.sum += weight * sums[j], of.value += weight * values[j];
    }
  }
  return of;
}

}  // namespace lmi
