// The beginning of a step as torch sees it; false as in library.cu.
#include <algorithm>
#include <limits>

#include "embed.h"
#include "tensors.h"

namespace lmi {
namespace {

bool is_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns;
}

bool is_table(const Tensor& tensor, int64_t columns) {
  return is_float(tensor) && is_dense(tensor) && is_matrix(tensor, tensor.size(0), columns) &&
         tensor.size(0) > 0 && tensor.size(0) <= std::numeric_limits<int>::max();
}

// Tables [positions, pairs], and [rows, pairs] to fill from them.
bool are_angles(const Maybe& cos_table, const Maybe& sin_table, const Maybe& cos, const Maybe& sin,
                int64_t rows) {
  if (!cos_table) return !sin_table && !cos && !sin;
  const int64_t pairs = cos_table->size(-1);
  return sin_table && cos && sin && is_float32(cos_table) && is_float32(sin_table) &&
         is_float32(cos) && is_float32(sin) && pairs > 0 && is_table(*cos_table, pairs) &&
         is_matrix(*sin_table, cos_table->size(0), pairs) && is_matrix(*cos, rows, pairs) &&
         is_matrix(*sin, rows, pairs);
}

int64_t most_positions(const Maybe& positions, const Maybe& angles) {
  const int64_t most = std::numeric_limits<int>::max();
  return std::min(positions ? positions->size(0) : most, angles ? angles->size(0) : most);
}

bool run_embed(Tensor ids, Tensor lengths, Tensor tokens, int64_t first, Maybe positions,
               Maybe cos_table, Maybe sin_table, Tensor x, Maybe cos, Maybe sin) {
  if (x.dim() != 2 || tokens.dim() != 2) return false;
  const int64_t rows = x.size(0), features = x.size(1);
  if (!is_table(tokens, features) || features % 8 || !is_float(x) || !is_dense(x) ||
      !(is_of(x, Type::float32) || x.scalar_type() == tokens.scalar_type()) ||
      (positions && !(positions->dim() == 2 && is_table(*positions, features) &&
                      positions->scalar_type() == tokens.scalar_type())) ||
      !rows || rows > 65535 || !is_row(ids, ScalarType::Long, rows) ||
      !is_row(lengths, ScalarType::Int, rows) ||
      !are_angles(cos_table, sin_table, cos, sin, rows)) {
    return false;
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const EmbedParams p{.ids = static_cast<const int64_t*>(ids.data_ptr()),
                      .lengths = static_cast<const int*>(lengths.data_ptr()),
                      .tokens = operand(tokens),
                      .positions = operand(positions),
                      .cos_table = pointer<const float>(cos_table),
                      .sin_table = pointer<const float>(sin_table),
                      .x = x.data_ptr(),
                      .cos = pointer<float>(cos),
                      .sin = pointer<float>(sin),
                      .first = first,
                      .count = tokens.size(0),
                      .x_type = *type_of(x),
                      .most_positions = static_cast<int>(most_positions(positions, cos_table)),
                      .rows = static_cast<int>(rows),
                      .features = static_cast<int>(features),
                      .pairs = cos ? static_cast<int>(cos->size(1)) : 0};
  embed(p, stream_of(x));
  return true;
}

}  // namespace
}  // namespace lmi

STABLE_TORCH_LIBRARY_FRAGMENT(lmi_multi, m) {
  m.def(
      "embed(Tensor ids, Tensor lengths, Tensor tokens, int first, Tensor? positions, "
      "Tensor? cos_table, Tensor? sin_table, Tensor(a!) x, Tensor(b!)? cos, Tensor(c!)? sin) -> "
      "bool");
}

STABLE_TORCH_LIBRARY_IMPL(lmi_multi, CUDA, m) {
  m.impl("embed", TORCH_BOX(&lmi::run_embed));
}
