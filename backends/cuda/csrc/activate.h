#pragma once

#include "linear.h"

namespace lmi {

struct ActivateParams {
  // x [rows, features], or [rows, 2 * features] of gates and what they gate; out is of x's type.
  Operand x;
  void* out;
  Activation activation;
  bool gated;
  int64_t rows;
  int features;
};

void activate(const ActivateParams& p, const Device& gpu, cudaStream_t stream);

}  // namespace lmi
