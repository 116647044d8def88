// What a block of the prefill attention works on.
#pragma once

#include "prefill.h"

namespace lmi {

constexpr float LOG2E = 1.44269504f;

// What a block works on.
struct Tile {
  int row, head, kv;
  int begin, count;  // the row's first packed query, and how many it has
  int first;         // of these, the tile's first
  int past;          // what the row had before its queries
  int from, end;     // the keys that the tile sees any of
  int length;        // of the row's keys
};

template <typename S>
__device__ inline Tile find_tile(const PrefillParams& p) {
  Tile tile;
  tile.row = p.tiles[2 * blockIdx.y];
  if (tile.row < 0) return tile;
  tile.first = p.tiles[2 * blockIdx.y + 1];
  tile.head = blockIdx.x;
  tile.kv = tile.head / (p.heads / p.kv_heads);
  tile.begin = p.starts[tile.row];
  tile.count = p.starts[tile.row + 1] - tile.begin;
  tile.length = p.lengths[tile.row];
  tile.past = p.causal ? tile.length - tile.count : 0;
  const int position = tile.past + tile.first;
  tile.end = p.causal ? min(tile.length, position + S::QUERIES) : tile.length;
  tile.from = p.window ? max(0, position - p.window + 1) / S::KEYS * S::KEYS : 0;
  return tile;
}

// What a query's weighted values are multiplied with, of whose sum of weights four lanes have a part
// each; 0 where it saw nothing.
__device__ inline float weight_factor(float sum) {
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  return sum > 0 ? 1 / sum : 0;
}

}  // namespace lmi
