// Norm, product, scale, bias, activation, gate and residual in one kernel, for few rows.
//
// A block keeps its rows of x, normalized, in shared memory, and goes through tiles of sixteen
// weight rows (gated: eight of the gate, eight of what it gates). Its eight warps share the
// features of a tile, so every weight byte is read once. Where x does not fit, features are also
// shared among `splits` blocks, the last of which finishes.
#pragma once

#include "activation.cuh"
#include "moments.cuh"
#include "stream.cuh"

namespace lmi {

constexpr int PAD = 128;  // x in shared memory is filled up to a multiple of this

template <typename X>
__host__ __device__ constexpr int row_stride(int features) {
  // A multiple of 128 bytes and 64 more: rows g and g + 1 then lie in different banks.
  return (features + PAD - 1) / PAD * PAD + 64 / static_cast<int>(sizeof(X));
}

// Put features begin to end of every row of x into shared memory, normalized if there is a norm,
// zeros up to a whole unit. `scratch` holds a Moments a warp.
template <typename X, typename W, typename From>
__device__ void stage(const LinearParams& p, int begin, int end, X* to, Moments* scratch) {
  constexpr int HELD = 8;  // vectors of eight, read at once
  // One to eight rows at a time: a warp, or several, for each.
  const int groups = p.rows > 4 ? 8 : p.rows > 2 ? 4 : p.rows;
  const int width = THREADS / groups, group = threadIdx.x / width, own = threadIdx.x % width;
  const int stride = row_stride<X>(end - begin), padded = stride - 64 / static_cast<int>(sizeof(X));
  const X* weight = static_cast<const X*>(p.norm_weight.data);
  const X* bias = static_cast<const X*>(p.norm_bias.data);
  const int low = weight ? 0 : begin, high = weight ? p.inputs : end;  // what has to be read
  for (int first = 0; first < p.rows; first += groups) {
    const int r = first + group;
    const int vectors = r < p.rows ? (high - low) / 8 : 0, mine = (vectors - 1 - own + width) / width;
    const From* x = static_cast<const From*>(p.x.data) + static_cast<int64_t>(r) * p.inputs + low;
    Raw<From> held[HELD];
    const auto read = [&](int start) {
#pragma unroll
      for (int v = 0; v < HELD; ++v) {
        if (start + v < mine) held[v].read(x + (own + (start + v) * width) * 8);
      }
    };
    Normal by;
    if (weight) {
      Moments found;
      for (int start = 0; start < mine; start += HELD) {
        read(start);
        found = merge(found, moments(held, min(mine - start, HELD), bias));
      }
      found = warp_merge(found);
      if (width > 32) {  // only then is there but one round, so that scratch is written once
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = found;
        __syncthreads();
        found = Moments();
        for (int w = 0; w < width / 32; ++w) {
          found = merge(found, scratch[group * (width / 32) + w]);
        }
      }
      by = normal(found, bias, p.eps);
    }
    for (int start = 0; start < mine; start += HELD) {
      if (!weight || mine > HELD) read(start);
#pragma unroll
      for (int v = 0; v < HELD; ++v) {
        const int at = low + (own + (start + v) * width) * 8;
        if (start + v >= mine || at < begin || at >= end) continue;
        float values[8];
        held[v].unpack(values);
        if (weight) apply(by, weight + at, bias ? bias + at : nullptr, values);
        store8(to + r * stride + place<X, W>(at - begin), values);
      }
    }
    if (r >= p.rows) continue;
    for (int at = end - begin + own * 8; at < padded; at += width * 8) {
      *reinterpret_cast<uint4*>(to + r * stride + place<X, W>(at)) = make_uint4(0, 0, 0, 0);
      if (sizeof(X) == 4) {
        *reinterpret_cast<uint4*>(to + r * stride + at + 4) = make_uint4(0, 0, 0, 0);
      }
    }
  }
}

// What a thread's two results need beside the product, on its way.
struct Terms {
  uint32_t bias[2] = {}, residual[2] = {};
  float scale[2] = {1, 1};
};

// The weight rows of a thread's results: eight apart, or a gate and what it gates.
__device__ inline int output(const LinearParams& p, int tile, int g, int upper) {
  return p.gated ? tile * 8 + g + upper * (p.outputs / 2) : tile * TILE + g + upper * 8;
}

__device__ inline bool in_range(const LinearParams& p, int tile, int g, int m, int n) {
  return m < p.rows && n < p.outputs && (!p.gated || tile * 8 + g < p.outputs / 2);
}

__device__ inline Terms read_terms(const LinearParams& p, int tile, int g, int m) {
  Terms found;
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int n = output(p, tile, g, upper);
    if (!in_range(p, tile, g, m, n)) continue;
    if (p.scale) found.scale[upper] = p.scale[n];
    if (p.bias.data) found.bias[upper] = read(p.bias, n);
    if (p.residual.data) {
      found.residual[upper] = read(p.residual, static_cast<int64_t>(m) * p.outputs + n);
    }
  }
  return found;
}

