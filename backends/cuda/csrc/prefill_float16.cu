#include "prefill.cuh"

namespace lmi {

int prefill_shared(const PrefillParams& p) {
  int bytes = 0;
  with_shape(p, [&](auto shape) { bytes = decltype(shape)::ELEMENTS * 2 + p.distances * 4; });
  return bytes;
}

void prefill_float16(const PrefillParams& p, const Device& gpu, cudaStream_t stream) {
  launch_prefill<__half>(p, gpu, stream);
}

}  // namespace lmi
