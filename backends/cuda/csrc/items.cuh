// How the decode attention's work is shared: teams have items, groups of lanes have keys.
#pragma once

#include "attention.h"

namespace lmi {

constexpr int LEAST_SHARE = 128;  // tokens of a split: with fewer it costs more than it saves

// Where a token is in the cache; beyond the table anywhere, so that it need not be known before if
// there is such a token.
__device__ inline int slot_of(const AttentionParams& p, int row, int token) {
  const int last = p.table_width - 1;
  const int block = p.table[row * p.table_width + min(token >> p.block_shift, last)];
  return block << p.block_shift | (token & ((1 << p.block_shift) - 1));
}

// Tokens of each split of so many.
__device__ inline int share_of(const AttentionParams& p, int tokens) {
  return p.splits == 1 ? max(tokens, 1) : max((tokens + p.splits - 1) / p.splits, LEAST_SHARE);
}

__host__ __device__ inline int items_of(const AttentionParams& p) {
  return p.rows * p.kv_heads * p.chunks * p.splits;
}

// What a team does: up to G heads of a chunk, for one split of a row's tokens.
template <int G>
struct Item {
  int row, kv, split;
  int first_head;         // query heads
  int length, splits;     // the row's tokens, and the splits that have some
  int begin, cached;      // the split's tokens; those before `cached` are in the cache
  bool newest;            // the last one is not
  bool writes;            // it goes to the cache from here

  Item() = default;
  __device__ Item(const AttentionParams& p, unsigned index) {
    const unsigned heads = p.kv_heads * p.chunks, outer = p.by_heads(index);
    const unsigned inner = index - outer * heads;
    split = p.by_rows(outer), row = outer - split * p.rows;
    kv = p.by_chunks(inner);
    const int chunk = inner - kv * p.chunks;
    const int group = G == 1 ? p.chunks : static_cast<unsigned>(p.heads) / p.kv_heads;
    first_head = kv * group + chunk * G;
    of_chunk = min(G, group - chunk * G);
    length = p.lengths[row];
    // Lengths change from one replay of a graph to the next, so the splits that have work are
    // counted here.
    const int start = p.window ? max(0, length - p.window) : 0;
    const int share = share_of(p, length - start);
    splits = p.splits == 1 ? 1 : max((length - start + share - 1) / share, 1);
    begin = start + split * share;
    const int end = min(length, begin + share);
    newest = p.new_k && end == length && begin < end;
    cached = newest ? end - 1 : end, writes = newest && chunk == 0;
  }

  __device__ bool has_work() const { return split < splits; }
  __device__ int heads() const { return G == 1 ? 1 : of_chunk; }
  // The last one again for those that are not.
  __device__ int head(int g) const { return first_head + min(g, heads() - 1); }

 private:
  int of_chunk;
};

// The first item with work from `index` on, every `stride`-th; beyond all others one of no tokens.
template <int G>
__device__ Item<G> find_item(const AttentionParams& p, int& index, int stride) {
#pragma unroll 1
  for (;; index += stride) {
    const Item<G> it(p, index);
    if (it.has_work() || index >= items_of(p)) return it;
  }
}

// Which of a row's tokens a lane takes, and which of their features.
struct Lane {
  int worker, workers;  // of the groups of lanes that share a key
  int first;            // of eight features
  bool active;          // it has some

  __device__ Lane(const AttentionParams& p, const Team& team)
      : worker(team.thread >> log2_of(p.width)),
        workers(team.warps * 32 >> log2_of(p.width)),
        first((threadIdx.x & (p.width - 1)) * 8),
        active(first < p.dim) {}
};

}  // namespace lmi
