// What a block does of a fused product: norm, product, scale, bias, activation, gate and residual.
//
// It keeps its rows of x, normalized, in shared memory (many of a step in registers: held.cuh), and
// goes through tiles of sixteen weight rows. Its warps share the features of a tile, so every weight
// byte is read once.
// Where x does not fit, features are also shared among `splits` blocks; the last of these
// that is done with a tile adds up what they have found.
#pragma once

#include "activation.cuh"
#include "stage.cuh"
#include "stream.cuh"

namespace lmi {

// Into so many splits, of whole units.
inline void split(Weights& w, int splits) {
  w.slice = ((w.inputs + splits - 1) / splits + PAD - 1) / PAD * PAD;
  w.splits = (w.inputs + w.slice - 1) / w.slice;
}

// What a thread's two results need beside the product, on its way.
struct Terms {
  uint32_t bias[2] = {}, residual[2] = {};
  float scale[2] = {1, 1};
};

// The weight rows of a thread's results: eight apart, or a gate and what it gates.
__device__ inline int output(const Weights& w, int tile, int g, int upper) {
  return w.gated ? tile * 8 + g + upper * (w.outputs / 2) : tile * TILE + g + upper * 8;
}

__device__ inline bool in_range(const LinearParams& p, int tile, int g, int m, int n) {
  const Weights& w = p.weights;
  return m < p.rows && n < w.outputs && (!w.gated || tile * 8 + g < w.outputs / 2);
}

// W: of the weights, whose results have scales if they are quantized.
template <typename W>
__device__ Terms read_terms(const LinearParams& p, int tile, int g, int m) {
  Terms found;
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int n = output(p.weights, tile, g, upper);
    if (!in_range(p, tile, g, m, n)) continue;
    if (sizeof(W) == 1 && p.scale) found.scale[upper] = p.scale[n];
    if (p.bias.data) found.bias[upper] = read(p.bias, n);
    if (p.residual.data) {
      found.residual[upper] = read(p.residual, static_cast<int64_t>(m) * p.weights.outputs + n);
    }
  }
  return found;
}

// A term of type T, which is known when compiled, or, if that is void, of the operand's.
template <typename T>
__device__ float widen_term(uint32_t bits, Operand from) {
  if constexpr (std::is_same_v<T, void>) {
    return widen(bits, from.type);
  } else if constexpr (std::is_same_v<T, __half>) {
    return widen(__ushort_as_half(static_cast<uint16_t>(bits)));
  } else {
    return __uint_as_float(sizeof(T) == 2 ? bits << 16 : bits);
  }
}

template <typename T>
__device__ void store_result(const LinearParams& p, int64_t at, float value) {
  if constexpr (std::is_same_v<T, void>) {
    store(p.out, p.out_type, at, value);
  } else {
    static_cast<T*>(p.out)[at] = narrow<T>(value);
  }
}

// Finish a thread's two results for row m of x. T: the type of all terms and results, or void.
template <typename T>
__device__ void put(const LinearParams& p, int tile, int g, int m, const Terms& terms,
                    float2 product) {
  float y[2] = {product.x * terms.scale[0] + widen_term<T>(terms.bias[0], p.bias),
                product.y * terms.scale[1] + widen_term<T>(terms.bias[1], p.bias)};
  const int first = output(p.weights, tile, g, 0);
  if (p.weights.gated) {
    const int64_t at = static_cast<int64_t>(m) * (p.weights.outputs / 2) + first;
    const float gated = activate(y[0], p.activation) * y[1];
    if (in_range(p, tile, g, m, first)) store_result<T>(p, at, gated);
    return;
  }
  if (p.activation != Activation::none) {
#pragma unroll
    for (float& value : y) value = activate(value, p.activation);
  }
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int n = first + upper * 8;
    const float sum = y[upper] + widen_term<T>(terms.residual[upper], p.residual);
    const int64_t at = static_cast<int64_t>(m) * p.weights.outputs + n;
    if (in_range(p, tile, g, m, n)) store_result<T>(p, at, sum);
  }
}

// Not inlined, which keeps the kernels short.
template <typename T>
static __device__ __noinline__ void put_apart(const LinearParams& p, int tile, int g, int m,
                                              Terms terms, float2 product) {
  put<T>(p, tile, g, m, terms, product);
}

// What becomes of results: they are stored. HERE: without a call, for which x in registers leaves too few.
template <typename T = void, bool HERE = false>
struct Store {
  __device__ void operator()(const LinearParams& p, int tile, int g, int m, Terms terms,
                             float2 product) const {
    if constexpr (HERE) {
      put<T>(p, tile, g, m, terms, product);
    } else {
      put_apart<T>(p, tile, g, m, terms, product);
    }
  }
};

template <int NT, int WARPS>
constexpr int PARTIALS = WARPS * NT * 4 * 32;  // floats

// One of the two results that a thread finishes: row n * 8 + lane % 4 * 2 + c.
template <int NT>
struct Place {
  int g, m, c, n;
  bool mine;

  __device__ explicit Place(int thread)
      : g(thread % 32 / 4), c(thread / 32 % 2), n(thread / 64), mine(thread < NT * 64) {
    m = n * 8 + thread % 4 * 2 + c;
  }
};

// Leave what the warp has of a tile for others to add up.
template <int NT>
__device__ void leave_sums(const float (&own)[NT][4], float* partial) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) partial[(warp * NT * 4 + n * 4 + i) * 32 + lane] = own[n][i];
  }
}

