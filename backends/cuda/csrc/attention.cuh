// Attention of one new token a row over a paged cache: self (with cache write) and cross.
//
// A block does the query heads of one kv head, G at a time, for one split of a row's tokens, so
// keys and values are read once for all of them. `width` lanes share a key, eight features each;
// every group of lanes keeps a softmax of its own, and these are merged: in the warp, in the
// block, and by the last of a row's splits.
#pragma once

#include "attention.h"

namespace lmi {

// Keys at once in a lane, for so many heads; as many more are under way.
template <typename T, int G>
constexpr int KEYS = (G == 4 ? 4 : 8) / sizeof(T);
constexpr int LEAST_SHARE = 128;  // tokens of a split: with fewer it costs more than it saves
constexpr float LOG2E = 1.44269504f;

// exp2(from - to), where nothing at all (-inf) stays nothing.
__device__ inline float rescale(float from, float to) {
  return from == -INFINITY ? 0.0f : exp2f(from - to);
}

// Keys, values, and how far back they are; negative: there is none.
template <typename T, int N>
struct Keys {
  Raw<T> k[N], v[N];
  int distances[N];
};

// What a group of lanes has seen: the largest score (base 2), the sum of weights, and its
// features of the weighted values.
struct Softmax {
  float top = -INFINITY, sum = 0, values[8] = {};

  template <typename T, int N>
  __device__ void add(const float (&scores)[N], const Raw<T> (&v)[N]) {
    float highest = top;
#pragma unroll
    for (int j = 0; j < N; ++j) highest = fmaxf(highest, scores[j]);
    const float kept = rescale(top, highest);
    sum *= kept;
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= kept;
#pragma unroll
    for (int j = 0; j < N; ++j) {
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
#pragma unroll 1
  for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// What the position adds to the score of a key `distance` back, in base 2.
__device__ inline float position_bias(const AttentionParams& p, int head, int distance) {
  float bias = 0;
  if (p.bias) bias += p.bias[min(distance, p.distances - 1) * p.heads + head];
  if (p.slopes) bias -= p.slopes[head] * distance;
  return bias * LOG2E;
}

// Take in some keys. Heads beyond `last_head` repeat it.
template <typename T, int G, int N>
__device__ void fold(const AttentionParams& p, Softmax (&of)[G], const float (&q)[G][8],
                     const Keys<T, N>& keys, int first_head, int last_head) {
  float bias[G][N], scores[G][N] = {};
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float k[8];
    keys.k[j].unpack(k);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      bias[g][j] = position_bias(p, min(first_head + g, last_head), max(keys.distances[j], 0));
#pragma unroll
      for (int i = 0; i < 8; ++i) scores[g][j] += q[g][i] * k[i];
    }
  }
#pragma unroll 1
  for (int offset = p.width / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        scores[g][j] += __shfl_xor_sync(~0u, scores[g][j], offset);
      }
    }
  }
#pragma unroll
  for (int g = 0; g < G; ++g) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      scores[g][j] = keys.distances[j] < 0 ? -INFINITY : scores[g][j] + bias[g][j];
    }
    of[g].add(scores[g], keys.v);
  }
}

// Where a token's features lie in the cache, for this lane.
__device__ inline int64_t slot_of(const AttentionParams& p, int row, int kv, int token, int first) {
  const int64_t block = p.table[row * p.table_width + (token >> p.block_shift)];
  const int64_t slot = (block << p.block_shift) + (token & ((1 << p.block_shift) - 1));
  return (slot * p.kv_heads + kv) * p.dim + first;
}

// What a team does: the heads of a chunk, for one split of a row's tokens.
struct Item {
  int row, kv, chunk, split;
  int first_head, heads;        // query heads
  int length, splits;           // the row's tokens, and the splits that have some
  int begin, end, cached;       // the split's tokens; those before `cached` are in the cache
  bool newest;                  // the last one is not

  __device__ Item(const AttentionParams& p, int group_size, int index) {
    const int chunks = p.kv_heads * p.chunks;
    row = index / chunks % p.rows, split = index / chunks / p.rows;
    kv = index % chunks / p.chunks, chunk = index % p.chunks;
    const int group = p.heads / p.kv_heads;
    first_head = kv * group + chunk * group_size;
    heads = min(group_size, group - chunk * group_size);
    length = p.lengths[row];
    // Lengths change from one replay of a graph to the next, so the splits that have work are
    // counted here.
    const int start = p.window ? max(0, length - p.window) : 0;
    const int share = max((length - start + p.splits - 1) / p.splits, LEAST_SHARE);
    splits = max((length - start + share - 1) / share, 1);
    begin = start + split * share, end = min(length, begin + share);
    newest = p.new_k && end == length && begin < end;
    cached = newest ? end - 1 : end;
  }

  __device__ bool has_work() const { return split < splits; }
};

