// Norm, product, scale, bias, activation, gate and residual in one kernel, for few rows.
//
// A block keeps its rows of x, normalized, in shared memory, and goes through tiles of sixteen
// weight rows (gated: eight of the gate, eight of what it gates). Its eight warps share the
// features of a tile, so every weight byte is read once, straight into registers, and the next
// step's bytes are under way while this one's are multiplied. Where x does not fit, features are
// also shared among `splits` blocks, the last of which finishes.
#pragma once

#include "linear.h"
#include "moments.cuh"
#include "product.cuh"

namespace lmi {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int IN_FLIGHT = 8;  // loads of 16 bytes a lane

template <typename W>
constexpr int STEP_BLOCKS = IN_FLIGHT / LOADS<W>;  // blocks of features a warp and step

template <typename X>
__host__ __device__ constexpr int row_stride(int features) {
  // A multiple of 128 bytes and 64 more: rows g and g + 1 then lie in different banks.
  return (features + BLOCK - 1) / BLOCK * BLOCK + 64 / static_cast<int>(sizeof(X));
}

__device__ inline float activate(float x, Activation kind) {
  switch (kind) {
    case Activation::gelu: return 0.5f * x * (1 + erff(x * 0.70710678f));
    case Activation::gelu_tanh:
      return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::relu: return x > 0 || x != x ? x : 0;  // a NaN stays one
    case Activation::silu: return x / (1 + expf(-x));
    default: return x;
  }
}

// The tile's weight row that a lane loads as its lower or upper one; the last one twice if need be.
__device__ inline int weight_row(const LinearParams& p, int tile, int upper) {
  const int g = threadIdx.x % 32 / 4;
  if (!p.gated) return min(tile * 16 + upper * 8 + g, p.outputs - 1);
  return upper * (p.outputs / 2) + min(tile * 8 + g, p.outputs / 2 - 1);
}

template <typename W>
__device__ void load_step(const LinearParams& p, int tile, int step, int begin, int end,
                          uint4 (&to)[IN_FLIGHT]) {
  constexpr int PER_LOAD = 16 / sizeof(W), HALF = LOADS<W> / 2;
  const int warp = threadIdx.x / 32, t = threadIdx.x % 4;
  const int first = begin + (step * WARPS + warp) * STEP_BLOCKS<W> * BLOCK + t * PER_LOAD;
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const W* row = static_cast<const W*>(p.weight) +
                   static_cast<int64_t>(weight_row(p, tile, upper)) * p.inputs;
#pragma unroll
    for (int block = 0; block < STEP_BLOCKS<W>; ++block) {
#pragma unroll
      for (int i = 0; i < HALF; ++i) {
        const int at = first + block * BLOCK + i * 4 * PER_LOAD;
        uint4& value = to[block * LOADS<W> + upper * HALF + i];
        value = make_uint4(0, 0, 0, 0);
        if (at < end) {
          asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
              : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
              : "l"(row + at));
        }
      }
    }
  }
}

// Bring the start of the block's first tile into L2, while the last kernel still runs.
template <typename W>
__device__ void prefetch(const LinearParams& p, int tile, int begin, int end) {
  constexpr int LINE = 128 / sizeof(W), MOST_LINES = 64;
  const int lines = min((end - begin + LINE - 1) / LINE, MOST_LINES);
  for (int i = threadIdx.x; i < 16 * lines; i += THREADS) {
    const int r = i / lines;
    const int row = p.gated ? r / 8 * (p.outputs / 2) + min(tile * 8 + r % 8, p.outputs / 2 - 1)
                            : min(tile * 16 + r, p.outputs - 1);
    const W* line = static_cast<const W*>(p.weight) + static_cast<int64_t>(row) * p.inputs + begin +
                    i % lines * LINE;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
  }
}

