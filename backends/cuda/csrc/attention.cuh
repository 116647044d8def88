// Attention of one new token a row over a paged cache: self (with cache write) and cross.
//
// A team of warps does the query heads of one kv head, G at a time, for one split of a row's tokens,
// so keys and values are read once for all of them. `width` lanes share a key, eight features each;
// every group of lanes keeps a softmax of its own, and these are merged: in the warp, in the team,
// and by the last of a row's splits.
//
// Memory works all the time: as soon as a lane has multiplied its keys, the next ones are under way
// in their registers, and likewise values. Behind an item's last ones come the next item's first.
#pragma once

#include "items.cuh"
#include "softmax.cuh"

namespace lmi {

// Keys, and values, that a lane has under way.
template <typename T>
constexpr int KEYS = 8 / sizeof(T);
// Warps of the attention kernel that a processor holds, by their registers.
template <int G>
constexpr int RESIDENT = G == 1 ? 16 : 8;
constexpr int MOST_WARPS = 8;  // of a block
constexpr int WARP_FEATURES = 64;  // of a head, for each warp at most
constexpr float LOG2E = 1.44269504f;

// Of every `step`-th key: it and its value, under way; what its position adds to each head's score;
// and where it is in the cache, in tokens. Negative: there is none.
template <typename T, int G, int N>
struct Keys {
  Raw<T> k[N], v[N];
  float bias[G][N] = {};
  int slots[N];
};

// Find the cached ones of the item's tokens `key`, `key` + workers and so on.
template <int G, int N>
__device__ void find_slots(const AttentionParams& p, const Item<G>& it, const Lane& lane, int key,
                           int (&slots)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int at = key + j * lane.workers, slot = slot_of(p, it.row, at);
    slots[j] = lane.active && at < it.cached ? slot : -1;
  }
}

// Start reading those that there are, of keys or values.
template <typename T, int G, int N>
__device__ void read_slots(const AttentionParams& p, const void* pool, const Item<G>& it,
                           const Lane& lane, const int (&slots)[N], Raw<T> (&to)[N]) {
  const unsigned bytes = p.kv_heads * p.dim * sizeof(T);  // of a token
  uint64_t own = __cvta_generic_to_global(pool) + (it.kv * p.dim + lane.first) * sizeof(T);
  asm("" : "+l"(own));  // added up before it is known where the tokens are
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const uint64_t from = own + static_cast<uint64_t>(static_cast<unsigned>(slots[j])) * bytes;
    if (slots[j] >= 0) to[j].read(static_cast<const T*>(__cvta_global_to_generic(from)));
  }
}

// Values that are not there are zeros: of what another row has left even a weight of zero could make
// NaN.
template <typename T, int G, int N>
__device__ void read_values(const AttentionParams& p, const Item<G>& it, const Lane& lane,
                            Keys<T, G, N>& keys) {
#pragma unroll
  for (int j = 0; j < N; ++j) keys.v[j] = {};
  read_slots(p, p.v, it, lane, keys.slots, keys.v);
}

template <int G, int N>
__device__ void read_bias(const AttentionParams& p, const Item<G>& it, const Lane& lane, int key,
                          float (&bias)[G][N]) {
  if (!p.bias) return;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int distance = max(min(it.length - 1 - key - j * lane.workers, p.distances - 1), 0);
#pragma unroll
    for (int g = 0; g < G; ++g) bias[g][j] = p.bias[distance * p.heads + it.head(g)];
  }
}

template <typename T, int G, int N>
__device__ void read_first(const AttentionParams& p, const Item<G>& it, const Lane& lane,
                           Keys<T, G, N>& keys) {
  const int key = it.begin + lane.worker;
  find_slots(p, it, lane, key, keys.slots);
  read_slots(p, p.k, it, lane, keys.slots, keys.k);
  read_values(p, it, lane, keys);
  read_bias(p, it, lane, key, keys.bias);
}

