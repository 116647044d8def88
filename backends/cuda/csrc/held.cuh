// Rows of x in registers, normalized if there is a norm, in front of a product of a step.
//
// Sixteen rows of x do not fit in shared memory beside rings of a useful depth. But a warp takes the
// same units of every tile of a product, so it wants no more of x than these units' features: they stay
// in its registers through all tiles, and shared memory is for rings alone.
#pragma once

#include "multiply.cuh"
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
  using Two = typename TwoOf<X>::type;
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

  // A whole row's features are here: the block's warps have them all. Every block does this for all rows,
  // so it is done two features an instruction, and sums by tensor cores.
  __device__ void normalize(const LinearParams& p, int features, float* scratch) {
    const float count = features;
    float sums[NT];
    if (p.norm_bias.data) {
      sum_features(sums);
      sum_warps(sums, scratch);
      shift([&](int n) { return __fdividef(sums[n], count); }, features);
      scratch += STEP_WARPS * NT * 8;
    }
    sum_squares(sums);
    sum_warps(sums, scratch);
    Two power[NT], high[NT], low[NT];  // the factor: a power of two times (high + low)
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const uint32_t factor = __float_as_uint(rsqrtf(__fdividef(sums[n], count) + p.eps));
      power[n] = both(__uint_as_float(factor & 0x7f800000u));
      split(__uint_as_float((factor & 0x7fffffu) | 0x3f800000u), high[n], low[n]);
    }
    for_all([&](int i, int e, int at) {
      if (at >= features) return;
      Raw<X> weight, bias;
      weight.read(static_cast<const X*>(p.norm_weight.data) + at);
      if (p.norm_bias.data) bias.read(static_cast<const X*>(p.norm_bias.data) + at);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Two w = pair(weight.bits[0], j);
          const Two scale = __hfma2(w, high[n], __hmul2(w, low[n]));
          pair(x_[i][e][n], j) =
              __hfma2(__hmul2(pair(x_[i][e][n], j), power[n]), scale, pair(bias.bits[0], j));
        }
      }
    });
  }

  // Take the rows' means off. A mean has more digits than X: what is left of it goes in a second step.
  template <typename Mean>
  __device__ void shift(Mean mean, int features) {
    Two high[NT], low[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) split(mean(n), high[n], low[n]);
    for_all([&](int i, int e, int at) {
      if (at >= features) return;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          Two& x = pair(x_[i][e][n], j);
          x = __hsub2(__hsub2(x, high[n]), low[n]);
        }
      }
    });
  }

  // The sums of the warp's features: in lane (g, t), of rows n * 8 + g. By products with ones: a lane gets
  // those of rows 2t and 2t + 1.
  __device__ void sum_features(float (&sums)[NT]) const {
    const uint32_t one = reinterpret_cast<const uint32_t&>(static_cast<const Two&>(both(1)));
    float c[NT][4] = {};
    for_all([&](int i, int e, int) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const uint4& x = x_[i][e][n];
        mma<X>(c[n], one, one, one, one, x.x, x.y);
        mma<X>(c[n], one, one, one, one, x.z, x.w);
      }
    });
    const int g = lane() / 4;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float even = __shfl_sync(~0u, c[n][0], g / 2), odd = __shfl_sync(~0u, c[n][1], g / 2);
      sums[n] = g % 2 ? odd : even;
    }
  }

  // The same of squares. By products of the rows with themselves: what is wanted is on the diagonals.
  __device__ void sum_squares(float (&sums)[NT]) const {
    static_assert(NT == 2);
    float c[NT][4] = {};
    for_all([&](int i, int e, int) {
      const uint4 &low = x_[i][e][0], &high = x_[i][e][1];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const uint4& x = x_[i][e][n];
        mma<X>(c[n], low.x, high.x, low.y, high.y, x.x, x.y);
        mma<X>(c[n], low.z, high.z, low.w, high.w, x.z, x.w);
      }
    });
    const int g = lane() / 4;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int from = g * 4 + g / 2;  // the lane on the diagonal
      const float even = __shfl_sync(~0u, c[n][n * 2], from);
      const float odd = __shfl_sync(~0u, c[n][n * 2 + 1], from);
      sums[n] = g % 2 ? odd : even;
    }
  }

  // Add up what the block's warps have, in the same order in all of them.
  static __device__ void sum_warps(float (&sums)[NT], float* scratch) {
    constexpr int ROWS = NT * 8, LANES = 32 / ROWS;  // that add up a row's
    static_assert(ROWS == 16);
    const int g = lane() / 4, warp = threadIdx.x / 32;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
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

  static __device__ Two both(float x) {
    const X narrowed = narrow<X>(x);
    return {narrowed, narrowed};
  }

  // x as a sum of two, of which the second has the digits that the first has no room for.
  static __device__ void split(float x, Two& high, Two& low) {
    high = both(x), low = both(x - widen(high.x));
  }

  static __device__ Two& pair(uint4& eight, int j) { return reinterpret_cast<Two*>(&eight)[j]; }

  uint4 x_[UNITS][EIGHTS][NT];
};

}  // namespace lmi
