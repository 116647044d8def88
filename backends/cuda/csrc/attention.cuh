// Attention of one new token a row over a paged cache: self (with cache write) and cross.
//
// A block does the query heads of one kv head, G at a time, for one split of a row's tokens, so
// keys and values are read once for all of them. `width` lanes share a key, eight features each;
// every group of lanes keeps a softmax of its own, and these are merged: in the warp, in the
// block, and by the last of a row's splits.
#pragma once

#include "attention.h"

namespace lmi {

template <typename T>
constexpr int KEYS = 8 / sizeof(T);  // at once in a lane; as many more are under way
constexpr int LEAST_SHARE = 128;  // tokens of a split: with fewer it costs more than it saves
constexpr float LOG2E = 1.44269504f;

// exp2(from - to), where nothing at all (-inf) stays nothing.
__device__ inline float rescale(float from, float to) {
  return from == -INFINITY ? 0.0f : exp2f(from - to);
}

// Keys, values, and how far back they are; negative: there is none.
template <typename T>
struct Keys {
  Raw<T> k[KEYS<T>], v[KEYS<T>];
  int distances[KEYS<T>];
};

// What a group of lanes has seen: the largest score (base 2), the sum of weights, and its
// features of the weighted values.
struct Softmax {
  float top = -INFINITY, sum = 0, values[8] = {};

  template <typename T>
  __device__ void add(const float (&scores)[KEYS<T>], const Raw<T> (&v)[KEYS<T>]) {
    float highest = top;
#pragma unroll
    for (int j = 0; j < KEYS<T>; ++j) highest = fmaxf(highest, scores[j]);
    const float kept = rescale(top, highest);
    sum *= kept;
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= kept;
#pragma unroll
    for (int j = 0; j < KEYS<T>; ++j) {
      const float weight = rescale(scores[j], highest);
      sum += weight;
      float own[8];
      v[j].unpack(own);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] += weight * own[i];
    }
    top = highest;
  }

  // Take in what the lane `offset` further has.
  __device__ void merge_lane(int offset) {
    const float other = __shfl_xor_sync(~0u, top, offset), highest = fmaxf(top, other);
    const float kept = rescale(top, highest), added = rescale(other, highest);
    sum = sum * kept + __shfl_xor_sync(~0u, sum, offset) * added;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      values[i] = values[i] * kept + __shfl_xor_sync(~0u, values[i], offset) * added;
    }
    top = highest;
  }
};

__device__ inline float sum_over(float x, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// A lane's features of a new q or k head: normalized, rotated in half-split layout. There are no
// branches around loads, so that they are all under way at once.
template <typename T>
__device__ void new_head(const AttentionParams& p, const T* head, int row, Operand norm,
                         float (&x)[8]) {
  const int first = threadIdx.x % p.width * 8;
  const bool active = first < p.dim;
  load8(head + (active ? first : 0), x);
  float partner[8], cos[8], sin[8];
  int other[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int at = active ? first + i : i;
    const bool turned = at < 2 * p.pairs;
    const int pair = at < p.pairs ? at : at - p.pairs;
    other[i] = !turned ? at : at < p.pairs ? at + p.pairs : pair;
    partner[i] = p.pairs ? widen(head[other[i]]) : 0;
    cos[i] = turned ? p.cos[row * p.pairs + pair] : 1;
    sin[i] = turned ? p.sin[row * p.pairs + pair] : 0;
    if (at < p.pairs) sin[i] = -sin[i];
  }
  if (norm.data) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += active ? x[i] * x[i] : 0;
    const float factor = rsqrtf(sum_over(squares, p.width) / p.dim + p.eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // rounded, as the norm by itself would be
      x[i] = widen(narrow<T>(x[i] * factor * load(norm, active ? first + i : i)));
      partner[i] = widen(narrow<T>(partner[i] * factor * load(norm, other[i])));
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = active ? x[i] * cos[i] + partner[i] * sin[i] : 0;
}

// What the position adds to the score of a key `distance` back, in base 2.
__device__ inline float position_bias(const AttentionParams& p, int head, int distance) {
  float bias = 0;
  if (p.bias) bias += p.bias[min(distance, p.distances - 1) * p.heads + head];
  if (p.slopes) bias -= p.slopes[head] * distance;
  return bias * LOG2E;
}

// Take in some keys. Heads beyond `last_head` repeat it.
template <typename T, int G>
__device__ void fold(const AttentionParams& p, Softmax (&of)[G], const float (&q)[G][8],
                     const Keys<T>& keys, int first_head, int last_head) {
  float bias[G][KEYS<T>], scores[G][KEYS<T>] = {};
#pragma unroll
  for (int j = 0; j < KEYS<T>; ++j) {
    float k[8];
    keys.k[j].unpack(k);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      bias[g][j] = position_bias(p, min(first_head + g, last_head), max(keys.distances[j], 0));
#pragma unroll
      for (int i = 0; i < 8; ++i) scores[g][j] += q[g][i] * k[i];
    }
  }
  for (int offset = p.width / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
      for (int j = 0; j < KEYS<T>; ++j) {
        scores[g][j] += __shfl_xor_sync(~0u, scores[g][j], offset);
      }
    }
  }
#pragma unroll
  for (int g = 0; g < G; ++g) {
#pragma unroll
    for (int j = 0; j < KEYS<T>; ++j) {
      scores[g][j] = keys.distances[j] < 0 ? -INFINITY : scores[g][j] + bias[g][j];
    }
    of[g].template add<T>(scores[g], keys.v);
  }
}

