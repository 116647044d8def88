#include "heads.cuh"

namespace lmi {

bool heads_float16(const HeadsParams& p, const Device& gpu, cudaStream_t stream) {
  return launch_heads<__half>(p, gpu, stream);
}

}  // namespace lmi
