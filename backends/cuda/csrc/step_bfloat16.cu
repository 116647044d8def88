#include "step.cuh"

namespace lmi {
void step_bfloat16(const Program& program, const StepParams& p, const Device& gpu,
                   cudaStream_t stream) {
  switch (program.weight_type) {
    case Type::int8: return launch_step<TensorProduct<__nv_bfloat16, int8_t, 1>>(program, p, gpu, stream);
    case Type::float8: return launch_step<TensorProduct<__nv_bfloat16, __nv_fp8_e4m3, 1>>(program, p, gpu, stream);
    default: return launch_step<TensorProduct<__nv_bfloat16, __nv_bfloat16, 1>>(program, p, gpu, stream);
  }
}

}  // namespace lmi
