// The arguments and entry points of the kernel that makes heads' queries, keys and values and attends
// with them, one for each type.
#pragma once

#include "attention.h"
#include "linear.h"

namespace lmi {

constexpr int MOST_HEADS_ROWS = 16;

struct HeadsParams {
  LinearParams product;       // of the fused weights [heads (+ 2 kv_heads), dim, inputs]
  AttentionParams attention;  // all but where queries, and new keys and values, are
  bool write;                 // there are new keys and values
  // What follows is decided where the kernel is launched.
  int cluster = 0;  // blocks of a kv head, a power of two
  int group = 0;    // a kv head's query heads
  int parts = 0;    // these, its key and its value: each has `dim` rows of the weights
  int tiles = 0;    // of sixteen such rows, shared out among the blocks in turn
  int units = 0;    // of a tile's features
  // Places in shared memory, in bytes, behind the tiles.
  int made_at = 0;     // [rows, parts, dim]: what products and biases are
  int partial_at = 0;  // [a block's tiles]: what warps have of the sums; then attention's own
  int x_at = 0;
};

// False, and nothing done, if these shapes are not covered.
bool heads_float16(const HeadsParams& p, const Device& gpu, cudaStream_t stream);
bool heads_bfloat16(const HeadsParams& p, const Device& gpu, cudaStream_t stream);

}  // namespace lmi
