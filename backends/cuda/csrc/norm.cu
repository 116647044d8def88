// Norms by themselves, a block a row.
#include "normalize.cuh"

namespace lmi {
namespace {

constexpr int MOST_THREADS = 1024;

// The sum over the block, in each thread. `scratch`: a float a warp, which nobody reads any more.
__device__ float block_sum(float value, float* scratch) {
  const int lane = threadIdx.x % 32;
  value = warp_sum(value);
  if (lane == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_sum(lane < blockDim.x / 32 ? scratch[lane] : 0);
}

// A thread has eight features, and keeps them. Weights are nobody's results: they are read while the
// last kernel is still at work.
template <typename X, typename W>
__global__ void __launch_bounds__(MOST_THREADS) norm_kernel(const NormParams p) {
  __shared__ float scratch[2][MOST_THREADS / 32];
  const int at = threadIdx.x * 8;
  const bool has = at < p.features, centred = p.bias.data;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * p.features + at;
  let_next_start();
  Raw<W> weight, bias;
  if (has) weight.read(static_cast<const W*>(p.weight.data) + at);
  if (has && centred) bias.read(static_cast<const W*>(p.bias.data) + at);
  wait_for_last();
  Raw<X> raw;
  if (has) raw.read(static_cast<const X*>(p.x.data) + place);
  float x[8];
  raw.unpack(x);
  Normal by;
  if (centred) {
    float sum = 0;
#pragma unroll
    for (float value : x) sum += value;
    by.shift = __fdividef(block_sum(sum, scratch[0]), p.features);
  }
  float squares = 0;
#pragma unroll
  for (float value : x) squares += has ? (value - by.shift) * (value - by.shift) : 0;
  by.factor = rsqrtf(__fdividef(block_sum(squares, scratch[1]), p.features) + p.eps);
  if (!has) return;
  apply(by, weight, bias, x);
  store8(static_cast<W*>(p.out) + place, x);
}

// Of rows that are too long for that.
template <typename X, typename W>
__global__ void __launch_bounds__(MOST_THREADS) long_norm_kernel(const NormParams p) {
  let_next_start();
  wait_for_last();
  normalize<X, W>(p, blockIdx.x);
}

template <typename X, typename W>
void launch_norm(const NormParams& p, const Device& gpu, cudaStream_t stream) {
  const int threads = (p.features / 8 + 31) / 32 * 32;
  const auto kernel = threads <= MOST_THREADS ? &norm_kernel<X, W> : &long_norm_kernel<X, W>;
  launch(kernel, p, dim3(p.rows), std::min(threads, MOST_THREADS), 0, early(gpu), stream);
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
