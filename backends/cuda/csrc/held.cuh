// Rows of x in registers, normalized if there is a norm, in front of a product of a step.
//
// Sixteen rows of x do not fit in shared memory beside rings of a useful depth. But a warp takes the
// same units of every tile of a product, so it wants no more of x than these units' features: they stay
// in its registers through all tiles, and shared memory is for rings alone.
#pragma once

#include "multiply.cuh"
#include "normal.cuh"
#include "step.h"

namespace lmi {

// `Product`: of NT times eight rows; a lane has rows n * 8 + lane / 4.
template <typename Product, int NT>
class HeldRows {
 public:
  // Features `part` of x, once they are there. `scratch`: two floats a row for every warp, which nobody else
  // uses before the block's next barrier but one.
  __device__ HeldRows(const LinearParams& p, const Part& part, float* scratch) {
    const int inputs = p.weights.inputs, features = part.end - part.begin;
    const X* rows[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int row = min(n * 8 + lane() / 4, p.rows - 1);  // above the last: copies of it, not used
      rows[n] = static_cast<const X*>(p.x.data) + static_cast<int64_t>(row) * inputs + part.begin;
    }
    for_all([&](int i, int e, int at) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        x_[i][e][n] = at < features ? *reinterpret_cast<const uint4*>(rows[n] + at) : uint4{};
      }
    });
    if (p.norm_weight.data) normalize(p, features, scratch);
  }

  // The products of the warp's units of a tile.
  template <typename, int WARPS, typename S>
  __device__ void multiply(Product& product, S& weights, int features) const {
    static_assert(WARPS == STEP_WARPS);
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
      if (unit(i) < features) product.add(weights.next(), x_[i]);
    }
  }

 private:
  using X = typename Product::X;
  using W = typename Product::W;
  static constexpr int UNITS = HELD_FEATURES / (STEP_WARPS * UNIT<W>);
  static constexpr int EIGHTS = Product::EIGHTS;

  static __device__ int lane() { return threadIdx.x % 32; }
  // The first feature of the warp's unit number i.
  static __device__ int unit(int i) { return (i * STEP_WARPS + threadIdx.x / 32) * UNIT<W>; }

  // Call `use` with each unit, eight of its features, and where these begin in the part.
  template <typename Use>
  static __device__ void for_all(Use use) {
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
#pragma unroll
      for (int e = 0; e < EIGHTS; ++e) use(i, e, unit(i) + Product::eight(e));
    }
  }

  static __device__ void unpack(const uint4& raw, float (&to)[8]) {
    load8(reinterpret_cast<const X*>(&raw), to);
  }

  // A whole row's features are here: the block's warps have them all.
  __device__ void normalize(const LinearParams& p, int features, float* scratch) {
    Normal by[NT];
    float sums[NT] = {};
    if (p.norm_bias.data) {
      for_all([&](int i, int e, int) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          float values[8];
          unpack(x_[i][e][n], values);
#pragma unroll
          for (float value : values) sums[n] += value;
        }
      });
      sum_rows(sums, scratch);
#pragma unroll
      for (int n = 0; n < NT; ++n) by[n].shift = __fdividef(sums[n], features), sums[n] = 0;
      scratch += STEP_WARPS * NT * 8;
    }
    for_all([&](int i, int e, int at) {
      if (at >= features) return;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        float values[8];
        unpack(x_[i][e][n], values);
#pragma unroll
        for (float value : values) sums[n] += (value - by[n].shift) * (value - by[n].shift);
      }
    });
    sum_rows(sums, scratch);
#pragma unroll
    for (int n = 0; n < NT; ++n) by[n].factor = rsqrtf(__fdividef(sums[n], features) + p.eps);
    for_all([&](int i, int e, int at) {
      if (at >= features) return;
      Raw<X> weight, bias;
      weight.read(static_cast<const X*>(p.norm_weight.data) + at);
      if (p.norm_bias.data) bias.read(static_cast<const X*>(p.norm_bias.data) + at);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        float values[8];
        unpack(x_[i][e][n], values);
        apply(by[n], weight, bias, values);
        store8(reinterpret_cast<X*>(&x_[i][e][n]), values);
      }
    });
  }

  // The lanes' rows' sums over the block, in each of them, in the same order for all rows.
  static __device__ void sum_rows(float (&sums)[NT], float* scratch) {
    constexpr int ROWS = NT * 8, LANES = 32 / ROWS;  // that add up a row's
    static_assert(ROWS == 16);
    const int g = lane() / 4, warp = threadIdx.x / 32;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      sums[n] += __shfl_xor_sync(~0u, sums[n], 1);
      sums[n] += __shfl_xor_sync(~0u, sums[n], 2);
      if (lane() % 4 == 0) scratch[warp * ROWS + n * 8 + g] = sums[n];
    }
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int w = lane() / ROWS; w < STEP_WARPS; w += LANES) sum += scratch[w * ROWS + lane() % ROWS];
    sum += __shfl_xor_sync(~0u, sum, ROWS);
#pragma unroll
    for (int n = 0; n < NT; ++n) sums[n] = __shfl_sync(~0u, sum, n * 8 + g);
  }

  uint4 x_[UNITS][EIGHTS][NT];
};

}  // namespace lmi
