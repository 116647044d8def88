// The linear kernels' arguments and entry points, one for each type of activations.
#pragma once

#include "common.cuh"

namespace lmi {

enum class Activation : int { none, gelu, gelu_tanh, relu, silu };

constexpr int MOST_ROWS = 32, MOST_ROWS_FLOAT32 = 16;

struct LinearParams {
  // Norms are of the type that is computed in; x is that or float32.
  Operand x, norm_weight, norm_bias, bias, residual;
  const void* weight;
  const float* scale;  // of each output channel, for int8 weights
  void* out;
  float* work;    // what the splits have found
  int* counters;  // [tiles], zero
  Type weight_type, out_type;
  Activation activation;
  bool gated;
  float eps;
  int rows, inputs, outputs, tiles;
  int slice;  // features of a block
  int slots;  // of a warp's ring
};

struct Resources {
  Device gpu;
  cudaStream_t stream;
  int splits;           // at least; more where x needs them
  int64_t work_floats;  // room in `work`
};

// False, and nothing done, if `work` is too small.
bool linear_float32(const LinearParams& p, const Resources& use);
bool linear_float16(const LinearParams& p, const Resources& use);
bool linear_bfloat16(const LinearParams& p, const Resources& use);

}  // namespace lmi
