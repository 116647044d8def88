#include "gemm_large.cuh"

namespace lmi {

bool gemm_large_bfloat16(const LinearParams& p, const Resources& use) {
  return gemm_large<__nv_bfloat16>(p, use, Type::bfloat16);
}

}  // namespace lmi
