#include "step.cuh"

namespace lmi {
void step_float32(const Program& program, const StepParams& p, const Device& gpu,
                  cudaStream_t stream) {
  step_of<float>(program, p, gpu, stream);
}

}  // namespace lmi
