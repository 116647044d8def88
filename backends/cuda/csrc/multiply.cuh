// What a block does of a fused product: norm, product, scale, bias, activation, gate and residual.
//
// It keeps its rows of x, normalized, in shared memory (more than eight of a step in registers: held.cuh), and
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
  static constexpr int THREADS = NT * 64;  // that finish a tile
  int thread, g, m, c, n;
  bool mine;

  __device__ explicit Place(int thread)
      : thread(thread), g(thread % 32 / 4), c(thread / 32 % 2), n(thread / 64), mine(thread < THREADS) {
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

// Where a split of a tile leaves its sums.
template <typename Place>
__device__ float2* work_of(const LinearParams& p, int tile, int split) {
  const int64_t at = static_cast<int64_t>(tile) * p.weights.splits + split;
  return reinterpret_cast<float2*>(p.work) + at * Place::THREADS;
}

// One more of a tile's splits is done: how many were before. What they have left is there then.
__device__ inline int count_split(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

// What a tile's splits have left for a thread, on its way: of up to AT_ONCE splits. Those of more are read
// when it is taken.
template <typename Place>
struct SplitSums {
  static constexpr int AT_ONCE = 4;
  float2 found[AT_ONCE] = {};

  __device__ void read(const LinearParams& p, int tile, int thread, int first = 0) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int split = first + i;
      found[i] = make_float2(0, 0);
      if (split < p.weights.splits) found[i] = __ldcg(work_of<Place>(p, tile, split) + thread);
    }
  }

  __device__ float2 take(const LinearParams& p, int tile, int thread) {
    float2 sum = make_float2(0, 0);
#pragma unroll 1
    for (int first = AT_ONCE;; first += AT_ONCE) {
#pragma unroll
      for (const float2& some : found) sum.x += some.x, sum.y += some.y;
      if (first >= p.weights.splits) return sum;
      read(p, tile, thread, first);
    }
  }
};

// Finish those of the part's tiles whose other splits are all done. Whether they are is asked for
// all tiles at once, since each question takes a while; and what finishing waits for is asked for two
// tiles at a time.
template <typename Place, int WARPS, typename W, typename Put>
__device__ __noinline__ void finish_splits(const LinearParams& p, Part part, int* is_last,
                                           Put put) {
  const Weights& w = p.weights;
  constexpr int TEAM = Place::THREADS, THREADS = WARPS * 32, TEAMS = THREADS / TEAM;
  const int thread = threadIdx.x % TEAM;
  const Place at(thread);
#pragma unroll 1
  for (int first = part.tile; first < w.tiles; first += THREADS * part.tile_step) {
    __syncthreads();
    const int asked = first + threadIdx.x * part.tile_step;
    bool last = false;
    if (asked < w.tiles) {
      int* counter = p.counters + asked;
      last = count_split(counter) == w.splits - 1;
      if (last) *counter = 0;
    }
    is_last[threadIdx.x] = last;
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x / TEAM; i < THREADS; i += 2 * TEAMS) {
      if (first + i * part.tile_step >= w.tiles) break;
      Terms terms[2];
      SplitSums<Place> sums[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int index = i + k * TEAMS, tile = first + index * part.tile_step;
        if (index >= THREADS || !is_last[index]) continue;
        terms[k] = read_terms<W>(p, tile, at.g, at.m);
        sums[k].read(p, tile, thread);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int index = i + k * TEAMS, tile = first + index * part.tile_step;
        if (index >= THREADS || !is_last[index]) continue;
        put(p, tile, at.g, at.m, terms[k], sums[k].take(p, tile, thread));
      }
    }
    __syncthreads();
  }
}

// How `multiply` comes by x, and what becomes of a tile's sums, if x is in shared memory, as `stage` puts it
// there. HeldRows (held.cuh) has the same members for x in registers.
template <typename Product_, int NT, int WARPS>
struct StagedRows {
  using Product = Product_;
  using Place = lmi::Place<NT>;
  using Terms = lmi::Terms;
  static constexpr int PARTIALS = lmi::PARTIALS<NT, WARPS>;

  const typename Product::X* x;
  int stride, rows;

  // The products of the warp's units of a tile.
  template <typename S>
  __device__ void multiply(Product& product, S& weights, const Part& part) const {
    using W = typename Product::W;
    const int features = part.end - part.begin;
#pragma unroll 1
    for (int f = threadIdx.x / 32 * UNIT<W>; f < features; f += WARPS * UNIT<W>) {
      const Chunks chunks = weights.next();
      weights.refill();
      product.add(chunks, x + f, stride, rows);
    }
  }

  static __device__ void leave(const Product& product, float* partial) {
    float sums[NT][4];
    product.finish(sums);
    leave_sums<NT>(sums, partial);
  }

  static __device__ float2 add(const Place& at, const float* partial) {
    return add_sums<NT, WARPS>(at, partial);
  }

  static __device__ Terms terms(const LinearParams& p, int tile, const Place& at) {
    return read_terms<typename Product::W>(p, tile, at.g, at.m);
  }

  // It has been normalized before.
  __device__ float2 normalize(float2 sum, int, bool, const LinearParams&, Terms&) const {
    return sum;
  }
};

// The part's tiles, with `x` at hand and everybody behind a barrier. `partial`: twice PARTIALS, of which
// the second half may still be read.
template <int WARPS, typename S, typename Rows, typename Put = Store<>>
__device__ void multiply(const LinearParams& p, const Part& part, S& weights, Rows& x,
                         float* partial, Put put = {}) {
  using Place = typename Rows::Place;
  const int tiles = p.weights.tiles, splits = p.weights.splits;
  int turn = 0;
  // Warps finish tiles in turns: one that always did would be late for every barrier.
  const auto finisher = [&] { return (thread_again() + turn * Place::THREADS) % (WARPS * 32u); };
#pragma unroll 1
  for (int tile = part.tile; tile < tiles; tile += part.tile_step, ++turn) {
    typename Rows::Terms terms;
    if (const Place at(finisher()); at.mine && splits == 1) terms = x.terms(p, tile, at);
    typename Rows::Product product;
    x.multiply(product, weights, part);
    // Two buffers of partial sums: one barrier a tile is enough then.
    float* sums = partial + turn % 2 * Rows::PARTIALS;
    x.leave(product, sums);
    __syncthreads();
    const Place at(finisher());
    if (!at.mine) continue;
    const float2 sum = x.normalize(x.add(at, sums), at.m, turn == 0, p, terms);
    if (splits == 1) {
      put(p, tile, at.g, at.m, terms, sum);
    } else {
      work_of<Place>(p, tile, part.split)[at.thread] = sum;
    }
  }
  if (splits > 1) {
    finish_splits<Place, WARPS, typename Rows::Product::W>(p, part, reinterpret_cast<int*>(partial), put);
  }
}

}  // namespace lmi
