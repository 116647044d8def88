// Attention of one new token a row over a paged cache: self (with cache write) and cross.
//
// A block does the query heads of one kv head, G at a time, for one split of a row's tokens, so
// keys and values are read once for all of them. `width` lanes share a key, eight features each;
// every group of lanes keeps a softmax of its own, and these are merged: in the warp, in the
// block, and by the last of a row's splits.
#pragma once

#include "attention.h"

namespace lmi {

constexpr int ATTENTION_THREADS = 128, ATTENTION_WARPS = ATTENTION_THREADS / 32;
constexpr int KEYS = 4;  // at once in a lane
constexpr float LOG2E = 1.44269504f;

// exp2(from - to), where nothing at all (-inf) stays nothing.
__device__ inline float rescale(float from, float to) {
  return from == -INFINITY ? 0.0f : exp2f(from - to);
}

// What a group of lanes has seen: the largest score (base 2), the sum of weights, and its
// features of the weighted values.
struct Softmax {
  float top = -INFINITY, sum = 0, values[8] = {};

  __device__ void add(const float (&scores)[KEYS], const float (&v)[KEYS][8]) {
    float highest = top;
#pragma unroll
    for (int j = 0; j < KEYS; ++j) highest = fmaxf(highest, scores[j]);
    const float kept = rescale(top, highest);
    sum *= kept;
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= kept;
#pragma unroll
    for (int j = 0; j < KEYS; ++j) {
      const float weight = rescale(scores[j], highest);
      sum += weight;
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] += weight * v[j][i];
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

// A lane's features of a new q or k head: normalized, rotated in half-split layout.
template <typename T>
__device__ void new_head(const AttentionParams& p, const T* head, int row, Operand norm,
                         float (&x)[8]) {
  const int first = threadIdx.x % p.width * 8;
  const bool active = first < p.dim;
  if (active) load8(head + first, x);
  float factor = 1;
  if (norm.data) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += active ? x[i] * x[i] : 0;
    factor = rsqrtf(sum_over(squares, p.width) / p.dim + p.eps);
  }
  const auto normalized = [&](float value, int at) {
    return norm.data ? widen(narrow<T>(value * factor * load(norm, at))) : value;
  };
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int at = first + i;
    x[i] = active ? normalized(x[i], at) : 0;
    if (!active || !p.cos || at >= 2 * p.pairs) continue;
    const bool lower = at < p.pairs;
    const int other = lower ? at + p.pairs : at - p.pairs, pair = lower ? at : other;
    const float partner = normalized(widen(head[other]), other);
    const float cos = p.cos[row * p.pairs + pair], sin = p.sin[row * p.pairs + pair];
    x[i] = lower ? x[i] * cos - partner * sin : x[i] * cos + partner * sin;
  }
}

// What the position adds to the score of a key `distance` back, in base 2.
__device__ inline float position_bias(const AttentionParams& p, int head, int distance) {
  float bias = 0;
  if (p.bias) bias += p.bias[min(distance, p.distances - 1) * p.heads + head];
  if (p.slopes) bias -= p.slopes[head] * distance;
  return bias * LOG2E;
}

template <int G>
__device__ void fold(const AttentionParams& p, Softmax (&of)[G], const float (&q)[G][8],
                     const float (&k)[KEYS][8], const float (&v)[KEYS][8],
                     const int (&distances)[KEYS], int first_head, int count) {
#pragma unroll
  for (int g = 0; g < G; ++g) {
    if (g >= count) break;
    float scores[KEYS];
#pragma unroll
    for (int j = 0; j < KEYS; ++j) {
      float dot = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) dot += q[g][i] * k[j][i];
      dot = sum_over(dot, p.width);
      const bool seen = distances[j] >= 0;
      scores[j] = seen ? dot + position_bias(p, first_head + g, distances[j]) : -INFINITY;
    }
    of[g].add(scores, v);
  }
}

// Tokens from `begin` to `end` that lie in the cache.
template <typename T, int G>
__device__ void fold_cached(const AttentionParams& p, Softmax (&of)[G], const float (&q)[G][8],
                            int row, int kv, int begin, int end, int length, int first_head,
                            int count) {
  const int groups = 32 / p.width, lane = threadIdx.x % 32;
  const int worker = threadIdx.x / 32 * groups + lane / p.width;
  const int workers = ATTENTION_WARPS * groups, first = lane % p.width * 8;
  for (int base = begin; base < end; base += workers * KEYS) {
    float k[KEYS][8] = {}, v[KEYS][8] = {};
    int distances[KEYS];
#pragma unroll
    for (int j = 0; j < KEYS; ++j) {
      const int key = base + worker + j * workers;
      distances[j] = key < end ? length - 1 - key : -1;
      if (key < end && first < p.dim) {
        const int block = p.table[row * p.table_width + (key >> p.block_shift)];
        const int64_t slot =
            (static_cast<int64_t>(block) << p.block_shift) + (key & ((1 << p.block_shift) - 1));
        const int64_t at = (slot * p.kv_heads + kv) * p.dim + first;
        load8(static_cast<const T*>(p.k) + at, k[j]);
        load8(static_cast<const T*>(p.v) + at, v[j]);
      }
    }
    fold(p, of, q, k, v, distances, first_head, count);
  }
}

