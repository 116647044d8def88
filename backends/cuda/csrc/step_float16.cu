#include "step.cuh"

namespace lmi {
void step_float16(const Program& program, const StepParams& p, const Device& gpu,
                  cudaStream_t stream) {
  step_of<__half>(program, p, gpu, stream);
}

}  // namespace lmi
