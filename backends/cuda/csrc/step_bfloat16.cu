#include "step.cuh"

namespace lmi {
namespace {

template <typename W>
void by_rows(const Program& program, const StepParams& p, const Device& gpu, cudaStream_t stream) {
  if (row_tiles(program.rows, program.type) == 1) return launch_step<TensorProduct<__nv_bfloat16, W, 1>, 1>(program, p, gpu, stream);
  launch_step<TensorProduct<__nv_bfloat16, W, 2>, 2>(program, p, gpu, stream);
}

}  // namespace

void step_bfloat16(const Program& program, const StepParams& p, const Device& gpu, cudaStream_t stream) {
  switch (program.weight_type) {
    case Type::int8: return by_rows<int8_t>(program, p, gpu, stream);
    case Type::float8: return by_rows<__nv_fp8_e4m3>(program, p, gpu, stream);
    default: return by_rows<__nv_bfloat16>(program, p, gpu, stream);
  }
}

}  // namespace lmi
