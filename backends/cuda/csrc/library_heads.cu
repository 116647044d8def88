// Making heads and attending with them as one operation, as torch sees it. False: these types, shapes
// or layouts are not covered, and nothing was written.
#include "arguments.h"
#include "heads.h"

namespace lmi {
namespace {

bool run_heads(Tensor x, Tensor weight, Maybe bias, Maybe norm_weight, Maybe norm_bias,
               double norm_eps, Tensor k, Tensor v, Tensor table, Tensor lengths, bool write,
               int64_t heads, Maybe q_norm, Maybe k_norm, double eps, Maybe cos, Maybe sin,
               Maybe position_bias, Maybe slopes, int64_t window, double scale, int64_t splits,
               Tensor work, Tensor counters, Tensor out) {
  const auto product = linear_params(x, weight, {}, bias, norm_weight, norm_bias, norm_eps, {}, 0,
                                     false, work, counters, out);
  // `out` in the place of queries, which are nowhere: it is as large as they are.
  const auto attention = attention_params(out, k, v, table, lengths, false, heads, q_norm, k_norm,
                                          eps, cos, sin, position_bias, slopes, window, scale,
                                          splits, work, counters, out);
  if (!product || !attention || product->rows != attention->rows ||
      product->rows > MOST_HEADS_ROWS || !is_of(out, product->weight_type) ||
      weight.size(0) != (heads + (write ? 2 * attention->kv_heads : 0)) * attention->dim) {
    return false;
  }
  const HeadsParams p{.product = *product, .attention = *attention, .write = write};
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  switch (product->weight_type) {
    case Type::float16: return heads_float16(p, device_of(x), stream_of(x));
    case Type::bfloat16: return heads_bfloat16(p, device_of(x), stream_of(x));
    default: return false;
  }
}

}  // namespace
}  // namespace lmi

STABLE_TORCH_LIBRARY_FRAGMENT(lmi_multi, m) {
  m.def(
      "heads(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
      "float norm_eps, Tensor(a!) k, Tensor(b!) v, Tensor table, Tensor lengths, bool write, "
      "int heads, Tensor? q_norm, Tensor? k_norm, float eps, Tensor? cos, Tensor? sin, "
      "Tensor? position_bias, Tensor? slopes, int window, float scale, int splits, "
      "Tensor(c!) work, Tensor(d!) counters, Tensor(e!) out) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lmi_multi, CUDA, m) { m.impl("heads", TORCH_BOX(&lmi::run_heads)); }
