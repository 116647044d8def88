// Attention of many queries to many keys on Hopper: long prompts.
//
// A block does 128 queries of one row and head. A group of four warps has keys and values copied, tile
// by tile, into a ring; two more groups multiply, 64 queries each. While the weights of one tile are
// multiplied with its values, the scores of the next become weights (Shah et al., FlashAttention-3,
// 2024).
#pragma once

#include "matrices.cuh"
#include "prefill_long_tiles.cuh"

namespace lmi {

// What a thread has found for its two queries, at g and g + 8 of its warp's sixteen: the largest
// score (base 2), its part of the sum of weights, and of the weighted values.
template <typename S>
struct LongFound {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {}, values[S::D / 2] = {};
};

// Scores of the group's queries and a tile of keys.
template <typename T, typename S>
__device__ void score(float (&scores)[S::KEYS / 2], const unsigned char* queries,
                      const unsigned char* keys) {
#pragma unroll
  for (int i = 0; i < S::KEYS / 2; ++i) scores[i] = 0;
  hold(scores);
  begin_products();
#pragma unroll
  for (int step = 0; step < S::D / 16; ++step) {
    const int panel = step / 4, within = step % 4 * 32;
    multiply_add<T, S::KEYS>(scores, matrix(queries + panel * (S::QUERIES * 128) + within),
                             matrix(keys + panel * (S::KEYS * 128) + within));
  }
  close_products();
}

// Add a tile's values by their weights.
template <typename T, typename S>
__device__ void add_long(float (&values)[S::D / 2], const uint32_t (&weights)[S::KEYS / 16][4],
                         const unsigned char* tile) {
#pragma unroll
  for (int step = 0; step < S::KEYS / 16; ++step) {
    multiply_add_rows<T, S::D>(values, weights[step], matrix(tile + step * 16 * 128, S::KEYS * 128));
  }
  close_products();
}

// Add what positions add, and hide what must not be seen; returns what scores are still to be
// multiplied with. `position` is that of this thread's first query, `key` the tile's first, `bias` the
// bias at distance 0.
template <typename S>
__device__ float place_long(const PrefillParams& p, const Tile& tile,
                            float (&scores)[S::KEYS / 2], const float* bias, float slope,
                            int position, int key) {
  const float scale = p.scale * LOG2E;
  const int lane = threadIdx.x % 32, nearest = position - lane / 4;  // the warp's first query
  const int distance = position - (key + lane % 4 * 2);              // of the first score
  const auto of = [](int i) { return i / 2 % 2 * 8 - i / 4 * 8 - i % 2; };  // further
  const bool edge = key + S::KEYS > tile.length || (p.causal && key + S::KEYS - 1 > nearest) ||
                    (p.window && nearest + 15 - key >= p.window);
  if (!edge && !p.bias && !p.slopes) return scale;
  if (p.bias) {
    const int last = p.distances - 1 - p.center;
    if (nearest - (key + S::KEYS - 1) >= last || nearest + 15 - key <= -p.center) {
      const float all = bias[nearest > key ? last : -p.center];
#pragma unroll
      for (int i = 0; i < S::KEYS / 2; ++i) scores[i] = fmaf(scores[i], scale, all);
    } else {
      const float* own = bias + distance;
#pragma unroll
      for (int i = 0; i < S::KEYS / 2; ++i) scores[i] = fmaf(scores[i], scale, own[of(i)]);
    }
  } else {
    const float own = -slope * static_cast<float>(distance);
#pragma unroll
    for (int i = 0; i < S::KEYS / 2; ++i) {
      scores[i] = fmaf(scores[i], scale, fmaf(-slope, static_cast<float>(of(i)), own));
    }
  }
  if (edge) {
    const int limit = p.window ? p.window : INT_MAX;
    const int beyond = tile.length - key - lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < S::KEYS / 2; ++i) {
      const int own = distance + of(i);
      if (i / 4 * 8 + i % 2 >= beyond || (p.causal && own < 0) || own >= limit) {
        scores[i] = -INFINITY;
      }
    }
  }
  return 1;
}

