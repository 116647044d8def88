// The decode attention's arguments and entry points, one for each type.
#pragma once

#include "common.cuh"

namespace lmi {

constexpr int MOST_HEAD_DIM = 256;

// Warps that at least do a head in a step: fewer take a query by more turns.
__host__ __device__ constexpr int least_team(int dim) { return dim > 64 ? 2 : 1; }

// Division by what the host knows: of n by d, where n * d is below 2^32 ("Division by invariant integers
// using multiplication", Granlund and Montgomery, 1994).
struct Divisor {
  unsigned factor = 0;  // 0: by one

  Divisor() = default;
  explicit Divisor(unsigned by) : factor(by > 1 ? 0xffffffffu / by + 1 : 0) {}

  __device__ unsigned operator()(unsigned n) const { return factor ? __umulhi(n, factor) : n; }
};

struct AttentionParams {
  const void* q;      // [rows, heads, dim], rows `q_stride` elements apart; unrotated
  const void* new_k;  // [rows, kv_heads, dim], likewise; null: everything is in the cache
  const void* new_v;
  int64_t q_stride;
  void* k;  // [blocks, block_size, kv_heads, dim]
  void* v;
  const int* table;    // [rows, table_width]: the rows' blocks
  const int* lengths;  // [rows]: tokens to attend to, the new one included
  Operand q_norm, k_norm;
  const float* cos;  // [rows, pairs]; null: not rotated
  const float* sin;
  const float* bias;    // [distances, heads], the last one for all beyond; or null
  const float* slopes;  // [heads], or null
  void* out;            // [rows, heads, dim]
  float* work;          // [rows, heads, splits, dim + 2], if splits > 1
  int* counters;        // [rows * heads], zero
  float eps, scale;
  int rows, heads, kv_heads, dim, pairs, distances, window, table_width, block_shift;
  int splits;  // blocks that may share a row's tokens
  int chunks;  // of a kv head's query heads; a block does one
  int width;   // lanes a key: dim / 8, rounded up to a power of two
  // Rows; chunks of all kv heads, and of one; and 32 features of a head.
  Divisor by_rows, by_heads, by_chunks, by_pieces;
};

// Choose `chunks` and `width`, and how to divide; returns how many query heads a chunk has at most: 1, 2 or 4.
inline int arrange(AttentionParams& p, int most = 4) {
  for (p.width = 1; p.width * 8 < p.dim;) p.width *= 2;
  const int heads = p.heads / p.kv_heads, size = std::min(heads > 2 ? 4 : heads, most);
  p.chunks = (heads + size - 1) / size;
  p.by_rows = Divisor(p.rows), p.by_chunks = Divisor(p.chunks);
  p.by_heads = Divisor(p.kv_heads * p.chunks), p.by_pieces = Divisor((p.dim + 31) / 32);
  return size;
}

void attention_float32(AttentionParams p, const Device& gpu, cudaStream_t stream);
void attention_float16(AttentionParams p, const Device& gpu, cudaStream_t stream);
void attention_bfloat16(AttentionParams p, const Device& gpu, cudaStream_t stream);

}  // namespace lmi
