#include "prefill_long.cuh"

namespace lmi {

int prefill_long_shared(const PrefillParams& p) {
  int bytes = 0;
  if (p.queries != LongShape<64>::QUERIES || (p.table && p.block_shift < 3)) return 0;
  with_long_shape(p, [&](auto shape) { bytes = decltype(shape)::shared(p.distances); });
  return bytes;
}

void prefill_long_float16(const PrefillParams& p, const Device& gpu, cudaStream_t stream) {
  launch_long<__half>(p, gpu, stream);
}

}  // namespace lmi
