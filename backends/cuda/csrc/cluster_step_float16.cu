#include "cluster_step.cuh"

namespace lmi {

int cluster_places_float16(const Program& program) {
  return cluster_places<__half>(program);
}

void cluster_step_float16(const Program& program, const StepParams& p, cudaStream_t stream) {
  cluster_step<__half>(program, p, stream);
}

}  // namespace lmi