// Where a token's features lie in the cache, for this lane.
__device__ inline int64_t slot_of(const AttentionParams& p, int row, int kv, int token, int first) {
  const int64_t block = p.table[row * p.table_width + (token >> p.block_shift)];
  const int64_t slot = (block << p.block_shift) + (token & ((1 << p.block_shift) - 1));
  return (slot * p.kv_heads + kv) * p.dim + first;
}

// Start reading every `step`-th key from `key` on, up to `end`.
template <typename T>
__device__ void read_keys(const AttentionParams& p, int row, int kv, int key, int step, int end,
                     int length, Keys<T>& to) {
  const int first = threadIdx.x % p.width * 8;
#pragma unroll
  for (int j = 0; j < KEYS<T>; ++j) {
    const int at = key + j * step;
    to.distances[j] = at < end ? length - 1 - at : -1;
    if (at < end && first < p.dim) {
      const int64_t slot = slot_of(p, row, kv, at, first);
      to.k[j].read(static_cast<const T*>(p.k) + slot);
      to.v[j].read(static_cast<const T*>(p.v) + slot);
    }
  }
}

// The new token, which the first lanes of a warp take, and write to the cache. All lanes of the
// warp come here, since they shuffle.
template <typename T, int G>
__device__ void fold_new(const AttentionParams& p, Softmax (&of)[G], const float (&q)[G][8],
                         int row, int kv, int length, int first_head, int last_head, bool write) {
  const int64_t from = row * p.q_stride + static_cast<int64_t>(kv) * p.dim;
  const int lane = threadIdx.x % 32, first = lane % p.width * 8;
  const bool active = first < p.dim;
  Keys<T> keys;
  float k[8];
  if (active) keys.v[0].read(static_cast<const T*>(p.new_v) + from + first);
  new_head(p, static_cast<const T*>(p.new_k) + from, row, p.k_norm, k);
  keys.k[0].pack(k);
  if (write && active && lane < p.width) {
    const int64_t slot = slot_of(p, row, kv, length - 1, first);
    keys.k[0].write(static_cast<T*>(p.k) + slot);
    keys.v[0].write(static_cast<T*>(p.v) + slot);
  }
#pragma unroll
  for (int j = 0; j < KEYS<T>; ++j) keys.distances[j] = lane < p.width && j == 0 ? 0 : -1;
  fold(p, of, q, keys, first_head, last_head);
}

// Feature d of a head from the splits' softmaxes, `step` floats apart. Past the L1 cache: what
// other blocks wrote may not come from a stale line.
__device__ inline float merged(const float* part, int d, int dim, int splits) {
  const int step = dim + 2;
  float top = -INFINITY, sum = 0, value = 0;
#pragma unroll 4
  for (int i = 0; i < splits; ++i) top = fmaxf(top, __ldcg(part + i * step + dim));
#pragma unroll 4
  for (int i = 0; i < splits; ++i) {
    const float weight = rescale(__ldcg(part + i * step + dim), top);
    sum += __ldcg(part + i * step + dim + 1) * weight;
    value += __ldcg(part + i * step + d) * weight;
  }
  return sum > 0 ? value / sum : 0;
}

template <typename T, int G, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, (G == 1 ? 16 : 8) / WARPS)
    attention_kernel(const AttentionParams p) {
  // Of each warp and head: values, then top and sum.
  __shared__ float partial[WARPS][G][MOST_HEAD_DIM + 2];
  constexpr int THREADS = WARPS * 32;
  const int split = blockIdx.x, row = blockIdx.z, group = p.heads / p.kv_heads;
  const int kv = blockIdx.y / p.chunks, chunk = blockIdx.y % p.chunks;
  const int first_head = kv * group + chunk * G, count = min(G, group - chunk * G);
  let_next_start();
  const int length = p.lengths[row], start = p.window ? max(0, length - p.window) : 0;
  // Lengths change from one replay of a graph to the next, so the splits that have work are counted
  // here: the others leave.
  const int share = max((length - start + p.splits - 1) / p.splits, LEAST_SHARE);
  const int splits = max((length - start + share - 1) / share, 1);
  if (split >= splits) return;
  const int begin = start + split * share, end = min(length, begin + share);

  const int last_head = first_head + count - 1;
  const bool newest = p.new_k && end == length && begin < end;
  const int cached = newest ? end - 1 : end;

  const int workers = THREADS / p.width, own = begin + threadIdx.x / p.width;
  Keys<T> next;
  read_keys(p, row, kv, own, workers, cached, length, next);
  wait_for_last();
  float q[G][8];
  const T* heads = static_cast<const T*>(p.q) + row * p.q_stride;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const int head = min(first_head + g, last_head);
    new_head(p, heads + static_cast<int64_t>(head) * p.dim, row, p.q_norm, q[g]);
  }
