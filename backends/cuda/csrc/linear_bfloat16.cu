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
  return p.weight_type == Type::int8 ? by_rows<int8_t>(p, use) : by_rows<__nv_bfloat16>(p, use);
}

}  // namespace lmi
