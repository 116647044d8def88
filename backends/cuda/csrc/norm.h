#pragma once

#include "common.cuh"

namespace lmi {

struct NormParams {
  // Without a bias: RMSNorm. x is float32 or of the type that weight, bias and out share.
  Operand x, weight, bias;
  void* out;
  float eps;
  int rows, features;
};

void norm(const NormParams& p, const Device& gpu, cudaStream_t stream);

}  // namespace lmi