#pragma unroll
  for (int g = 0; g < G; ++g) {
#pragma unroll
    for (int i = 0; i < 8; ++i) q[g][i] *= p.scale * LOG2E;
  }
  Softmax of[G];
  // The last warp takes the new token: it has the fewest others.
  if (newest && threadIdx.x / 32 == WARPS - 1) {
    fold_new<T, G>(p, of, q, row, kv, length, first_head, last_head, chunk == 0);
  }
  for (int done = 0; begin + done < cached; done += workers * KEYS<T>) {
    const Keys<T> now = next;
    read_keys(p, row, kv, own + done + workers * KEYS<T>, workers, cached, length, next);
    fold(p, of, q, now, first_head, last_head);
  }

  const int lane = threadIdx.x % 32;
  for (int offset = p.width; offset < 32; offset *= 2) {
#pragma unroll
    for (int g = 0; g < G; ++g) of[g].merge_lane(offset);
  }
#pragma unroll
  for (int g = 0; g < G; ++g) {
    float* mine = partial[threadIdx.x / 32][g];
    if (lane < p.width && lane * 8 < p.dim) {
#pragma unroll
      for (int i = 0; i < 8; ++i) mine[lane * 8 + i] = of[g].values[i];
    }
    if (lane == 0) mine[MOST_HEAD_DIM] = of[g].top, mine[MOST_HEAD_DIM + 1] = of[g].sum;
  }
  __syncthreads();

  const int64_t head_row = static_cast<int64_t>(row) * p.heads + first_head;
  T* out = static_cast<T*>(p.out) + head_row * p.dim;
  float* work = p.work + head_row * p.splits * (p.dim + 2);
  for (int i = threadIdx.x; i < count * p.dim; i += THREADS) {
    const int g = i / p.dim, d = i % p.dim;
    float top = -INFINITY, sum = 0, value = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, partial[w][g][MOST_HEAD_DIM]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float weight = rescale(partial[w][g][MOST_HEAD_DIM], top);
      sum += partial[w][g][MOST_HEAD_DIM + 1] * weight;
      value += partial[w][g][d] * weight;
    }
    if (splits == 1) {
      out[i] = narrow<T>(sum > 0 ? value / sum : 0);
      continue;
    }
    float* part = work + (g * p.splits + split) * (p.dim + 2);
    part[d] = value;
    if (d == 0) part[p.dim] = top, part[p.dim + 1] = sum;
  }
  if (splits == 1 || !is_last_part(p.counters + row * gridDim.y + blockIdx.y, splits)) return;
  for (int i = threadIdx.x; i < count * p.dim; i += THREADS) {
    const int g = i / p.dim, d = i % p.dim;
    out[i] = narrow<T>(merged(work + g * p.splits * (p.dim + 2), d, p.dim, splits));
  }
}

template <typename T, int G, int WARPS>
void launch_blocks(const AttentionParams& p, const Device& gpu, cudaStream_t stream) {
  const dim3 grid(p.splits, p.kv_heads * p.chunks, p.rows);
  launch(&attention_kernel<T, G, WARPS>, p, grid, WARPS * 32, 0, gpu.major >= 9, stream);
}

// With many heads and rows small blocks keep the GPU as busy, and have less to merge.
template <typename T, int G>
void launch_chunks(AttentionParams p, const Device& gpu, cudaStream_t stream) {
  p.chunks = (p.heads / p.kv_heads + G - 1) / G;
  const int blocks = p.splits * p.kv_heads * p.chunks * p.rows;
  if (blocks >= 8 * gpu.processors) return launch_blocks<T, G, 2>(p, gpu, stream);
  if (blocks >= 4 * gpu.processors) return launch_blocks<T, G, 4>(p, gpu, stream);
  launch_blocks<T, G, 8>(p, gpu, stream);
}

template <typename T>
void launch_attention(AttentionParams p, const Device& gpu, cudaStream_t stream) {
  for (p.width = 1; p.width * 8 < p.dim;) p.width *= 2;
  const int group = p.heads / p.kv_heads;
  if (group == 1) return launch_chunks<T, 1>(p, gpu, stream);
  if (group == 2) return launch_chunks<T, 2>(p, gpu, stream);
  launch_chunks<T, 4>(p, gpu, stream);
}

}  // namespace lmi
