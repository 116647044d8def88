#include "heads.cuh"

namespace lmi {

bool heads_bfloat16(const HeadsParams& p, const Device& gpu, cudaStream_t stream) {
  return launch_heads<__nv_bfloat16>(p, gpu, stream);
}

}  // namespace lmi