// Scores, times `factor` > 0, become weights; `kept` is how much what was found before still weighs.
template <typename S>
__device__ void weigh_long(float (&scores)[S::KEYS / 2], float factor, LongFound<S>& found,
                           float (&kept)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = -INFINITY;
#pragma unroll
    for (int n = 0; n < S::KEYS / 8; ++n) {
      top = fmaxf(top, fmaxf(scores[4 * n + 2 * half], scores[4 * n + 2 * half + 1]));
    }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    top = fmaxf(found.top[half], top * factor);
    const float base = top == -INFINITY ? 0 : top;  // nothing at all (-inf) weighs nothing
    kept[half] = power_of_two(found.top[half] - base);
    found.top[half] = top;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < S::KEYS / 8; ++n) {
#pragma unroll
      for (int i = 4 * n + 2 * half; i < 4 * n + 2 * half + 2; ++i) {
        scores[i] = power_of_two(fmaf(scores[i], factor, -base));
        sum += scores[i];
      }
    }
    found.sum[half] = fmaf(found.sum[half], kept[half], sum);
  }
}

template <typename T, typename S>
__device__ void pack_weights(const float (&scores)[S::KEYS / 2],
                             uint32_t (&weights)[S::KEYS / 16][4]) {
#pragma unroll
  for (int i = 0; i < S::KEYS / 4; ++i) {
    weights[i / 4][i % 4] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }
}

// Write the group's results, through the shared memory where its queries were.
template <typename T, typename S>
__device__ void write_long(const PrefillParams& p, const Tile& tile, LongFound<S>& found,
                           unsigned char* rows, int first) {
  constexpr int CHUNKS = S::D / 8;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = weight_factor(found.sum[half]);
#pragma unroll
    for (int n = 0; n < CHUNKS; ++n) {
      unsigned char* row = rows + n / 8 * (S::QUERIES * 128) + (g + 8 * half) * 128;
      *reinterpret_cast<uint32_t*>(row + ((n ^ g) & 7) * 16 + 4 * t) =
          pack<T>(found.values[4 * n + 2 * half] * factor,
                  found.values[4 * n + 2 * half + 1] * factor);
    }
  }
  __syncwarp();
  T* out = static_cast<T*>(p.out) + static_cast<int64_t>(tile.head) * p.dim;
#pragma unroll 4
  for (int i = lane; i < 16 * CHUNKS; i += 32) {
    const int r = i / CHUNKS, chunk = i % CHUNKS;
    if (first + r < tile.count && chunk * 8 < p.dim) {
      const int64_t token = tile.begin + first + r;
      *reinterpret_cast<uint4*>(out + token * p.heads * p.dim + chunk * 8) =
          *reinterpret_cast<const uint4*>(rows + chunk / 8 * (S::QUERIES * 128) + r * 128 +
                                          ((chunk ^ r) & 7) * 16);
    }
  }
}

// What a group of multiplying warps does.
template <typename T, typename S>
__device__ void attend_long(const PrefillParams& p, const Tile& tile, int group,
                            const LongMemory<S>& memory) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int first = tile.first + group * 64 + warp * 16;  // the warp's first query
  const int position = tile.past + first + lane / 4;
  // The last tile may hold nothing that the first group sees.
  const int end = p.causal ? min(tile.end, tile.past + tile.first + (group + 1) * 64) : tile.end;
  const int tiles = max((end - tile.from + S::KEYS - 1) / S::KEYS, 1);
  unsigned char* const queries = memory.queries + group * 64 * 128;
  const float* bias = memory.bias + S::BEYOND + p.center;
  const float slope = p.slopes ? p.slopes[tile.head] * LOG2E : 0;

  float scores[S::KEYS / 2], kept[2];
  uint32_t weights[S::KEYS / 16][4];
  LongFound<S> found;
  RingSlot slot;
  const auto release = [&](int side, int at) {
    if (lane == 0) memory.empty[side][at].arrive();
  };
  memory.held->wait(0);
  memory.full[0][0].wait(0);
  score<T, S>(scores, queries, memory.tile(0, 0));
  await_products<0>();
  hold(scores);
  release(0, 0);
  weigh_long<S>(scores, place_long<S>(p, tile, scores, bias, slope, position, tile.from), found,
                kept);
  pack_weights<T, S>(scores, weights);
