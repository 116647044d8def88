// The linear kernels' arguments and entry points, one for each type of activations.
#pragma once

#include "common.cuh"

namespace lmi {

enum class Activation : int { none, gelu, gelu_tanh, relu, silu };

constexpr int MOST_ROWS = 32, MOST_ROWS_FLOAT32 = 16;
constexpr int TILE = 16;  // weight rows that a block works on at a time

// Weights, and how blocks share the work: each has one split of the features.
struct alignas(16) Weights {
  const void* data;     // [outputs, inputs]
  int inputs, outputs;  // gated: outputs are [gate, what it gates]
  int tiles;            // of sixteen outputs (gated: eight of the gate, eight of what it gates)
  int slice;            // features of a split
  int splits;
  bool gated;
};

struct LinearParams {
  Weights weights;
  // Norms are of the type that is computed in; x is that or float32.
  Operand x, norm_weight, norm_bias, bias, residual;
  const float* scale;  // of each output channel, for quantized weights
  // Of each output channel, where a LayerNorm comes behind the product (held.cuh) and has no biases here,
  // nor has the product: the sum of its weights times the norm's; and its bias with the sum of its
  // weights times the norm's biases, over its scale.
  const float2* norm_terms;
  void* out;
  float* work;    // what the splits have found: [tiles, splits] tiles of results
  int* counters;  // [tiles], zero
  Type weight_type, out_type;
  Activation activation;
  float eps;
  int rows;
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
