// Products of many rows on Hopper's tensor cores (sm_90a): arguments and entry points.
#pragma once

#include <cuda.h>

#include "linear.h"

namespace lmi {

struct LargeParams {
  CUtensorMap x, weights;
  Operand bias, residual;
  void* out;
  Type out_type;
  Activation activation;
  int rows, outputs;  // of `out`
  int steps;          // boxes of features
  // Tiles: pairs of blocks' rows of x, and columns of outputs.
  unsigned pairs, columns;
  int upper;  // weight rows from a tile's first half to its second
  bool gated;
};

// False, and nothing done, where the GPU has no room for it.
bool gemm_large_float16(const LinearParams& p, const Resources& use);
bool gemm_large_bfloat16(const LinearParams& p, const Resources& use);

}  // namespace lmi
