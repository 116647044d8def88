#pragma once

#include "common.cuh"

namespace lmi {

// How a step begins: each row's token and position looked up in tables. Whatever is null is left
// out: the rows of `positions` that are added, or the angles.
struct EmbedParams {
  const int64_t* ids;  // [rows]
  const int* lengths;  // [rows], the tokens with this one: its position is one less
  // Of one type. Tokens are [count, features], from `first` on: of others x becomes zero.
  Operand tokens, positions;
  const float *cos_table, *sin_table;  // [most_positions, pairs]
  void* x;                             // [rows, features], float32 or of the tables' type
  float *cos, *sin;                    // [rows, pairs]
  int64_t first, count;
  Type x_type;
  int most_positions, rows, features, pairs;
};

void embed(const EmbedParams& p, cudaStream_t stream);

}  // namespace lmi
