#include "linear.cuh"

namespace lmi {
namespace {

template <typename W>
bool by_rows(const LinearParams& p, const Resources& use) {
  if (p.rows <= 8) return launch_rows<TensorProduct<__nv_bfloat16, W, 1>, 1>(p, use);
  if (p.rows <= 16) return launch_rows<TensorProduct<__nv_bfloat16, W, 2>, 2>(p, use);
  return launch_rows<TensorProduct<__nv_bfloat16, W, 4>, 4>(p, use);
}

}  // namespace

bool linear_bfloat16(const LinearParams& p, const Resources& use) {
  switch (p.weight_type) {
    case Type::int8: return by_rows<int8_t>(p, use);
    case Type::float8: return by_rows<__nv_fp8_e4m3>(p, use);
    default: return by_rows<__nv_bfloat16>(p, use);
  }
}

}  // namespace lmi
