// Rows of x in registers, in front of a product of a step.
//
// Sixteen rows of x do not fit in shared memory beside rings of a useful depth. But a warp takes the
// same units of every tile of a product, so it wants no more of x than these units' features: they stay
// in its registers through all tiles, and shared memory is for rings alone.
//
// A norm's factor is one number a row, which a product's results can be multiplied by as well. So x
// is multiplied by the norm's weights alone, and nobody waits for the whole row. A LayerNorm's mean, too,
// comes behind: times the sum of the output's weights, which is known before (`norm_terms`). Not in
// float16, whose range is too short for that.
#pragma once

#include "multiply.cuh"
#include "step.h"

namespace lmi {

// Eight features of rows g and g + 8 of x, in the order in which mma wants them: four words of either
// half of the features.
struct HeldEight {
  uint4 half[2];
};

// How a warp multiplies sixteen rows of x, which are mma's rows, with sixteen weight rows, twice its
// columns: weights then are operands as they lie in memory.
template <typename X_, typename W_>
struct HeldProduct {
  using X = X_;
  using W = W_;
  static constexpr int EIGHTS = UNIT<W> / 32;  // that a lane has of a unit
  float sums[2][4] = {};                       // of weight rows 0 to 7, and of 8 to 15

  // Where they begin in the unit.
  static __device__ int eight(int i) {
    const int t = threadIdx.x % 4;
    return sizeof(W) == 2 ? i * 32 + t * 8 : i / 2 * 64 + t * 16 + i % 2 * 8;
  }

  __device__ void add8(const uint4& low, const uint4& high, const HeldEight& x) {
    const uint4 &a = x.half[0], &b = x.half[1];
    mma<X>(sums[0], a.x, a.y, a.z, a.w, low.x, low.y);
    mma<X>(sums[1], a.x, a.y, a.z, a.w, high.x, high.y);
    mma<X>(sums[0], b.x, b.y, b.z, b.w, low.z, low.w);
    mma<X>(sums[1], b.x, b.y, b.z, b.w, high.z, high.w);
  }

  __device__ void add(const Chunks& w, const HeldEight (&x)[EIGHTS]) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint4 &low = w.low[c], &high = w.high[c];
      if constexpr (sizeof(W) == 2) {
        add8(low, high, x[c]);
      } else {
        add8(widened<X, W>(low.x, low.y), widened<X, W>(high.x, high.y), x[2 * c]);
        add8(widened<X, W>(low.z, low.w), widened<X, W>(high.z, high.w), x[2 * c + 1]);
      }
    }
  }
};

// The two results that a thread finishes, of row m: sums lie by warps, halves of the tile, rows and g.
struct HeldPlace {
  static constexpr int THREADS = 128;
  int thread, g, m;
  bool mine;

  __device__ explicit HeldPlace(int thread)
      : thread(thread), g(thread % 8), m(thread / 8), mine(thread < THREADS) {}
};

// What a thread's results need besides, if their norm is a LayerNorm behind them: see `norm_terms`.
struct HeldTerms : Terms {
  float weights[2] = {};
};

template <typename Product_>
class HeldRows {
 public:
  using Product = Product_;
  using Place = HeldPlace;
  using Terms = HeldTerms;
  static constexpr int PARTIALS = STEP_WARPS * 256;

  // Takes the norm's weights, or ones, while x is still awaited, to `shared`: HELD_FEATURES of X,
  // which nobody else uses before the block's next barrier but one. In front of x is one.
  __device__ HeldRows(const LinearParams& p, const Part& part, void* shared)
      : weights_(static_cast<uint4*>(shared)) {
    static_assert(STEP_THREADS * 8 == HELD_FEATURES);
    static_assert(sizeof(Statistics::of_warps) == STEP_THREADS * 4);
    uint4 own = make_uint4(ONES, ONES, ONES, ONES);
    if (has_norm(p) && threadIdx.x * 8 < p.weights.inputs) {
      own = static_cast<const uint4*>(p.norm_weight.data)[threadIdx.x];
    }
    weights_[threadIdx.x] = own;
    if (has_norm(p)) (&statistics().of_warps[0][0][0])[threadIdx.x] = 0;
    const int row = lane() / 4, last = p.rows - 1;  // above the last: copies of it, not used
    const int64_t inputs = p.weights.inputs;
    const X* x = static_cast<const X*>(p.x.data) + part.begin + unit(0) + Product::eight(0);
    rows_[0] = x + min(row, last) * inputs, rows_[1] = x + min(row + 8, last) * inputs;
    asm("" : "+l"(rows_[0]), "+l"(rows_[1]));  // offsets are constants then, in place of new addresses
  }

