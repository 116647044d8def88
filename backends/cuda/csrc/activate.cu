// Activation and gate by themselves, behind products that are not ours.
#include "activate.h"

#include "activation.cuh"

namespace lmi {
namespace {

constexpr int THREADS = 256;

template <typename T>
__global__ void __launch_bounds__(THREADS) activate_kernel(const ActivateParams p) {
  let_next_start();
  wait_for_last();
  const int vectors = p.features / 8;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (at >= p.rows * vectors) return;
  const int64_t row = at / vectors, first = at % vectors * 8;
  const T* x = static_cast<const T*>(p.x.data) + row * p.features * (p.gated ? 2 : 1) + first;
  float own[8], gated[8];
  load8(x, own);
  if (p.gated) load8(x + p.features, gated);
  activate8(own, p.activation);
  if (p.gated) {
#pragma unroll
    for (int i = 0; i < 8; ++i) own[i] *= gated[i];
  }
  store8(static_cast<T*>(p.out) + row * p.features + first, own);
}

template <typename T>
void launch_activate(const ActivateParams& p, const Device& gpu, cudaStream_t stream) {
  const int64_t threads = p.rows * (p.features / 8);
  const dim3 grid(static_cast<unsigned>((threads + THREADS - 1) / THREADS));
  launch(&activate_kernel<T>, p, grid, THREADS, 0, early(gpu), stream);
}

}  // namespace

void activate(const ActivateParams& p, const Device& gpu, cudaStream_t stream) {
  switch (p.x.type) {
    case Type::float16: return launch_activate<__half>(p, gpu, stream);
    case Type::bfloat16: return launch_activate<__nv_bfloat16>(p, gpu, stream);
    default: return launch_activate<float>(p, gpu, stream);
  }
}

}  // namespace lmi
