#include "attention.cuh"

namespace lmi {

void attention_bfloat16(AttentionParams p, const Device& gpu, cudaStream_t stream) {
  launch_attention<__nv_bfloat16>(p, gpu, stream);
}

}  // namespace lmi
