#include "attention.cuh"

namespace lmi {

void attention_float32(AttentionParams p, const Device& gpu, cudaStream_t stream) {
  launch_attention<float>(p, gpu, stream);
}

}  // namespace lmi
