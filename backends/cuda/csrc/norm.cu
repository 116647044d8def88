// Norms by themselves, a block a row.
#include "normalize.cuh"

namespace lmi {
namespace {

constexpr int THREADS = 256;

template <typename X, typename W>
__global__ void __launch_bounds__(THREADS) norm_kernel(const NormParams p) {
  let_next_start();
  wait_for_last();
  normalize<X, W>(p, blockIdx.x);
}

template <typename X, typename W>
void launch_norm(const NormParams& p, const Device& gpu, cudaStream_t stream) {
  launch(&norm_kernel<X, W>, p, dim3(p.rows), THREADS, 0, early(gpu), stream);
}

// The types that occur: all alike, or a float32 stream.
template <typename W>
void from_type(const NormParams& p, const Device& gpu, cudaStream_t stream) {
  if (p.x.type == Type::float32) return launch_norm<float, W>(p, gpu, stream);
  launch_norm<W, W>(p, gpu, stream);
}

}  // namespace

void norm(const NormParams& p, const Device& gpu, cudaStream_t stream) {
  switch (p.weight.type) {
    case Type::float16: return from_type<__half>(p, gpu, stream);
    case Type::bfloat16: return from_type<__nv_bfloat16>(p, gpu, stream);
    default: return launch_norm<float, float>(p, gpu, stream);
  }
}

}  // namespace lmi
