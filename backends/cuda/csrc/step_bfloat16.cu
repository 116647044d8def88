#include "step.cuh"

namespace lmi {
void step_bfloat16(const Program& program, const StepParams& p, const Device& gpu,
                  cudaStream_t stream) {
  step_of<__nv_bfloat16>(program, p, gpu, stream);
}

}  // namespace lmi