// Put features begin to end of every row of x into shared memory, normalized if there is a norm,
// zeros up to a whole block. `scratch` holds a Moments a warp.
template <typename X, typename W>
__device__ void stage(const LinearParams& p, int begin, int end, X* to, Moments* scratch) {
  // One to eight rows at a time: a warp, or several, for each.
  const int groups = p.rows > 4 ? 8 : p.rows > 2 ? 4 : p.rows;
  const int width = THREADS / groups, group = threadIdx.x / width, own = threadIdx.x % width;
  const int stride = row_stride<X>(end - begin), padded = stride - 64 / static_cast<int>(sizeof(X));
  const bool centred = p.norm_bias.data != nullptr;
  for (int first = 0; first < p.rows; first += groups) {
    const int r = first + group;
    const int64_t row = static_cast<int64_t>(r) * p.inputs;
    Normal by;
    if (p.norm_weight.data) {
      Moments found;
      if (r < p.rows) found = moments(p.x, row, own * 8, p.inputs, width * 8);
      found = warp_merge(found);
      if (width > 32) {  // only then is there but one round, so that scratch is written once
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = found;
        __syncthreads();
        found = Moments();
        for (int w = 0; w < width / 32; ++w) {
          found = merge(found, scratch[group * (width / 32) + w]);
        }
      }
      by = normal(found, centred, p.eps);
    }
    if (r >= p.rows) continue;
    for (int i = own * 8; i < padded; i += width * 8) {
      float values[8] = {};
      if (begin + i < end) {
        load8(p.x, row + begin + i, values);
        if (p.norm_weight.data) apply(by, p.norm_weight, p.norm_bias, begin + i, values);
      }
      store8(to + r * stride + place<X, W>(i), values);
    }
  }
}

// One element of the result, from the product.
__device__ inline float affine(const LinearParams& p, float product, int n) {
  if (p.scale) product *= p.scale[n];
  return p.bias.data ? product + load(p.bias, n) : product;
}

__device__ inline void put(const LinearParams& p, int m, int n, int width, float value) {
  const int64_t at = static_cast<int64_t>(m) * width + n;
  if (p.residual.data) value += load(p.residual, at);
  store(p.out, p.out_type, at, value);
}

// Results of weight rows `low` and `high` (eight further, or what low gates) for row m of x.
__device__ inline void put_both(const LinearParams& p, int tile, int g, int m, float low,
                                float high) {
  if (m >= p.rows) return;
  if (p.gated) {
    const int n = tile * 8 + g, half = p.outputs / 2;
    if (n < half) {
      put(p, m, n, half, activate(affine(p, low, n), p.activation) * affine(p, high, n + half));
    }
    return;
  }
  const int n = tile * 16 + g;
  if (n < p.outputs) put(p, m, n, p.outputs, activate(affine(p, low, n), p.activation));
  if (n + 8 < p.outputs) {
    put(p, m, n + 8, p.outputs, activate(affine(p, high, n + 8), p.activation));
  }
}

// Add up what the warps have, and with several splits what the blocks have, and write the tile.
template <int NT>
__device__ void finish_tile(const LinearParams& p, int tile, const float (&own)[NT][4],
                            float* partial) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) partial[(warp * NT * 4 + n * 4 + i) * 32 + lane] = own[n][i];
  }
  __syncthreads();
  const bool mine = threadIdx.x < NT * 64;
  const int c = warp % 2, n = warp / 2;
  float2 sum = make_float2(0, 0);
  if (mine) {
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      sum.x += partial[(w * NT * 4 + n * 4 + c) * 32 + lane];
      sum.y += partial[(w * NT * 4 + n * 4 + c + 2) * 32 + lane];
    }
  }
  if (gridDim.y > 1) {
    float2* work = reinterpret_cast<float2*>(p.work) +
                   static_cast<int64_t>(tile) * gridDim.y * NT * 64 + threadIdx.x;
    if (mine) work[blockIdx.y * NT * 64] = sum;
    if (!is_last_part(p.counters + tile, gridDim.y)) return;
    if (mine) {
      sum = make_float2(0, 0);
      for (int s = 0; s < gridDim.y; ++s) {
        const float2 part = __ldcg(work + s * NT * 64);
        sum.x += part.x, sum.y += part.y;
      }
    }
  }
  if (mine) put_both(p, tile, lane / 4, n * 8 + lane % 4 * 2 + c, sum.x, sum.y);
}

