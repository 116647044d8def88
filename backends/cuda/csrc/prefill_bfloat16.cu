#include "prefill.cuh"

namespace lmi {

void prefill_bfloat16(const PrefillParams& p, const Device& gpu, cudaStream_t stream) {
  launch_prefill<__nv_bfloat16>(p, gpu, stream);
}

}  // namespace lmi
