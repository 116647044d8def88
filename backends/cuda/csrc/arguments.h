// From tensors to the kernels' arguments; nothing where a kernel does not cover these types, shapes
// or layouts.
#pragma once

#include "attention.h"
#include "linear.h"
#include "norm.h"
#include "tensors.h"

namespace lmi {

inline std::optional<NormParams> norm_params(const Tensor& x, const Tensor& weight,
                                             const Maybe& bias, double eps, const Tensor& out) {
  const int64_t features = weight.numel(), rows = x.numel() / features;
  if (features % 8 || !is_float(x) || !is_dense(x) || !is_vector(weight, features) ||
      !is_vector(bias, features) || !is_dense(out) || !rows ||
      !is_of(out, *type_of(weight)) || (bias && !is_of(*bias, *type_of(weight))) ||
      !(is_of(x, Type::float32) || is_of(x, *type_of(weight)))) {
    return std::nullopt;
  }
  return NormParams{.x = operand(x),
                          .weight = operand(weight),
                          .bias = operand(bias),
                          .out = out.data_ptr(),
                          .eps = static_cast<float>(eps),
                          .rows = static_cast<int>(rows),
                          .features = static_cast<int>(features)};
}

// The type of a product's operands: quantized weights are widened to that of what they multiply.
inline Type computed_in(const Tensor& x, const Tensor& weight, const Maybe& norm_weight) {
  const Type type = *type_of(weight);
  return is_quantized(type) ? *type_of(norm_weight ? *norm_weight : x) : type;
}

inline std::optional<LinearParams> linear_params(
    const Tensor& x, const Tensor& weight, const Maybe& scale, const Maybe& bias,
    const Maybe& norm_weight, const Maybe& norm_bias, double eps, const Maybe& residual,
    int64_t activation, bool gated, const Tensor& work, const Tensor& counters,
    const Tensor& out) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1), rows = x.numel() / inputs;
  const int64_t tiles = gated ? (outputs / 2 + 7) / 8 : (outputs + 15) / 16;
  const auto weight_type = type_of(weight);
  const bool quantized = weight_type && is_quantized(*weight_type);
  if (!weight_type || quantized != scale.has_value() || inputs % (quantized ? 16 : 8) ||
      !is_dense(weight) || !is_float(x) || !is_dense(x) || !is_float32(scale) ||
      !is_vector(bias, outputs) || !is_vector(norm_weight, inputs) ||
      !is_vector(norm_bias, inputs) || !is_float(out) || !is_dense(out) ||
      (gated && (outputs % 2 || outputs / 2 * inputs > INT32_MAX)) || tiles > counters.numel() ||
      (residual && !(is_float(*residual) && residual->is_contiguous()))) {
    return std::nullopt;
  }
  const Type type = computed_in(x, weight, norm_weight);
  if (rows < 1 || !(is_of(x, Type::float32) || is_of(x, type)) ||
      (norm_weight && !is_of(*norm_weight, type)) || (norm_bias && !is_of(*norm_bias, type))) {
    return std::nullopt;
  }
  return LinearParams{.weights = {.data = weight.data_ptr(),
                                  .inputs = static_cast<int>(inputs),
                                  .outputs = static_cast<int>(outputs),
                                  .tiles = static_cast<int>(tiles),
                                  .slice = 0,
                                  .splits = 1,
                                  .gated = gated},
                      .x = operand(x),
                      .norm_weight = operand(norm_weight),
                      .norm_bias = operand(norm_bias),
                      .bias = operand(bias),
                      .residual = operand(residual),
                      .scale = pointer<float>(scale),
                      .norm_terms = nullptr,
                      .out = out.data_ptr(),
                      .work = pointer<float>(work),
                      .counters = pointer<int>(counters),
                      .weight_type = *weight_type,
                      .out_type = *type_of(out),
                      .activation = static_cast<Activation>(activation),
                      .eps = static_cast<float>(eps),
                      .rows = static_cast<int>(rows)};
}

// Whether a Divisor divides every item's number by rows and heads: blocks go some further than the last.
inline bool can_divide(int64_t rows, int64_t heads, int64_t splits) {
  constexpr int64_t FURTHER = 1 << 16;
  return (rows * heads * splits + FURTHER) * std::max(rows, heads) <= UINT32_MAX;
}

inline std::optional<AttentionParams> attention_params(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table,
    const Tensor& lengths, bool write, int64_t heads, const Maybe& q_norm, const Maybe& k_norm,
    double eps, const Maybe& cos, const Maybe& sin, const Maybe& bias, const Maybe& slopes,
    int64_t window, double scale, int64_t splits, const Tensor& work, const Tensor& counters,
    const Tensor& out) {
  const int64_t rows = lengths.numel(), block = k.size(1), kv_heads = k.size(2), dim = k.size(3);
  const int64_t stride = (heads + (write ? 2 * kv_heads : 0)) * dim;
  const auto type = type_of(q);
  if (!is_float(q) || k.scalar_type() != q.scalar_type() || v.scalar_type() != q.scalar_type() ||
      out.scalar_type() != q.scalar_type() || dim % 8 || dim > MOST_HEAD_DIM ||
      block & (block - 1) || heads % kv_heads || !is_dense(q) || !is_dense(k) || !is_dense(v) ||
      !is_dense(out) || q.numel() != rows * stride || table.scalar_type() != ScalarType::Int ||
      lengths.scalar_type() != ScalarType::Int || !table.is_contiguous() || !is_float32(cos) ||
      !is_float32(sin) || !is_float32(bias) || !is_float32(slopes) || !is_vector(q_norm, dim) ||
      !is_vector(k_norm, dim) || rows * heads > counters.numel() ||
      (splits > 1 && rows * heads * splits * (dim + 2) > work.numel()) ||
      !can_divide(rows, heads, splits)) {
    return std::nullopt;
  }
  const char* start = static_cast<const char*>(q.data_ptr());
  const int64_t bytes = dim * (*type == Type::float32 ? 4 : 2);
  int shift = 0;
  while (1 << shift < block) ++shift;
  return AttentionParams{
      .q = start,
      .new_k = write ? start + heads * bytes : nullptr,
      .new_v = write ? start + (heads + kv_heads) * bytes : nullptr,
      .q_stride = stride,
      .k = k.data_ptr(),
      .v = v.data_ptr(),
      .table = static_cast<const int*>(table.data_ptr()),
      .lengths = static_cast<const int*>(lengths.data_ptr()),
      .q_norm = operand(q_norm),
      .k_norm = operand(k_norm),
      .cos = pointer<float>(cos),
      .sin = pointer<float>(sin),
      .bias = pointer<float>(bias),
      .slopes = pointer<float>(slopes),
      .out = out.data_ptr(),
      .work = pointer<float>(work),
      .counters = pointer<int>(counters),
      .eps = static_cast<float>(eps),
      .scale = static_cast<float>(scale),
      .rows = static_cast<int>(rows),
      .heads = static_cast<int>(heads),
      .kv_heads = static_cast<int>(kv_heads),
      .dim = static_cast<int>(dim),
      .pairs = cos ? static_cast<int>(cos->size(1)) : 0,
      .distances = bias ? static_cast<int>(bias->size(0)) : 0,
      .window = static_cast<int>(window),
      .table_width = static_cast<int>(table.size(1)),
      .block_shift = shift,
      .splits = static_cast<int>(splits),
      .chunks = 0,
      .width = 0,
      .by_rows = {},
      .by_heads = {},
      .by_chunks = {},
      .by_pieces = {}};
}

}  // namespace lmi
