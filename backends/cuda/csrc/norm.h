#pragma once

#include "common.cuh"

namespace lmi {

struct NormParams {
  Operand x, weight, bias;  // without a bias: RMSNorm
  void* out;
  Type out_type;
  float eps;
  int rows, features;
};

void norm(const NormParams& p, const Device& gpu, cudaStream_t stream);

}  // namespace lmi
