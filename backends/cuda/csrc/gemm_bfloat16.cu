#include "gemm_launch.cuh"

namespace lmi {

bool gemm_bfloat16(const LinearParams& p, const Resources& use) {
  return gemm_of<__nv_bfloat16>(p, use, Type::bfloat16);
}

}  // namespace lmi
