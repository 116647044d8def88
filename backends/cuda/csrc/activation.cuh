// The activations, in float32.
#pragma once

#include "linear.h"

namespace lmi {

__device__ inline float activate(float x, Activation kind) {
  switch (kind) {
    case Activation::gelu: return 0.5f * x * (1 + erff(x * 0.70710678f));
    case Activation::gelu_tanh:
      return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::relu: return x > 0 || x != x ? x : 0;  // a NaN stays one
    case Activation::silu: return __fdividef(x, 1 + expf(-x));
    default: return x;
  }
}

}  // namespace lmi