template <typename Product, int NT>
__global__ void __launch_bounds__(THREADS, Product::AT_ONCE) linear_kernel(const LinearParams p) {
  using X = typename Product::X;
  using W = typename Product::W;
  extern __shared__ __align__(16) unsigned char shared[];
  constexpr int PARTIALS = WARPS * NT * 4 * 32;
  float* partial = reinterpret_cast<float*>(shared);  // two buffers: one barrier a tile is enough
  X* x = reinterpret_cast<X*>(partial + 2 * PARTIALS);
  const int begin = blockIdx.y * p.slice, end = min(p.inputs, begin + p.slice);

  let_next_start();
  prefetch<W>(p, blockIdx.x, begin, end);
  wait_for_last();
  uint4 next[IN_FLIGHT];
  load_step<W>(p, blockIdx.x, 0, begin, end, next);
  stage<X, W>(p, begin, end, x, reinterpret_cast<Moments*>(partial));
  __syncthreads();

  constexpr int STEP = WARPS * STEP_BLOCKS<W> * BLOCK;
  const int steps = (end - begin + STEP - 1) / STEP, stride = row_stride<X>(end - begin);
  const int own = threadIdx.x / 32 * STEP_BLOCKS<W> * BLOCK;
  for (int tile = blockIdx.x, turn = 0; tile < p.tiles; tile += gridDim.x, turn ^= 1) {
    Product product;
    for (int step = 0; step < steps; ++step) {
      uint4 now[IN_FLIGHT];
#pragma unroll
      for (int i = 0; i < IN_FLIGHT; ++i) now[i] = next[i];
      const bool over = step + 1 == steps;
      const int next_tile = over ? tile + gridDim.x : tile;
      if (next_tile < p.tiles) load_step<W>(p, next_tile, over ? 0 : step + 1, begin, end, next);
#pragma unroll
      for (int block = 0; block < STEP_BLOCKS<W>; ++block) {
        const int at = step * STEP + own + block * BLOCK;
        if (begin + at < end) product.add(now + block * LOADS<W>, x + at, stride, p.rows);
      }
    }
    float sums[NT][4];
    product.finish(sums);
    finish_tile<NT>(p, tile, sums, partial + turn * PARTIALS);
  }
}

constexpr int partial_bytes(int nt) { return 2 * WARPS * nt * 4 * 32 * 4; }

// How the work is shared: as few splits as let x fit, and tiles evenly over what runs at once.
template <typename Product, int NT>
bool launch_rows(LinearParams p, const Resources& use) {
  using X = typename Product::X;
  const auto shared = [&](int splits) {
    p.slice = ((p.inputs + splits - 1) / splits + BLOCK - 1) / BLOCK * BLOCK;
    const int row = row_stride<X>(std::min(p.slice, p.inputs)) * static_cast<int>(sizeof(X));
    return 2 * WARPS * NT * 4 * 32 * static_cast<int>(sizeof(float)) + p.rows * row;
  };
  int splits = std::max(use.splits, 1);
  while (shared(splits) > use.gpu.shared_per_block - 1024) ++splits;
  const int bytes = shared(splits);
  splits = (p.inputs + p.slice - 1) / p.slice;
  if (splits > 1 && static_cast<int64_t>(p.tiles) * splits * NT * 128 > use.work_floats) return false;

  const int room = use.gpu.shared_per_processor / (bytes + 1024);
  const int at_once = std::max(1, std::min(Product::AT_ONCE, room));
  const int places = std::max(1, use.gpu.processors * at_once / splits);
  const int rounds = (p.tiles + places - 1) / places;
  const dim3 grid((p.tiles + rounds - 1) / rounds, splits);
  launch(&linear_kernel<Product, NT>, p, grid, THREADS, bytes, use.gpu.major >= 9, use.stream);
  return true;
}

}  // namespace lmi
