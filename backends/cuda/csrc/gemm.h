// Products of 9 to 64 rows on Hopper's tensor cores (sm_90a): arguments and entry points.
#pragma once

#include "linear.h"
#include "tensor_map.h"

namespace lmi {

constexpr int GEMM_MOST_ROWS = 64;

// A tile is two halves of 64 weight rows: neighbours, or gates and what they gate.
constexpr int HALF = 64;

struct GemmParams {
  CUtensorMap weights, x;  // boxes of HALF rows, and of all rows
  Operand bias, residual;
  const float* scale;  // of each output channel, for quantized weights
  void* out;
  Type out_type;
  Activation activation;
  int rows, outputs;      // outputs of `out`: gated, half of the weights' rows
  unsigned tiles, steps;  // steps of a box of weights through the features, for each tile
  unsigned splits;        // blocks of a cluster, which share a tile's steps
  unsigned depth;         // steps in a block's ring
  int stride;             // bytes of each
  int upper;              // weight rows from a tile's first half to its second
  bool gated, keep;  // keep: a block's x is beside the ring all the time, not in its steps
};

bool gemm_float16(const LinearParams& p, const Resources& use);
bool gemm_bfloat16(const LinearParams& p, const Resources& use);

}  // namespace lmi
