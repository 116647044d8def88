// The prefill attention's arguments and entry points, one for each type.
#pragma once

#include "common.cuh"

namespace lmi {

constexpr int MOST_PREFILL_DIM = 256;

struct PrefillParams {
  const void* q;  // [tokens, heads, dim], tokens `q_stride` elements apart, rotated
  const void* k;  // in the cache [blocks, block_size, kv_heads, dim]; or packed as q is
  const void* v;
  int64_t q_stride, kv_stride, kv_tokens;
  const int* table;    // [rows, table_width]: the rows' blocks; null: keys are packed
  const int* starts;   // [rows + 1]: where each row's queries begin, and the end
  const int* lengths;  // [rows]: keys of each row
  const int* tiles;    // [count, 2]: what a block does: a row, and its first query; row -1: nothing
  const float* bias;   // [heads, distances], or null
  const float* slopes;  // [heads], or null
  void* out;            // [tokens, heads, dim]
  float scale;
  int count, queries;  // tiles, and how many queries each has
  int center;  // the distance (query - key) that bias begins with is -center
  int heads, kv_heads, dim, distances, window, table_width, block_shift;
  bool causal;  // a row's queries are its last keys' ones, and see none that come later
};

// Bytes of shared memory that a block takes; 0: there is none that does so many queries.
int prefill_shared(const PrefillParams& p);

void prefill_float16(const PrefillParams& p, const Device& gpu, cudaStream_t stream);
void prefill_bfloat16(const PrefillParams& p, const Device& gpu, cudaStream_t stream);

// The same for many keys on Hopper, where tiles have 128 queries; 0: there is none for these.
int prefill_long_shared(const PrefillParams& p);

void prefill_long_float16(const PrefillParams& p, const Device& gpu, cudaStream_t stream);
void prefill_long_bfloat16(const PrefillParams& p, const Device& gpu, cudaStream_t stream);

}  // namespace lmi
