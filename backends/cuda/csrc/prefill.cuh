// Attention of many queries a row, on tensor cores: a row's keys in the paged cache, or packed.
//
// A block does 64 queries of one row and head, sixteen a warp, and goes through the keys in tiles, of
// which the next is copied while one is computed. Scores never leave registers: they become weights by
// a running softmax (Dao et al., 2022), and these the next product's operands.
//
// Lane (g, t) = (lane / 4, lane % 4) holds what mma.m16n8k16 gives it of a product C: [0] and [1]
// are row g, columns 2t and 2t + 1; [2] and [3] row g + 8.
#pragma once

#include "copy.cuh"
#include "matrices.cuh"
#include "prefill_tile.cuh"
#include "product.cuh"

namespace lmi {

constexpr int PREFILL_THREADS = 128;

// What a kernel is made for. D_: the head's features, filled up with zeros.
template <int D_>
struct Shape {
  static constexpr int D = D_;
  static constexpr int QUERIES = 16 * PREFILL_THREADS / 32;
  static constexpr int KEYS = D > 64 ? 32 : 64;             // of a tile
  static constexpr int STAGE = 2 * KEYS * D;                // its keys and values, in elements
  static constexpr int ELEMENTS = QUERIES * D + 2 * STAGE;  // of shared memory
  static constexpr bool HELD = D == 128;                    // queries stay in registers
  static constexpr int AT_ONCE = D > 128 ? 2 : D > 64 ? 3 : 4;  // blocks on a processor that registers must allow
};

// Where eight features lie in a tile. A row's chunks are permuted such that eight rows' chunks of
// one column, which are read together, touch all banks.
template <int D>
__device__ inline int chunk_at(int row, int chunk) {
  return row * D + (chunk ^ (row & 7)) * 8;
}

// Start copying the tile's queries; beyond the row's end, zeros.
template <typename T, typename S>
__device__ void copy_queries(const PrefillParams& p, const Tile& tile, T* to) {
  constexpr int CHUNKS = S::D / 8;
  const int chunk = threadIdx.x % CHUNKS;
  const T* q = static_cast<const T*>(p.q) + static_cast<int64_t>(tile.head) * p.dim;
#pragma unroll
  for (int r = threadIdx.x / CHUNKS; r < S::QUERIES; r += PREFILL_THREADS / CHUNKS) {
    const bool present = tile.first + r < tile.count && chunk * 8 < p.dim;
    const int64_t token = tile.begin + tile.first + r;
    const T* from = present ? q + token * p.q_stride + chunk * 8 : q;
    copy16(shared_address(to + chunk_at<S::D>(r, chunk)), from, present);
  }
}

// Start copying the keys `first` and on, and the values behind them; beyond the end, zeros: what
// lies there may be anything.
template <typename T, typename S>
__device__ void copy_keys(const PrefillParams& p, const Tile& tile, int first, T* to) {
  constexpr int CHUNKS = S::D / 8;
  const int chunk = threadIdx.x % CHUNKS;
  const int64_t feature = static_cast<int64_t>(tile.kv) * p.dim + chunk * 8;
  const int* table = p.table ? p.table + static_cast<int64_t>(tile.row) * p.table_width : nullptr;
  constexpr int UNROLLED = S::D == 64 ? 4 : 2;
#pragma unroll UNROLLED
  for (int r = threadIdx.x / CHUNKS; r < S::KEYS; r += PREFILL_THREADS / CHUNKS) {
    const int key = first + r;
    const bool present = key < tile.end && chunk * 8 < p.dim;
    int64_t token = 0;
    if (present) {
      token = tile.begin + key;
      if (table) {
        const int64_t block = table[key >> p.block_shift];
        token = (block << p.block_shift) + (key & ((1 << p.block_shift) - 1));
      }
    }
    const int64_t at = present ? token * p.kv_stride + feature : 0;
    T* place = to + chunk_at<S::D>(r, chunk);
    copy16(shared_address(place), static_cast<const T*>(p.k) + at, present);
    copy16(shared_address(place + S::KEYS * S::D), static_cast<const T*>(p.v) + at, present);
  }
}

// What a warp has found for sixteen queries: of those at g and g + 8, the largest score (base 2),
// this lane's part of the sum of weights, and the weighted values.
template <typename S>
struct Found {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {}, values[S::D / 8][4] = {};
};

// Scores of sixteen queries and a tile of keys.
template <typename S>
using Scores = float[S::KEYS / 8][4];

// Scores of the warp's queries and the tile's keys, unscaled.
template <typename T, typename S, typename Queries>
__device__ void multiply(Scores<S>& scores, const Queries& queries, const T* keys) {
  const int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8, side = lane / 8 % 2;
  constexpr int UNROLLED = S::HELD ? S::D / 16 : 2;  // more would hold more addresses
#pragma unroll UNROLLED
  for (int step = 0; step < S::D / 16; ++step) {
    uint32_t a[4];
    queries(step, a);
#pragma unroll
    for (int n = 0; n < S::KEYS / 16; ++n) {
      uint32_t b[4];
      load_matrices(b, keys + chunk_at<S::D>(n * 16 + row, step * 2 + side));
      mma<T>(scores[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
      mma<T>(scores[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
  }
}

// Scale the scores, add what positions add, and hide what must not be seen; all in base 2.
// `position` is that of this lane's first query, `key` the tile's first; `edge`: whether any query
// does not see all of the tile.
template <typename S>
__device__ void place_scores(const PrefillParams& p, const Tile& tile,
                             Scores<S>& scores, const float* bias, float slope, int position,
                             int key, bool edge) {
  const float scale = p.scale * LOG2E;
#pragma unroll
  for (int n = 0; n < S::KEYS / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = key + n * 8 + threadIdx.x % 4 * 2 + i % 2;
      const int distance = position + i / 2 * 8 - at;
      float score = scores[n][i] * scale;
      if (p.bias) score += bias[min(max(distance + p.center, 0), p.distances - 1)];
      if (p.slopes) score -= slope * static_cast<float>(distance);
      if (edge && (at >= tile.length || (p.causal && distance < 0) ||
                   (p.window && distance >= p.window))) {
        score = -INFINITY;
      }
      scores[n][i] = score;
    }
  }
}

// Scores become weights; what was found before is scaled to the new largest score.
template <typename S>
__device__ void weigh(Scores<S>& scores, Found<S>& found) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = found.top[half];
#pragma unroll
    for (int n = 0; n < S::KEYS / 8; ++n) {
      top = fmaxf(top, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float base = top == -INFINITY ? 0 : top;  // nothing at all (-inf) weighs nothing
    const float kept = power_of_two(found.top[half] - base);
    found.top[half] = top;
    float sum = found.sum[half] * kept;
#pragma unroll
    for (int n = 0; n < S::KEYS / 8; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        scores[n][i] = power_of_two(scores[n][i] - base);
        sum += scores[n][i];
      }
    }
    found.sum[half] = sum;
#pragma unroll
    for (int n = 0; n < S::D / 8; ++n) {
      found.values[n][2 * half] *= kept;
      found.values[n][2 * half + 1] *= kept;
    }
  }
}

// Add the tile's values by their weights. A product's C has the layout of the next one's A.
template <typename T, typename S>
__device__ void add_values(const Scores<S>& weights, const T* values, Found<S>& found) {
  const int lane = threadIdx.x % 32, row = lane % 16, side = lane / 16;
#pragma unroll
  for (int step = 0; step < S::KEYS / 16; ++step) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&pair)[4] = weights[2 * step + i / 2];
      a[i] = pack<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
    }
#pragma unroll
    for (int n = 0; n < S::D / 16; ++n) {
      uint32_t b[4];
      load_transposed(b, values + chunk_at<S::D>(step * 16 + row, n * 2 + side));
      mma<T>(found.values[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
      mma<T>(found.values[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
  }
}

// Write sixteen queries' results, through the shared memory where those queries were.
template <typename T, typename S>
__device__ void write_found(const PrefillParams& p, const Tile& tile, Found<S>& found, T* rows,
                            int first) {
  constexpr int CHUNKS = S::D / 8;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  __syncwarp();  // all lanes have read their queries
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = weight_factor(found.sum[half]);
#pragma unroll
    for (int n = 0; n < CHUNKS; ++n) {
      *reinterpret_cast<uint32_t*>(rows + chunk_at<S::D>(g + 8 * half, n) + 2 * t) =
          pack<T>(found.values[n][2 * half] * factor, found.values[n][2 * half + 1] * factor);
    }
  }
  __syncwarp();
  T* out = static_cast<T*>(p.out) + static_cast<int64_t>(tile.head) * p.dim;
#pragma unroll
  for (int i = lane; i < 16 * CHUNKS; i += 32) {
    const int r = i / CHUNKS, chunk = i % CHUNKS;
    if (first + r < tile.count && chunk * 8 < p.dim) {
      const int64_t token = tile.begin + first + r;
      *reinterpret_cast<uint4*>(out + token * p.heads * p.dim + chunk * 8) =
          *reinterpret_cast<const uint4*>(rows + chunk_at<S::D>(r, chunk));
    }
  }
}

template <typename T, typename S>
__global__ void __launch_bounds__(PREFILL_THREADS, S::AT_ONCE)
    prefill_kernel(const PrefillParams p) {
  extern __shared__ uint4 shared[];
  T* const queries = reinterpret_cast<T*>(shared);
  T* const stages = queries + S::QUERIES * S::D;
  float* const bias = reinterpret_cast<float*>(queries + S::ELEMENTS);
  let_next_start();
  wait_for_last();
  const Tile tile = find_tile<S>(p);
  if (tile.row < 0) return;

  copy_queries<T, S>(p, tile, queries);
  copy_keys<T, S>(p, tile, tile.from, stages);
  close_group();
  for (int i = threadIdx.x; i < p.distances; i += PREFILL_THREADS) {
    bias[i] = p.bias[tile.head * p.distances + i] * LOG2E;
  }
  const float slope = p.slopes ? p.slopes[tile.head] * LOG2E : 0;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = tile.first + warp * 16;  // the warp's first query
  const int nearest = tile.past + first;     // and its position
  const int farthest = nearest + 15;
  T* const own = queries + warp * 16 * S::D;
  uint32_t held[S::HELD ? S::D / 16 : 1][4];
  const auto read_queries = [&](int step, uint32_t(&to)[4]) {
    load_matrices(to, own + chunk_at<S::D>(lane % 16, step * 2 + lane / 16));
  };
  const auto operands = [&](int step, uint32_t(&to)[4]) {
    if constexpr (S::HELD) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = held[step][i];
    } else {
      read_queries(step, to);
    }
  };
  Found<S> found;
  const int tiles = max((tile.end - tile.from + S::KEYS - 1) / S::KEYS, 1);
  for (int n = 0; n < tiles; ++n) {
    const int key = tile.from + n * S::KEYS;
    await<0>();
    __syncthreads();  // the tile is there, and all have left the one before
    if (n + 1 < tiles) {
      copy_keys<T, S>(p, tile, key + S::KEYS, stages + (n + 1) % 2 * S::STAGE);
      close_group();
    }
    if constexpr (S::HELD) {
      if (n == 0) {
#pragma unroll
        for (int step = 0; step < S::D / 16; ++step) read_queries(step, held[step]);
      }
    }
    if (first >= tile.count || (p.causal && key > farthest)) continue;
    const T* keys = stages + n % 2 * S::STAGE;
    Scores<S> scores = {};
    multiply<T, S>(scores, operands, keys);
    const int last = key + S::KEYS - 1;
    const bool edge = last >= tile.length || (p.causal && last > nearest) ||
                      (p.window && farthest - key >= p.window);
    place_scores<S>(p, tile, scores, bias, slope, nearest + lane / 4, key, edge);
    weigh<S>(scores, found);
    add_values<T, S>(scores, keys + S::KEYS * S::D, found);
  }
  if (first < tile.count) write_found<T, S>(p, tile, found, own, first);
}

// Call `run` with the shape for these heads; not at all if there is none for so many queries.
template <typename Run>
void with_shape(const PrefillParams& p, const Run& run) {
  if (p.queries != Shape<64>::QUERIES) return;
  if (p.dim <= 64) return run(Shape<64>());
  if (p.dim <= 128) return run(Shape<128>());
  run(Shape<256>());
}

template <typename T, typename S>
void launch_tiles(const PrefillParams& p, const Device& gpu, cudaStream_t stream) {
  const dim3 grid(p.heads, p.count);
  launch(&prefill_kernel<T, S>, p, grid, PREFILL_THREADS, prefill_shared(p), early(gpu),
         stream);
}

template <typename T>
void launch_prefill(const PrefillParams& p, const Device& gpu, cudaStream_t stream) {
  with_shape(p, [&](auto shape) { launch_tiles<T, decltype(shape)>(p, gpu, stream); });
}

}  // namespace lmi