#pragma unroll 1
  for (int n = 1; n < tiles; ++n) {
    const RingSlot last = slot;
    slot.next(S::DEPTH);
    memory.full[1][last.at].wait(last.phase);
    memory.full[0][slot.at].wait(slot.phase);
#pragma unroll
    for (int i = 0; i < S::KEYS / 16; ++i) hold(weights[i]);
    hold(found.values);
    score<T, S>(scores, queries, memory.tile(slot.at, 0));
    add_long<T, S>(found.values, weights, memory.tile(last.at, 1));
    await_products<1>();
    hold(scores);
    release(0, slot.at);
    const int key = tile.from + n * S::KEYS;
    weigh_long<S>(scores, place_long<S>(p, tile, scores, bias, slope, position, key), found, kept);
    await_products<0>();
    hold(found.values);
    release(1, last.at);
#pragma unroll
    for (int i = 0; i < S::D / 2; ++i) found.values[i] *= kept[i / 2 % 2];
    pack_weights<T, S>(scores, weights);
  }
  memory.full[1][slot.at].wait(slot.phase);
#pragma unroll
  for (int i = 0; i < S::KEYS / 16; ++i) hold(weights[i]);
  hold(found.values);
  begin_products();
  add_long<T, S>(found.values, weights, memory.tile(slot.at, 1));
  await_products<0>();
  hold(found.values);
  asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(GROUP) : "memory");  // none reads queries
  if (first < tile.count) write_long<T, S>(p, tile, found, queries + warp * 16 * 128, first);
}

// What the multiplying warps do first, all of them.
template <typename S>
__device__ void fill_bias(const PrefillParams& p, const Tile& tile, float* bias) {
  for (int i = threadIdx.x - GROUP; i < p.distances + 2 * S::BEYOND; i += GROUPS * GROUP) {
    const int at = min(max(i - S::BEYOND, 0), p.distances - 1);
    bias[i] = p.bias[tile.head * p.distances + at] * LOG2E;
  }
  asm volatile("bar.sync %0, %1;" ::"n"(1 + GROUPS), "n"(GROUPS * GROUP) : "memory");
}

template <typename T, typename S>
__global__ void __launch_bounds__(LONG_THREADS, 1)
    prefill_long_kernel(const __grid_constant__ LongParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char shared[];
  __shared__ Barrier held, full[2][S::DEPTH], empty[2][S::DEPTH];
  unsigned char* queries = shared + (-shared_address(shared) & (LONG_ALIGNED - 1));
  unsigned char* tiles = queries + S::HELD;
  const LongMemory<S> memory{queries, tiles, reinterpret_cast<float*>(tiles + S::DEPTH * 2 * S::TILE),
                             &held, full, empty};
  let_next_start();
  wait_for_last();
  const Tile tile = find_tile<S>(p);
  if (tile.row < 0) return;
  const int group = static_cast<int>(threadIdx.x) / GROUP - 1;  // -1: copies
  const int groups = tile.count - tile.first > 64 ? 2 : 1;      // that have queries
  if (threadIdx.x == 0) {
    prefetch(&p.keys), prefetch(&p.values);
    held.init(4);
    for (int side = 0; side < 2; ++side) {
      for (int i = 0; i < S::DEPTH; ++i) full[side][i].init(4), empty[side][i].init(4 * groups);
    }
    fence_barriers();
  }
  __syncthreads();
  if (group < 0) {
    give_registers<S::TO_COPY>();
    copy_long<T, S>(p, tile, max((tile.end - tile.from + S::KEYS - 1) / S::KEYS, 1), memory);
  } else {
    take_registers<S::TO_MULTIPLY>();
    if (p.bias) fill_bias<S>(p, tile, memory.bias);
    if (group < groups) attend_long<T, S>(p, tile, group, memory);
  }
#endif
}

// Call `run` with the shape for these heads.
template <typename Run>
void with_long_shape(const PrefillParams& p, const Run& run) {
  if (p.dim <= 64) return run(LongShape<64>());
  if (p.dim <= 128) return run(LongShape<128>());
  run(LongShape<256>());
}

template <typename T>
void launch_long(const PrefillParams& given, const Device& gpu, cudaStream_t stream) {
  constexpr Type type = std::is_same_v<T, __half> ? Type::float16 : Type::bfloat16;
  with_long_shape(given, [&](auto shape) {
    using S = decltype(shape);
    const int box = given.table ? std::min(1 << given.block_shift, S::KEYS) : S::KEYS;
    const auto map = [&](const void* data) {
      const int64_t tokens = given.kv_tokens;
      return tensor_map(data, type, {given.dim, given.kv_heads, tokens},
                        {given.dim, given.kv_stride}, {64, 1, box});
    };
    const LongParams p{given, map(given.k), map(given.v), box};
    launch(&prefill_long_kernel<T, S>, p, dim3(p.heads, p.count), LONG_THREADS,
           S::shared(p.distances), early(gpu), stream);
  });
}

}  // namespace lmi
