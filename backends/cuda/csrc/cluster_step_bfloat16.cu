#include "cluster_step.cuh"

namespace lmi {

int cluster_places_bfloat16(const Program& program) {
  return cluster_places<__nv_bfloat16>(program);
}

void cluster_step_bfloat16(const Program& program, const StepParams& p, cudaStream_t stream) {
  cluster_step<__nv_bfloat16>(program, p, stream);
}

}  // namespace lmi
