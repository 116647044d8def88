// Rows of x on their way into shared memory, normalized if there is a norm, in front of a product.
#pragma once

#include "linear.h"
#include "normal.cuh"
#include "product.cuh"

namespace lmi {

constexpr int PAD = 128;  // x in shared memory is filled up to a multiple of this

template <typename X>
__host__ __device__ constexpr int row_stride(int features) {
  // A multiple of 128 bytes and 64 more: rows g and g + 1 then lie in different banks.
  return (features + PAD - 1) / PAD * PAD + 64 / static_cast<int>(sizeof(X));
}

// Warps that share a row of x between them.
template <int WARPS>
struct RowShare {
  int groups = 1, width, index, own;  // rows at a time; threads a row; which; its first feature

  __device__ explicit RowShare(int rows) {
#pragma unroll 1
    while (groups < rows && groups < WARPS) groups *= 2;
    width = WARPS * 32 / groups;
    index = threadIdx.x / width, own = threadIdx.x % width * 8;
  }
};

// Eights of a row that a thread works on at a time.
template <typename X>
constexpr int AT_A_TIME = 8 / sizeof(X);

// A norm's weights and biases for a thread's features. They are nobody's results: the first ones are
// read while x is still awaited.
template <typename X>
struct NormTerms {
  Raw<X> weight[AT_A_TIME<X>], bias[AT_A_TIME<X>];

  // From feature `first` on, `step` apart.
  __device__ void read(const LinearParams& p, int first, int end, int step) {
    if (!p.norm_weight.data) return;
#pragma unroll
    for (int i = 0; i < AT_A_TIME<X>; ++i) {
      const int at = first + i * step;
      if (at >= end) continue;
      weight[i].read(static_cast<const X*>(p.norm_weight.data) + at);
      if (p.norm_bias.data) bias[i].read(static_cast<const X*>(p.norm_bias.data) + at);
    }
  }
};

// Put features begin to end of the rows of x into shared memory, zeros up to a whole unit.
// `terms`: those of the thread's first features. `scratch` holds a float a warp.
template <typename X, typename W, typename From, int WARPS>
__device__ void stage(const LinearParams& p, const RowShare<WARPS>& share, NormTerms<X>& terms,
                      int begin, int end, X* to, float* scratch) {
  constexpr int N = AT_A_TIME<X>;
  const int inputs = p.weights.inputs, stride = row_stride<X>(end - begin);
  const int padded = stride - 64 / static_cast<int>(sizeof(X)), step = share.width * 8;
  const bool again = padded > N * step;  // a thread has more features than `terms`
#pragma unroll 1
  for (int first = 0; first < p.rows; first += share.groups) {
    const int r = first + share.index, row = min(r, p.rows - 1);
    const From* x = static_cast<const From*>(p.x.data) + static_cast<int64_t>(row) * inputs;
    Normal by;
    if (p.norm_weight.data) {
      by = normal(x, inputs, p.norm_bias.data, p.eps, share.width, scratch);
    }
    if (r >= p.rows) continue;
#pragma unroll 1
    for (int base = share.own; base < padded; base += N * step) {
      if (again && (first > 0 || base > share.own)) terms.read(p, begin + base, end, step);
      Raw<From> some[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int at = begin + base + i * step;
        if (at < end) some[i].read(x + at);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int at = base + i * step;
        if (at >= padded) break;
        float values[8];
        some[i].unpack(values);
        if (p.norm_weight.data && begin + at < end) {
          apply(by, terms.weight[i], terms.bias[i], values);
        }
        store8(to + r * stride + place<X, W>(at), values);
      }
    }
  }
}

}  // namespace lmi
