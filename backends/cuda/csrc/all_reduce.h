#pragma once

#include "common.cuh"
#include "inbox.h"

namespace lmi {

// Words of x become those of the sum; or, if there is a residual, that becomes residual + (sum + bias).
struct AllReduceParams {
  void* x;
  Type type;
  void* residual;  // as many elements as x has
  Type residual_type;
  Operand bias;  // [features]: every row's
  int features, words;
  Peers peers;
};

void all_reduce(const AllReduceParams& p, const Device& gpu, cudaStream_t stream);

}  // namespace lmi
