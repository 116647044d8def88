// Codes of one byte to floats, sixteen a thread: their way through memory is all the time it takes.
#include "widen.h"

#include "product.cuh"

namespace lmi {
namespace {

constexpr int THREADS = 256, CODES = 16;  // a block's, and a thread's

template <typename W, typename T>
__global__ void __launch_bounds__(THREADS) widen_kernel(const WidenParams p) {
  let_next_start();
  wait_for_last();
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * CODES;
  if (at >= p.count) return;
  const uint4 raw = *reinterpret_cast<const uint4*>(static_cast<const W*>(p.codes.data) + at);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 a = widen4(words[2 * half], W()), b = widen4(words[2 * half + 1], W());
    float values[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= p.factor;
    store8(static_cast<T*>(p.out) + at + half * 8, values);
  }
}

template <typename W>
void launch_widen(const WidenParams& p, const Device& gpu, cudaStream_t stream) {
  constexpr int64_t EACH = THREADS * CODES;
  const dim3 grid(static_cast<unsigned>((p.count + EACH - 1) / EACH));
  const Start start = early(gpu);
  switch (p.out_type) {
    case Type::float16:
      return launch(&widen_kernel<W, __half>, p, grid, THREADS, 0, start, stream);
    case Type::bfloat16:
      return launch(&widen_kernel<W, __nv_bfloat16>, p, grid, THREADS, 0, start, stream);
    default: return launch(&widen_kernel<W, float>, p, grid, THREADS, 0, start, stream);
  }
}

}  // namespace

void widen(const WidenParams& p, const Device& gpu, cudaStream_t stream) {
  if (p.codes.type == Type::int8) return launch_widen<int8_t>(p, gpu, stream);
  launch_widen<__nv_fp8_e4m3>(p, gpu, stream);
}

}  // namespace lmi
