// New tokens' queries, keys and values made ready: normalized, rotated, and stored in the cache.
#pragma once

#include "common.cuh"

namespace lmi {

struct WriteKvParams {
  void* qkv;  // [tokens, heads + 2 kv_heads, dim]; queries are turned in place
  void* k;    // [blocks, block_size, kv_heads, dim]; null: keys are turned in place too
  void* v;
  const int* slots;  // [tokens]: where in the cache; negative: nowhere
  Operand q_norm, k_norm;
  const float* cos;  // [tokens, pairs]; null: not rotated
  const float* sin;
  float eps;
  Type type;
  int64_t tokens;
  int heads, kv_heads, dim, pairs;
};

void write_kv(const WriteKvParams& p, const Device& gpu, cudaStream_t stream);

}  // namespace lmi
