#include "prefill_long.cuh"

namespace lmi {

void prefill_long_bfloat16(const PrefillParams& p, const Device& gpu, cudaStream_t stream) {
  launch_long<__nv_bfloat16>(p, gpu, stream);
}

}  // namespace lmi
