#include "gemm_large.cuh"

namespace lmi {

bool gemm_large_float16(const LinearParams& p, const Resources& use) {
  return gemm_large<__half>(p, use, Type::float16);
}

}  // namespace lmi