// Finish a thread's two results for row m of x.
__device__ inline void put(const LinearParams& p, int tile, int g, int m, const Terms& terms,
                           const float (&product)[2]) {
  float y[2];
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    y[upper] = product[upper] * terms.scale[upper] + widen(terms.bias[upper], p.bias.type);
  }
  const int first = output(p, tile, g, 0);
  if (p.gated) {
    const int64_t at = static_cast<int64_t>(m) * (p.outputs / 2) + first;
    const float gated = activate(y[0], p.activation) * y[1];
    if (in_range(p, tile, g, m, first)) store(p.out, p.out_type, at, gated);
    return;
  }
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int n = first + upper * 8;
    const float sum =
        activate(y[upper], p.activation) + widen(terms.residual[upper], p.residual.type);
    const int64_t at = static_cast<int64_t>(m) * p.outputs + n;
    if (in_range(p, tile, g, m, n)) store(p.out, p.out_type, at, sum);
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
  const bool mine = threadIdx.x < NT * 64;
  const int c = warp % 2, n = warp / 2, m = n * 8 + lane % 4 * 2 + c;
  Terms terms;
  if (mine) terms = read_terms(p, tile, lane / 4, m);
  __syncthreads();
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
  if (mine) put(p, tile, lane / 4, m, terms, {sum.x, sum.y});
}

template <int NT>
constexpr int PARTIALS = WARPS * NT * 4 * 32;

template <typename Product, int NT>
__global__ void __launch_bounds__(THREADS, Product::AT_ONCE)
    linear_kernel(const LinearParams p) {
  using X = typename Product::X;
  using W = typename Product::W;
  // The warps' rings, two buffers of partial sums (one barrier a tile is enough then), and x.
  extern __shared__ __align__(128) unsigned char shared[];
  float* partial = reinterpret_cast<float*>(shared + WARPS * p.slots * SLOT_BYTES);
  X* x = reinterpret_cast<X*>(partial + 2 * PARTIALS<NT>);
  const int begin = blockIdx.y * p.slice, end = min(p.inputs, begin + p.slice);

  let_next_start();
  Stream<W> weights(p, shared, begin, end);
  weights.fill();  // weights are nobody's results: the last kernel may still be at work
  wait_for_last();
  Moments* scratch = reinterpret_cast<Moments*>(partial);
  if (sizeof(X) < 4 && p.x.type == Type::float32) {
    stage<X, W, float>(p, begin, end, x, scratch);
  } else {
    stage<X, W, X>(p, begin, end, x, scratch);
  }
  __syncthreads();

  const int units = weights.units(), stride = row_stride<X>(end - begin);
  for (int tile = blockIdx.x, turn = 0; tile < p.tiles; tile += gridDim.x, turn ^= 1) {
    Product product;
    for (int unit = threadIdx.x / 32; unit < units; unit += WARPS) {
      product.add(weights.next(), x + unit * UNIT<W>, stride, p.rows);
    }
    float sums[NT][4];
    product.finish(sums);
    finish_tile<NT>(p, tile, sums, partial + turn * PARTIALS<NT>);
  }
}

// How shared memory is used: as few splits as let x fit beside rings of a useful depth, two blocks
// on a processor if both find room.
template <typename X, int NT>
int share_out(LinearParams& p, const Resources& use, int& at_once) {
  constexpr int SLOT = WARPS * SLOT_BYTES, STATIC = 1024;  // what the system takes is in STATIC
  const int room = use.gpu.shared_per_processor, most = use.gpu.shared_per_block - STATIC;
  for (int splits = std::max(use.splits, 1);; ++splits) {
    p.slice = ((p.inputs + splits - 1) / splits + PAD - 1) / PAD * PAD;
    const int row = row_stride<X>(std::min(p.slice, p.inputs)) * static_cast<int>(sizeof(X));
    const int fixed = 2 * PARTIALS<NT> * static_cast<int>(sizeof(float)) + p.rows * row;
    for (at_once = 2; at_once > 0; --at_once) {
      const int slots = (std::min(room / at_once - 2 * STATIC, most) - fixed) / SLOT;
      if (slots < FEW_SLOTS) continue;
      p.slots = slots < SOME_SLOTS ? FEW_SLOTS : slots < MANY_SLOTS ? SOME_SLOTS : MANY_SLOTS;
      return fixed + p.slots * SLOT;
    }
    if (p.slice == PAD) return 0;
  }
}

template <typename Product, int NT>
bool launch_rows(LinearParams p, const Resources& use) {
  int at_once = 0;
  const int bytes = share_out<typename Product::X, NT>(p, use, at_once);
  const int splits = (p.inputs + p.slice - 1) / p.slice;
  const bool enough = static_cast<int64_t>(p.tiles) * splits * NT * 128 <= use.work_floats;
  if (!bytes || (splits > 1 && !enough)) return false;

  const int places = std::max(1, use.gpu.processors * at_once / splits);
  const int rounds = (p.tiles + places - 1) / places;
  const dim3 grid((p.tiles + rounds - 1) / rounds, splits);
  launch(&linear_kernel<Product, NT>, p, grid, THREADS, bytes, use.gpu.major >= 9, use.stream);
  return true;
}

}  // namespace lmi