// A lane's part of the scores.
template <typename T, int G, int N>
__device__ void multiply_keys(const float (&q)[G][8], const Raw<T> (&keys)[N],
                              float (&scores)[G][N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float k[8];
    keys[j].unpack(k);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      scores[g][j] = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) scores[g][j] += q[g][i] * k[i];
    }
  }
}

// All lanes' parts.
template <int G, int N>
__device__ void sum_scores(int width, float (&scores)[G][N]) {
#pragma unroll 1
  for (int offset = width / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        scores[g][j] += __shfl_xor_sync(~0u, scores[g][j], offset);
      }
    }
  }
}

__device__ inline float sum_over(float x, int width) {
#pragma unroll 1
  for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// Floats that a team of so many warps shares: the query heads and the new key, and of each warp and
// head values, top and sum.
__host__ __device__ inline int shared_floats(int group_size, int warps, int dim) {
  return (group_size + 1) * dim + warps * group_size * (dim + 2);
}

// A feature of a new head, normalized by `factor` if there is a norm, and rounded as the norm by
// itself would be.
template <typename T>
__device__ float new_feature(T feature, int d, Operand norm, float factor) {
  const float x = widen(feature);
  return norm.data ? widen(narrow<T>(x * factor * load(norm, d))) : x;
}

// An item's heads, normalized and rotated in half-split layout, as the team shares them: queries,
// scaled, and the new key, which goes to the cache with its value. A warp does 32 features of a head
// at a time, and asks for all that they need at once.
template <typename T, int G>
__device__ void share_heads(const AttentionParams& p, const Item<G>& it, const Team& team,
                            float* shared) {
  const int lane = threadIdx.x % 32, pieces = (p.dim + 31) / 32;
  const int count = it.heads() + (it.newest ? 1 : 0);
  const int64_t of_row = it.row * p.q_stride;
  const int64_t of_kv = of_row + static_cast<int64_t>(it.kv) * p.dim;
  const T* queries = static_cast<const T*>(p.q) + of_row;
#pragma unroll 1
  for (int piece = team.thread / 32; piece < count * pieces; piece += team.warps) {
    const int head = p.by_pieces(piece), d = (piece - head * pieces) * 32 + lane;
    const bool is_key = head == it.heads(), rotated = d < 2 * p.pairs;
    const T* from = is_key ? static_cast<const T*>(p.new_k) + of_kv
                           : queries + static_cast<int64_t>(it.first_head + head) * p.dim;
    const int other = d < p.pairs ? d + p.pairs : d - p.pairs;  // what it is rotated with
    T own{}, of_other{}, value{};
    float cos = 1, sin = 0;
    int64_t slot = 0;
    if (d < p.dim) own = from[d];
    if (rotated) {
      const int angle = it.row * p.pairs + min(d, other);
      of_other = from[other], cos = p.cos[angle], sin = p.sin[angle];
    }
    if (is_key && d < p.dim) {
      value = static_cast<const T*>(p.new_v)[of_kv + d];
      slot = slot_of(p, it.row, it.length - 1);
    }
    const Operand norm = is_key ? p.k_norm : p.q_norm;
    float factor = 1;
    if (norm.data) {
      float squares = 0;
#pragma unroll 2
      for (int i = lane; i < p.dim; i += 32) squares += widen(from[i]) * widen(from[i]);
      factor = rsqrtf(__fdividef(sum_over(squares, 32), p.dim) + p.eps);
    }
    if (d >= p.dim) continue;
    float x = new_feature(own, d, norm, factor);
    if (rotated) {
      const float y = new_feature(of_other, other, norm, factor);
      x = x * cos + (d < p.pairs ? -y : y) * sin;
    }
    if (is_key) x = widen(narrow<T>(x));  // as the cache has it
    if (is_key && it.writes) {
      const int64_t to = (slot * p.kv_heads + it.kv) * p.dim + d;
      static_cast<T*>(p.k)[to] = narrow<T>(x), static_cast<T*>(p.v)[to] = value;
    }
    shared[head * p.dim + d] = is_key ? x : x * p.scale * LOG2E;
  }
}

// What becomes of results: they are stored, by a plain assignment. Through a call ptxas makes other code
// of the kernels that do nothing else.
struct Stored {};

// An item, whose first keys are under way. AHEAD: returns the next one, the first with work from
// `index` on, with its first keys under way; it takes some registers more.
template <typename T, int G, bool AHEAD, int N, typename Put = Stored>
__device__ Item<G> attend(const AttentionParams& p, const Item<G>& it, int& index, int stride,
                          const Team& team, const Lane& lane, Keys<T, G, N>& keys, float* shared,
                          Put put = {}) {
  const int threads = team.warps * 32, record = p.dim + 2, of_warp = team.thread % 32;
  // The first lanes of the last warp take the new token: that warp has the fewest others. All of its
  // lanes come along, since they shuffle.
  const bool newest = it.newest && team.thread / 32 == team.warps - 1;
  Raw<T> new_value;
  float new_bias[G] = {};
  if (newest) {
#pragma unroll
    for (int g = 0; g < G && p.bias; ++g) new_bias[g] = p.bias[it.head(g)] * LOG2E;
  }
  if (newest && lane.active) {
    new_value.read(static_cast<const T*>(p.new_v) + it.row * p.q_stride +
                   static_cast<int64_t>(it.kv) * p.dim + lane.first);
  }
  share_heads<T>(p, it, team, shared);
  team.sync();
  float q[G][8], slopes[G];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const float* head = shared + min(g, it.heads() - 1) * p.dim + lane.first;
    slopes[g] = p.slopes ? p.slopes[it.head(g)] : 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) q[g][i] = lane.active ? head[i] : 0;
  }
  Softmax of[G];
  if (newest) {
    const float* key = shared + it.heads() * p.dim + (lane.active ? lane.first : 0);
    float scores[G][1] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int g = 0; g < G; ++g) scores[g][0] += q[g][i] * key[i];
    }
    sum_scores(p.width, scores);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      if (of_warp >= p.width) continue;
      of[g].top = scores[g][0] + new_bias[g], of[g].sum = 1;
      new_value.unpack(of[g].values);
    }
  }

  Item<G> next = it;
  bool last = false;