// What the warps have left of a tile, added up.
template <int NT, int WARPS>
__device__ float2 add_sums(const Place<NT>& at, const float* partial) {
  const int lane = threadIdx.x % 32;
  float2 sum = make_float2(0, 0);
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    sum.x += partial[(w * NT * 4 + at.n * 4 + at.c) * 32 + lane];
    sum.y += partial[(w * NT * 4 + at.n * 4 + at.c + 2) * 32 + lane];
  }
  return sum;
}

// The thread's index, read anew: not to be kept in a register all the time.
__device__ inline int thread_again() {
  unsigned found;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(found));
  return found;
}

// What the warps have, added up, for the threads that finish it.
template <int NT, int WARPS>
__device__ float2 sum_warps(const float (&own)[NT][4], const Place<NT>& at, float* partial) {
  leave_sums<NT>(own, partial);
  __syncthreads();
  return at.mine ? add_sums<NT, WARPS>(at, partial) : make_float2(0, 0);
}

// Where a split of a tile leaves its sums.
template <int NT>
__device__ float2* work_of(const LinearParams& p, int tile, int split) {
  const int64_t at = static_cast<int64_t>(tile) * p.weights.splits + split;
  return reinterpret_cast<float2*>(p.work) + at * NT * 64;
}

// Finish those of the part's tiles whose other splits are all done. Whether they are is asked for
// all tiles at once, since each question takes a while.
template <int NT, int WARPS, typename W, typename Put>
__device__ __noinline__ void finish_splits(const LinearParams& p, Part part, int* is_last,
                                           Put put) {
  const Weights& w = p.weights;
  constexpr int TEAM = NT * 64, THREADS = WARPS * 32;
  const int thread = threadIdx.x % TEAM;
  const Place<NT> at(thread);
#pragma unroll 1
  for (int first = part.tile; first < w.tiles; first += THREADS * part.tile_step) {
    __syncthreads();
    __threadfence();
    const int asked = first + threadIdx.x * part.tile_step;
    bool last = false;
    if (asked < w.tiles) {
      int* counter = p.counters + asked;
      last = atomicAdd(counter, 1) == w.splits - 1;
      if (last) *counter = 0;
    }
    is_last[threadIdx.x] = last;
    __syncthreads();
    __threadfence();
#pragma unroll 1
    for (int i = threadIdx.x / TEAM; i < THREADS; i += THREADS / TEAM) {
      const int tile = first + i * part.tile_step;
      if (tile >= w.tiles) break;
      if (!is_last[i]) continue;
      const Terms terms = read_terms<W>(p, tile, at.g, at.m);
      float2 sum = make_float2(0, 0);
#pragma unroll 1
      for (int s = 0; s < w.splits; ++s) {
        const float2 found = __ldcg(work_of<NT>(p, tile, s) + thread);
        sum.x += found.x, sum.y += found.y;
      }
      put(p, tile, at.g, at.m, terms, sum);
    }
    __syncthreads();
  }
}

// x in shared memory, as `stage` puts it there.
template <typename X>
struct StagedRows {
  const X* x;
  int stride, rows;

  // The products of the warp's units of a tile.
  template <typename Product, int WARPS, typename S>
  __device__ void multiply(Product& product, S& weights, int features) const {
    using W = typename Product::W;
#pragma unroll 1
    for (int f = threadIdx.x / 32 * UNIT<W>; f < features; f += WARPS * UNIT<W>) {
      product.add(weights.next(), x + f, stride, rows);
    }
  }

  // It has been normalized before.
  __device__ float2 scale(float2 sum, int, bool, const LinearParams&) const { return sum; }
};

// The part's tiles, with `x` at hand and everybody behind a barrier. `partial`: twice PARTIALS, of which
// the second half may still be read.
template <typename Product, int NT, int WARPS, typename S, typename Rows, typename Put = Store<>>
__device__ void multiply(const LinearParams& p, const Part& part, S& weights, const Rows& x,
                         float* partial, Put put = {}) {
  using W = typename Product::W;
  const int features = part.end - part.begin, tiles = p.weights.tiles, splits = p.weights.splits;
  int turn = 0;
  // Warps finish tiles in turns: one that always did would be late for every barrier.
  const auto finisher = [&] { return (thread_again() + turn * NT * 64) % (WARPS * 32); };
#pragma unroll 1
  for (int tile = part.tile; tile < tiles; tile += part.tile_step, ++turn) {
    Terms terms;
    if (const Place<NT> at(finisher()); at.mine && splits == 1) {
      terms = read_terms<W>(p, tile, at.g, at.m);
    }
    Product product;
    x.template multiply<Product, WARPS>(product, weights, features);
    float sums[NT][4];
    product.finish(sums);
    const Place<NT> at(finisher());
    // Two buffers of partial sums: one barrier a tile is enough then.
    float2 sum = sum_warps<NT, WARPS>(sums, at, partial + turn % 2 * PARTIALS<NT, WARPS>);
    if (!at.mine) continue;
    sum = x.scale(sum, at.m, turn == 0, p);
    if (splits == 1) {
      put(p, tile, at.g, at.m, terms, sum);
    } else {
      work_of<NT>(p, tile, part.split)[finisher()] = sum;
    }
  }
  if (splits > 1) finish_splits<NT, WARPS, W>(p, part, reinterpret_cast<int*>(partial), put);
}

}  // namespace lmi