// Start reading every `step`-th cached key from `key` on.
template <typename T, int N>
__device__ void read_keys(const AttentionParams& p, const Item& it, int key, int step,
                          Keys<T, N>& to) {
  const int first = threadIdx.x % p.width * 8;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int at = key + j * step;
    to.distances[j] = at < it.cached ? it.length - 1 - at : -1;
    if (at < it.cached && first < p.dim) {
      const int64_t slot = slot_of(p, it.row, it.kv, at, first);
      to.k[j].read(static_cast<const T*>(p.k) + slot);
      to.v[j].read(static_cast<const T*>(p.v) + slot);
    }
  }
}

// Feature d of a head from the splits' softmaxes, `step` floats apart. Past the L1 cache: what
// other blocks wrote may not come from a stale line.
__device__ inline float merged(const float* part, int d, int dim, int splits) {
  const int step = dim + 2;
  float top = -INFINITY, sum = 0, value = 0;
#pragma unroll 1
  for (int i = 0; i < splits; ++i) top = fmaxf(top, __ldcg(part + i * step + dim));
#pragma unroll 2
  for (int i = 0; i < splits; ++i) {
    const float weight = rescale(__ldcg(part + i * step + dim), top);
    sum += __ldcg(part + i * step + dim + 1) * weight;
    value += __ldcg(part + i * step + d) * weight;
  }
  return sum > 0 ? __fdividef(value, sum) : 0;
}

__host__ __device__ inline int items_of(const AttentionParams& p) {
  return p.rows * p.kv_heads * p.chunks * p.splits;
}

// Floats that a team of so many warps shares: the query heads and the new key, and of each warp and
// head values, top and sum.
__host__ __device__ inline int shared_floats(int group_size, int warps, int dim) {
  return (group_size + 1) * dim + warps * group_size * (dim + 2);
}

// Feature d of a new head, normalized by `factor` if there is a norm, and rounded as the norm by
// itself would be.
template <typename T>
__device__ float new_feature(const T* head, int d, Operand norm, float factor) {
  const float x = widen(head[d]);
  return norm.data ? widen(narrow<T>(x * factor * load(norm, d))) : x;
}

// An item's heads, normalized and rotated in half-split layout, as the team shares them: queries,
// scaled, and the new key, which goes to the cache with its value. A warp does 32 features of a head
// at a time, so that all of it is on its way at once.
template <typename T>
__device__ void share_heads(const AttentionParams& p, const Item& it, const Team& team,
                            float* shared) {
  const int lane = threadIdx.x % 32, pieces = (p.dim + 31) / 32;
  const int count = it.heads + (it.newest ? 1 : 0);
  const int64_t of_row = it.row * p.q_stride;
  const int64_t of_kv = of_row + static_cast<int64_t>(it.kv) * p.dim;
  const T* queries = static_cast<const T*>(p.q) + of_row;
  const int64_t slot = it.newest ? slot_of(p, it.row, it.kv, it.length - 1, 0) : 0;
#pragma unroll 1
  for (int piece = team.thread / 32; piece < count * pieces; piece += team.warps) {
    const int head = piece / pieces, d = piece % pieces * 32 + lane;
    const bool is_key = head == it.heads;
    const T* from = is_key ? static_cast<const T*>(p.new_k) + of_kv
                           : queries + static_cast<int64_t>(it.first_head + head) * p.dim;
    const Operand norm = is_key ? p.k_norm : p.q_norm;
    float factor = 1;
    if (norm.data) {
      float squares = 0;
      for (int i = lane; i < p.dim; i += 32) squares += widen(from[i]) * widen(from[i]);
      factor = rsqrtf(__fdividef(sum_over(squares, 32), p.dim) + p.eps);
    }
    if (d >= p.dim) continue;
    float x = new_feature(from, d, norm, factor);
    if (d < 2 * p.pairs) {
      const bool low = d < p.pairs;
      const int pair = low ? d : d - p.pairs, angle = it.row * p.pairs + pair;
      const float other = new_feature(from, low ? d + p.pairs : pair, norm, factor);
      x = x * p.cos[angle] + (low ? -other : other) * p.sin[angle];
    }
    if (is_key) x = widen(narrow<T>(x));  // as the cache has it
    if (is_key && it.chunk == 0) {
      static_cast<T*>(p.k)[slot + d] = narrow<T>(x);
      static_cast<T*>(p.v)[slot + d] = static_cast<const T*>(p.new_v)[of_kv + d];
    }
    shared[head * p.dim + d] = is_key ? x : x * p.scale * LOG2E;
  }
}

// An item, whose first keys are under way.
template <typename T, int G, int N>
__device__ void attend(const AttentionParams& p, const Item& it, const Team& team,
                       Keys<T, N>& next, float* shared) {
  const int threads = team.warps * 32, workers = threads / p.width;
  const int own = it.begin + team.thread / p.width, lane = team.thread % 32;
  const int last_head = it.first_head + it.heads - 1, record = p.dim + 2;
  const int first = lane % p.width * 8;
  const bool active = first < p.dim;
  share_heads<T>(p, it, team, shared);
  team.sync();
  float q[G][8];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const float* head = shared + min(g, it.heads - 1) * p.dim + first;
#pragma unroll
    for (int i = 0; i < 8; ++i) q[g][i] = active ? head[i] : 0;
  }
  Softmax of[G];
  // The first lanes of the last warp take the new token: that warp has the fewest others. All of its
  // lanes come along, since they shuffle.
  if (it.newest && team.thread / 32 == team.warps - 1) {
    Keys<T, 1> newest;
    newest.distances[0] = lane < p.width ? 0 : -1;
    if (active) {
      float key[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) key[i] = shared[it.heads * p.dim + first + i];
      newest.k[0].pack(key);
      newest.v[0].read(static_cast<const T*>(p.new_v) + it.row * p.q_stride +
                       static_cast<int64_t>(it.kv) * p.dim + first);
    }
    fold(p, of, q, newest, it.first_head, last_head);
  }