#pragma unroll 1
  for (int begin = it.begin; !last;) {
    const int key = begin + lane.worker;
    begin += lane.workers * N;
    last = begin >= it.cached;
    if (AHEAD && last) next = find_item<G>(p, index, stride), begin = next.begin;
    const int ahead = begin + lane.worker;
    find_slots(p, next, lane, ahead, keys.slots);
    float scores[G][N];
    multiply_keys(q, keys.k, scores);
    read_slots(p, p.k, next, lane, keys.slots, keys.k);
    sum_scores(p.width, scores);
    const bool positions = p.bias || p.slopes;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int at = key + j * lane.workers, distance = it.length - 1 - at;
#pragma unroll
      for (int g = 0; g < G; ++g) {
        if (positions) scores[g][j] += (keys.bias[g][j] - slopes[g] * distance) * LOG2E;
        if (at >= it.cached) scores[g][j] = -INFINITY;
      }
    }
    read_bias(p, next, lane, ahead, keys.bias);
#pragma unroll
    for (int g = 0; g < G; ++g) of[g].add(scores[g], keys.v);
    read_values(p, next, lane, keys);
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
    if (of_warp < p.width && lane.active) {
#pragma unroll
      for (int i = 0; i < 8; ++i) mine[lane.first + i] = of[g].values[i];
    }
    if (of_warp == 0) mine[p.dim] = of[g].top, mine[p.dim + 1] = of[g].sum;
  }
  team.sync();  // also before the next item's heads and records take these ones' place

  const int64_t place = it.row * p.heads + it.first_head;
  T* out = static_cast<T*>(p.out) + place * p.dim;
  float* work = p.work + place * p.splits * record;
