#include "gemm_launch.cuh"

namespace lmi {

bool gemm_float16(const LinearParams& p, const Resources& use) {
  return gemm_of<__half>(p, use, Type::float16);
}

}  // namespace lmi