// The new token, which the first group of lanes takes, and writes to the cache. All lanes of the
// warp come here, since they shuffle.
template <typename T, int G>
__device__ void fold_new(const AttentionParams& p, Softmax (&of)[G], const float (&q)[G][8],
                         int row, int kv, int length, int first_head, int count, bool write) {
  const int64_t from = row * p.q_stride + static_cast<int64_t>(kv) * p.dim;
  const int first = threadIdx.x % p.width * 8;
  const bool own = threadIdx.x < p.width, active = own && first < p.dim;
  float k[KEYS][8] = {}, v[KEYS][8] = {};
  new_head(p, static_cast<const T*>(p.new_k) + from, row, p.k_norm, k[0]);
#pragma unroll
  for (int i = 0; i < 8; ++i) k[0][i] = widen(narrow<T>(k[0][i]));  // as the cache will hold it
  if (first < p.dim) load8(static_cast<const T*>(p.new_v) + from + first, v[0]);
  if (write && active) {
    const int token = length - 1;
    const int block = p.table[row * p.table_width + (token >> p.block_shift)];
    const int64_t slot =
        (static_cast<int64_t>(block) << p.block_shift) + (token & ((1 << p.block_shift) - 1));
    const int64_t at = (slot * p.kv_heads + kv) * p.dim + first;
    store8(static_cast<T*>(p.k) + at, k[0]);
    store8(static_cast<T*>(p.v) + at, v[0]);
  }
  int distances[KEYS];
#pragma unroll
  for (int j = 0; j < KEYS; ++j) distances[j] = own && j == 0 ? 0 : -1;
  fold(p, of, q, k, v, distances, first_head, count);
}

// Feature d of a head from `parts` softmaxes: `top` and `sum` are `step` floats apart, and so are
// the values. Volatile loads: what other blocks wrote may not come from a stale cache line.
__device__ inline float merged(const float* values, const float* top, int parts, int step,
                               float& highest, float& total) {
  highest = -INFINITY, total = 0;
  float value = 0;
  for (int i = 0; i < parts; ++i) highest = fmaxf(highest, __ldcg(top + i * step));
  for (int i = 0; i < parts; ++i) {
    const float weight = rescale(__ldcg(top + i * step), highest);
    total += __ldcg(top + i * step + 1) * weight;
    value += __ldcg(values + i * step) * weight;
  }
  return value;
}

template <typename T, int G>
__global__ void __launch_bounds__(ATTENTION_THREADS) attention_kernel(const AttentionParams p) {
  // Of each warp and head: values, then top and sum.
  __shared__ float partial[ATTENTION_WARPS][G][MOST_HEAD_DIM + 2];
  const int split = blockIdx.x, row = blockIdx.z, group = p.heads / p.kv_heads;
  const int kv = blockIdx.y / p.chunks, chunk = blockIdx.y % p.chunks;
  const int first_head = kv * group + chunk * G, count = min(G, group - chunk * G);
  let_next_start();
  wait_for_last();
  const int length = p.lengths[row], start = p.window ? max(0, length - p.window) : 0;
  const int share = (length - start + p.splits - 1) / p.splits;
  const int begin = start + split * share, end = min(length, begin + share);

  Softmax of[G];
  if (begin < end) {
    float q[G][8] = {};
    const T* heads = static_cast<const T*>(p.q) + row * p.q_stride;
#pragma unroll
    for (int g = 0; g < G; ++g) {
      if (g >= count) break;
      new_head(p, heads + static_cast<int64_t>(first_head + g) * p.dim, row, p.q_norm, q[g]);
#pragma unroll
      for (int i = 0; i < 8; ++i) q[g][i] *= p.scale * LOG2E;
    }
    const bool newest = p.new_k && end == length;
    fold_cached<T, G>(p, of, q, row, kv, begin, newest ? end - 1 : end, length, first_head, count);
    if (newest && threadIdx.x < 32) {
      fold_new<T, G>(p, of, q, row, kv, length, first_head, count, chunk == 0);
    }
  }

  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    for (int offset = p.width; offset < 32; offset *= 2) of[g].merge_lane(offset);
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
  for (int i = threadIdx.x; i < count * p.dim; i += ATTENTION_THREADS) {
    const int g = i / p.dim, d = i % p.dim;
    float top = -INFINITY, sum = 0, value = 0;
#pragma unroll
    for (int w = 0; w < ATTENTION_WARPS; ++w) top = fmaxf(top, partial[w][g][MOST_HEAD_DIM]);
#pragma unroll
    for (int w = 0; w < ATTENTION_WARPS; ++w) {
      const float weight = rescale(partial[w][g][MOST_HEAD_DIM], top);
      sum += partial[w][g][MOST_HEAD_DIM + 1] * weight;
      value += partial[w][g][d] * weight;
    }
    if (p.splits == 1) {
      out[i] = narrow<T>(sum > 0 ? value / sum : 0);
      continue;
    }
    float* part = work + (g * p.splits + split) * (p.dim + 2);
    part[d] = value;
    if (d == 0) part[p.dim] = top, part[p.dim + 1] = sum;
  }
  if (p.splits == 1 || !is_last_part(p.counters + row * gridDim.y + blockIdx.y, p.splits)) return;
  for (int i = threadIdx.x; i < count * p.dim; i += ATTENTION_THREADS) {
    const int g = i / p.dim, d = i % p.dim;
    const float* part = work + g * p.splits * (p.dim + 2);
    float top, sum;
    const float value = merged(part + d, part + p.dim, p.splits, p.dim + 2, top, sum);
    out[i] = narrow<T>(sum > 0 ? value / sum : 0);
  }
}

template <typename T, int G>
void launch_chunks(AttentionParams p, const Device& gpu, cudaStream_t stream) {
  p.chunks = (p.heads / p.kv_heads + G - 1) / G;
  const dim3 grid(p.splits, p.kv_heads * p.chunks, p.rows);
  launch(&attention_kernel<T, G>, p, grid, ATTENTION_THREADS, 0, gpu.major >= 9, stream);
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
