#include "attention.cuh"

namespace lmi {

void attention_float16(AttentionParams p, const Device& gpu, cudaStream_t stream) {
  launch_attention<__half>(p, gpu, stream);
}

}  // namespace lmi