#pragma unroll 1
  for (int done = 0; it.begin + done < it.cached; done += workers * N) {
    const Keys<T, N> now = next;
    read_keys(p, it, own + done + workers * N, workers, next);
    fold(p, of, q, now, it.first_head, last_head);
  }

#pragma unroll 1
  for (int offset = p.width; offset < 32; offset *= 2) {
#pragma unroll
    for (int g = 0; g < G; ++g) of[g].merge_lane(offset);
  }
  constexpr int AT_ONCE = sizeof(T) == 4 ? 1 : 4;  // records; float32 has fewer registers left
  float* records = shared + (G + 1) * p.dim;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    float* mine = records + (team.thread / 32 * G + g) * record;
    if (lane < p.width && active) {
#pragma unroll
      for (int i = 0; i < 8; ++i) mine[first + i] = of[g].values[i];
    }
    if (lane == 0) mine[p.dim] = of[g].top, mine[p.dim + 1] = of[g].sum;
  }
  team.sync();

  const int64_t head_row = static_cast<int64_t>(it.row) * p.heads + it.first_head;
  T* out = static_cast<T*>(p.out) + head_row * p.dim;
  float* work = p.work + head_row * p.splits * record;
#pragma unroll 1
  for (int i = team.thread; i < it.heads * p.dim; i += threads) {
    const int g = i / p.dim, d = i % p.dim;
    const float* part = records + g * record;
    float top = -INFINITY, sum = 0, value = 0;
#pragma unroll AT_ONCE
    for (int w = 0; w < team.warps; ++w) top = fmaxf(top, part[w * G * record + p.dim]);
#pragma unroll AT_ONCE
    for (int w = 0; w < team.warps; ++w) {
      const float* of_warp = part + w * G * record;
      const float weight = rescale(of_warp[p.dim], top);
      sum += of_warp[p.dim + 1] * weight;
      value += of_warp[d] * weight;
    }
    if (it.splits == 1) {
      out[i] = narrow<T>(sum > 0 ? __fdividef(value, sum) : 0);
      continue;
    }
    float* to = work + (g * p.splits + it.split) * record;
    to[d] = value;
    if (d == 0) to[p.dim] = top, to[p.dim + 1] = sum;
  }
  if (it.splits == 1) return;
  int* counter = p.counters + (it.row * p.kv_heads + it.kv) * p.chunks + it.chunk;
  if (!is_last_part(team, counter, it.splits)) return;
#pragma unroll 1
  for (int i = team.thread; i < it.heads * p.dim; i += threads) {
    const int g = i / p.dim, d = i % p.dim;
    out[i] = narrow<T>(merged(work + g * p.splits * record, d, p.dim, it.splits));
  }
}

template <typename T, int G, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, (G == 1 ? 16 : 8) / WARPS)
    attention_kernel(const AttentionParams p) {
  extern __shared__ float of_team[];
  let_next_start();
  const Team block = {0, static_cast<int>(threadIdx.x), WARPS};
  const Item it(p, G, blockIdx.x);
  if (!it.has_work()) return;
  Keys<T, KEYS<T, G>> first;
  read_keys(p, it, it.begin + threadIdx.x / p.width, WARPS * 32 / p.width, first);
  wait_for_last();
  attend<T, G>(p, it, block, first, of_team);
}

template <typename T, int G, int WARPS>
void launch_blocks(const AttentionParams& p, const Device& gpu, cudaStream_t stream) {
  const int bytes = shared_floats(G, WARPS, p.dim) * static_cast<int>(sizeof(float));
  launch(&attention_kernel<T, G, WARPS>, p, dim3(items_of(p)), WARPS * 32, bytes, early(gpu),
         stream);
}

// With many heads and rows small blocks keep the GPU as busy, and have less to merge.
template <typename T, int G>
void launch_chunks(const AttentionParams& p, const Device& gpu, cudaStream_t stream) {
  if (items_of(p) >= 8 * gpu.processors) return launch_blocks<T, G, 2>(p, gpu, stream);
  if (items_of(p) >= 4 * gpu.processors) return launch_blocks<T, G, 4>(p, gpu, stream);
  launch_blocks<T, G, 8>(p, gpu, stream);
}

template <typename T>
void launch_attention(AttentionParams p, const Device& gpu, cudaStream_t stream) {
  const int group = arrange(p);
  if (group == 1) return launch_chunks<T, 1>(p, gpu, stream);
  if (group == 2) return launch_chunks<T, 2>(p, gpu, stream);
  launch_chunks<T, 4>(p, gpu, stream);
}

}  // namespace lmi
