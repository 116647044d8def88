// Rows of x in registers, in front of a product of a step.
//
// Sixteen rows of x do not fit in shared memory beside rings of a useful depth. But a warp takes the
// same units of every tile of a product, so it wants no more of x than these units' features: they stay
// in its registers through all tiles, and shared memory is for rings alone.
//
// An RMSNorm's factor is one number a row, which a product's results can be multiplied by as well. So x
// is multiplied by the norm's weights alone, and nobody waits for the whole row. Not in float16, whose
// range is too short for that.
#pragma once

#include "multiply.cuh"
#include "step.h"

namespace lmi {

// `Product`: of NT times eight rows; a lane has rows n * 8 + lane / 4.
template <typename Product, int NT>
class HeldRows {
 public:
  // Takes the norm's weights, if there is one, while x is still awaited, to `shared`: HELD_FEATURES of X,
  // which nobody else uses before the block's next barrier but one.
  __device__ HeldRows(const LinearParams& p, void* shared)
      : weights_(static_cast<uint4*>(shared)), has_norm_(p.norm_weight.data) {
    static_assert(STEP_THREADS * 8 == HELD_FEATURES);
    if (has_norm_ && threadIdx.x * 8 < p.weights.inputs) {
      weights_[threadIdx.x] = static_cast<const uint4*>(p.norm_weight.data)[threadIdx.x];
    }
  }

  // Features `part` of x, which are there. A barrier of the block has been between.
  __device__ void read(const LinearParams& p, const Part& part) {
    const int inputs = p.weights.inputs, features = part.end - part.begin;
    const X* rows[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int row = min(n * 8 + lane() / 4, p.rows - 1);  // above the last: copies of it, not used
      rows[n] = static_cast<const X*>(p.x.data) + static_cast<int64_t>(row) * inputs + part.begin;
    }
    for_all([&](int i, int e, int at) {
#pragma unroll
      for (int n = 0; n < NT; ++n) x_[i][e][n] = at < features ? __ldcg(eight(rows[n] + at)) : uint4{};
    });
    if (!has_norm_) return;
    sum_squares();
    for_all([&](int i, int e, int at) {
      if (at >= features) return;
      uint4 weights = weights_[at / 8];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          Two& x = pair(x_[i][e][n], j);
          x = __hmul2(x, pair(weights, j));
        }
      }
    });
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

  // A result of row m, by the norm's factor. The first of the block's tiles' finishers find it, behind a
  // barrier of the block, and another is in front of the others.
  __device__ float2 scale(float2 sum, int m, bool first, const LinearParams& p) const {
    if (!has_norm_) return sum;
    if (first) {
      float squares = 0;
#pragma unroll 4
      for (int w = 0; w < STEP_WARPS; ++w) squares += statistics().squares[w][m];
      statistics().factors[m] = rsqrtf(__fdividef(squares, p.weights.inputs) + p.eps);
    }
    const float factor = statistics().factors[m];
    return make_float2(sum.x * factor, sum.y * factor);
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

  // Of rows: sums of squares of each warp's features, and factors.
  struct Statistics {
    float squares[STEP_WARPS][NT * 8], factors[NT * 8];
  };
  static __device__ Statistics& statistics() {
    __shared__ Statistics found;
    return found;
  }

  // By products of the rows with themselves, on tensor cores: what is wanted is on the diagonals.
  __device__ void sum_squares() const {
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
    if (lane() % 4 != g / 2) return;  // not on a diagonal
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      statistics().squares[threadIdx.x / 32][n * 8 + g] = g % 2 ? c[n][n * 2 + 1] : c[n][n * 2];
    }
  }

  static __device__ const uint4* eight(const X* at) { return reinterpret_cast<const uint4*>(at); }
  static __device__ Two& pair(uint4& of, int j) { return reinterpret_cast<Two*>(&of)[j]; }

  uint4* weights_;
  bool has_norm_;
  uint4 x_[UNITS][EIGHTS][NT];
};

}  // namespace lmi