#pragma unroll 1
  for (int i = team.thread; i < it.heads() * p.dim; i += threads) {
    const int g = G == 1 ? 0 : i / p.dim, d = i - g * p.dim;
    const Feature of_team = merge<AT_ONCE>(records + g * record, team.warps, G * record, p.dim, d,
                                           [](const float* from) { return *from; });
    if (it.splits == 1) {
      if constexpr (std::is_same_v<Put, Stored>) {
        out[i] = narrow<T>(of_team.result());
      } else {
        put(out + i, of_team.result());
      }
      continue;
    }
    float* to = work + (g * p.splits + it.split) * record;
    to[d] = of_team.value;
    if (d == 0) to[p.dim] = of_team.top, to[p.dim + 1] = of_team.sum;
  }
  if (it.splits == 1 || !is_last_part(team, p.counters + place, it.splits)) return next;
#pragma unroll 1
  for (int i = team.thread; i < it.heads() * p.dim; i += threads) {
    const int g = G == 1 ? 0 : i / p.dim, d = i - g * p.dim;
    // Past the L1 cache: what other blocks wrote may not come from a stale line.
    const Feature found = merge<2>(work + g * p.splits * record, it.splits, record, p.dim, d,
                                   [](const float* from) { return __ldcg(from); });
    if constexpr (std::is_same_v<Put, Stored>) {
      out[i] = narrow<T>(found.result());
    } else {
      put(out + i, found.result());
    }
  }
  return next;
}

// A team's items: the one at `index`, and every `stride`-th behind it. `wait(item, lane)` until what
// is not in the cache is there; `put(place, result)` each result. AHEAD: see `attend`.
template <typename T, int G, bool AHEAD, typename Wait, typename Put = Stored>
__device__ void attend_all(const AttentionParams& p, const Team& team, int index, int stride,
                           float* shared, Wait wait, Put put = {}) {
  const Lane lane(p, team);
  Keys<T, G, KEYS<T>> keys;
  Item<G> it;
#pragma unroll 1
  for (bool first = true;; first = false) {
    if (first || !AHEAD) {
      it = find_item<G>(p, index, stride);
      read_first(p, it, lane, keys);
    }
    if (first) wait(it, lane);
    if (index >= items_of(p)) return;
    index += stride;
    it = attend<T, G, AHEAD>(p, it, index, stride, team, lane, keys, shared, put);
  }
}

template <typename T, int G>
__global__ void __launch_bounds__(MOST_WARPS * 32, RESIDENT<G> / MOST_WARPS)
    attention_kernel(const AttentionParams p) {
  extern __shared__ float of_team[];
  let_next_start();
  attend_all<T, G, true>(p, Team::whole_block(), blockIdx.x, gridDim.x, of_team,
                         [](const Item<G>&, const Lane&) { wait_for_last(); });
}

// As many warps an item as leave room for all items at once, though not so few that they share the
// query by turns; and as many blocks as there is room for. Of more items, each does some.
template <typename T, int G>
void launch_blocks(const AttentionParams& p, const Device& gpu, cudaStream_t stream) {
  const int items = items_of(p), room = RESIDENT<G> * gpu.processors;
  int warps = MOST_WARPS;
  while (items * warps > room && warps / 2 * WARP_FEATURES >= p.dim) warps /= 2;
  const int bytes = shared_floats(G, warps, p.dim) * static_cast<int>(sizeof(float));
  launch(&attention_kernel<T, G>, p, dim3(std::min(items, room / warps)), warps * 32, bytes,
         early(gpu), stream);
}

template <typename T>
void launch_attention(AttentionParams p, const Device& gpu, cudaStream_t stream) {
  const int group = arrange(p);
  if (group == 1) return launch_blocks<T, 1>(p, gpu, stream);
  if (group == 2) return launch_blocks<T, 2>(p, gpu, stream);
  launch_blocks<T, 4>(p, gpu, stream);
}

}  // namespace lmi
