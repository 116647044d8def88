#include "prefill.cuh"

namespace lmi {

int prefill_shared(const PrefillParams& p) {
  const int elements = p.dim <= 64 ? TILES<64> : p.dim <= 128 ? TILES<128> : TILES<256>;
  return elements * 2 + p.distances * 4;
}

void prefill_float16(const PrefillParams& p, const Device& gpu, cudaStream_t stream) {
  launch_prefill<__half>(p, gpu, stream);
}

}  // namespace lmi
