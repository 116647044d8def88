// Quantized weights in a type that torch's products take.
#pragma once

#include "common.cuh"

namespace lmi {

struct WidenParams {
  Operand codes;  // int8 or float8
  void* out;      // as many, each times `factor`
  Type out_type;
  float factor;
  int64_t count;  // a multiple of 16
};

void widen(const WidenParams& p, const Device& gpu, cudaStream_t stream);

}  // namespace lmi