  // Features `part` of x, which are there. A barrier of the block has been between.
  __device__ void read(const LinearParams& p, const Part& part) {
    const int features = part.end - part.begin;
    HeldEight asked[UNITS][EIGHTS];
#pragma unroll
    for (int i = 0; i < UNITS; ++i) ask(i, features, asked[i]);
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
      take(i, asked[i], p);
      __syncwarp();  // one unit after the other: registers are too few for their making side by side
    }
  }

  // The products of the warp's units of a tile.
  template <typename S>
  __device__ void multiply(Product& product, S& weights, const Part& part) const {
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
      if (unit(i) >= part.end - part.begin) continue;
      product.add(weights.next(), x_[i]);
      weights.refill();
    }
  }

  static __device__ void leave(const Product& product, float* partial) {
    const int t = lane() % 4;
    float2* to = reinterpret_cast<float2*>(partial + threadIdx.x / 32 * 256 + lane() / 4 * 8) + t;
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const float(&own)[4] = product.sums[upper];
      constexpr float one = ONE<X, W>;  // a power of two: exact, and a multiplication
      to[upper * 64] = make_float2(own[0] / one, own[1] / one);
      to[upper * 64 + 32] = make_float2(own[2] / one, own[3] / one);
    }
  }

  static __device__ float2 add(const Place& at, const float* partial) {
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int w = 0; w < STEP_WARPS; ++w) {
      sum.x += partial[w * 256 + at.thread], sum.y += partial[w * 256 + 128 + at.thread];
    }
    return sum;
  }

  static __device__ Terms terms(const LinearParams& p, int tile, const Place& at) {
    Terms found;
    static_cast<lmi::Terms&>(found) = read_terms<W>(p, tile, at.g, at.m);
    if (!is_centred(p)) return found;
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const int n = output(p.weights, tile, at.g, upper);
      if (!in_range(p, tile, at.g, at.m, n)) continue;
      const float2 both = p.norm_terms[n];
      found.weights[upper] = both.x, found.bias[upper] = __float_as_uint(both.y);
    }
    return found;
  }

  // Results of row m, by the norm. The first of the block's tiles' finishers find how, behind a
  // barrier of the block, and another is in front of the others.
  __device__ float2 normalize(float2 sum, int m, bool first, const LinearParams& p,
                              Terms& terms) const {
    if (!has_norm(p)) return sum;
    const Normal by = first ? find(m, p) : statistics().found[m];
    if (first && thread_again() % 8 == 0) statistics().found[m] = by;  // of the eight that have the row
    sum.x *= by.factor, sum.y *= by.factor;
    if (!is_centred(p)) return sum;
    const float shift = by.shift * by.factor;
    sum.x += __uint_as_float(terms.bias[0]) - shift * terms.weights[0];
    sum.y += __uint_as_float(terms.bias[1]) - shift * terms.weights[1];
    terms.bias[0] = terms.bias[1] = 0;
    return sum;
  }

 private:
  using X = typename Product::X;
  using W = typename Product::W;
  using Two = typename TwoOf<X>::type;
  static constexpr bool NORMS = std::is_same_v<X, __nv_bfloat16>;
  static constexpr int UNITS = HELD_FEATURES / (STEP_WARPS * UNIT<W>);
  static constexpr int EIGHTS = Product::EIGHTS;

  static __device__ bool has_norm(const LinearParams& p) { return NORMS && p.norm_weight.data; }
  static __device__ bool is_centred(const LinearParams& p) { return NORMS && p.norm_terms; }
  static __device__ int lane() { return threadIdx.x % 32; }
  // The first feature of the warp's unit number i.
  static __device__ int unit(int i) { return (i * STEP_WARPS + threadIdx.x / 32) * UNIT<W>; }

  // Of rows: the sums and the sums of squares of each warp's features, and what they come to.
  struct Statistics {
    float of_warps[2][STEP_WARPS][16];
    Normal found[16];
  };
  static __device__ Statistics& statistics() {
    __shared__ Statistics of_rows;
    return of_rows;
  }

  // Ask for a unit of x.
  __device__ __forceinline__ void ask(int i, int features, HeldEight (&to)[EIGHTS]) const {
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e) {
      const int behind = i * STEP_WARPS * UNIT<W> + Product::eight(e) - Product::eight(0);
      const bool present = unit(i) + Product::eight(e) < features;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        to[e].half[n] = present ? __ldcg(reinterpret_cast<const uint4*>(rows_[n] + behind)) : uint4{};
      }
    }
  }

  // Put it as mma wants it, by the norm's weights. By ones too: a move would be made anew for every tile.
  __device__ __forceinline__ void take(int i, const HeldEight (&from)[EIGHTS], const LinearParams& p) {
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e) {
      const uint4 &low = from[e].half[0], &high = from[e].half[1];
      x_[i][e].half[0] = make_uint4(low.x, high.x, low.y, high.y);
      x_[i][e].half[1] = make_uint4(low.z, high.z, low.w, high.w);
    }
    if (has_norm(p)) add_statistics(x_[i], p);
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e) {
      uint4 weights = weights_[(unit(i) + Product::eight(e)) / 8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        Two& x = pair(x_[i][e].half[j / 4], j % 4);
        x = __hmul2(x, pair(weights, j / 2));
      }
    }
  }

  // To those of the warp what a unit has. Of rows by themselves what is wanted is on the diagonals.
  static __device__ __forceinline__ void add_statistics(const HeldEight (&x)[EIGHTS], const LinearParams& p) {
    const int g = lane() / 4, warp = threadIdx.x / 32;
    const bool diagonal = lane() % 4 == g / 2;
    auto& of_warps = statistics().of_warps;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float squares[4] = {};
#pragma unroll
      for (int e = 0; e < EIGHTS; ++e) {
        const uint4 &a = x[e].half[0], &b = x[e].half[1];
        mma<X>(squares, a.x, a.y, a.z, a.w, n ? a.y : a.x, n ? a.w : a.z);
        mma<X>(squares, b.x, b.y, b.z, b.w, n ? b.y : b.x, n ? b.w : b.z);
      }
      if (diagonal) of_warps[1][warp][g + n * 8] += g % 2 ? squares[2 * n + 1] : squares[2 * n];
    }
    if (!is_centred(p)) return;
    float sums[4] = {};
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e) {
      const uint4 &a = x[e].half[0], &b = x[e].half[1];
      mma<X>(sums, a.x, a.y, a.z, a.w, ONES, ONES);
      mma<X>(sums, b.x, b.y, b.z, b.w, ONES, ONES);
    }
    if (diagonal) of_warps[0][warp][g] += sums[0], of_warps[0][warp][g + 8] += sums[2];
  }

  // Of row m. In one pass, whose cancellation is less than what rounding x, and x times the norm's weights,
  // to 8 bits has cost: with a mean of 16 deviations results are wrong by 3%, and x in itself by as much.
  static __device__ Normal find(int m, const LinearParams& p) {
    float sum = 0, squares = 0;
#pragma unroll 4
    for (int w = 0; w < STEP_WARPS; ++w) {
      sum += statistics().of_warps[0][w][m], squares += statistics().of_warps[1][w][m];
    }
    const float share = __fdividef(1, p.weights.inputs);
    Normal by;
    by.shift = sum * share;
    by.factor = rsqrtf(fmaxf(squares * share - by.shift * by.shift, 0) + p.eps);
    return by;
  }

  static constexpr uint32_t ONES = NORMS ? 0x3f803f80u : 0x3c003c00u;  // two of 1
  static __device__ Two& pair(uint4& of, int j) { return reinterpret_cast<Two*>(&of)[j]; }

  uint4* weights_;
  const X* rows_[2];  // g and g + 8
  HeldEight x_[UNITS][EIGHTS];
};

}  // namespace lmi
