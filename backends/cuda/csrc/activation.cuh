// The activations, in float32.
#pragma once

#include "linear.h"

namespace lmi {

__device__ inline float activate(float x, Activation kind) {
  switch (kind) {
    case Activation::gelu: return 0.5f * x * (1 + erff(x * 0.70710678f));
    case Activation::gelu_tanh:  // x / 2 (1 + tanh u) is x / (1 + exp(-2 u))
      return __fdividef(x, 1 + expf(-1.5957691f * (x + 0.044715f * x * x * x)));
    case Activation::relu: return x > 0 || x != x ? x : 0;  // a NaN stays one
    case Activation::silu: return __fdividef(x, 1 + expf(-x));
    default: return x;
  }
}

// Of eight numbers side by side: which one it is, is asked once.
template <Activation KIND>
__device__ void activate8_by(float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = activate(x[i], KIND);
}

__device__ inline void activate8(float (&x)[8], Activation kind) {
  switch (kind) {
    case Activation::gelu: return activate8_by<Activation::gelu>(x);
    case Activation::gelu_tanh: return activate8_by<Activation::gelu_tanh>(x);
    case Activation::relu: return activate8_by<Activation::relu>(x);
    case Activation::silu: return activate8_by<Activation::silu>(x);
    default: return;
  }
}

}  // namespace lmi
