// The operations as torch sees them, on its stable ABI. Each says whether it did the work: false
// means that it does not cover these types, shapes or layouts, and nothing was written.
#include "activate.h"
#include "attention.h"
#include "greedy.h"
#include "linear.h"
#include "norm.h"
#include "tensors.h"

namespace {

bool run_norm(Tensor x, Tensor weight, Maybe bias, double eps, Tensor out) {
  const int64_t features = weight.numel(), rows = x.numel() / features;
  if (features % 8 || !is_float(x) || !is_dense(x) || !is_vector(weight, features) ||
      !is_vector(bias, features) || !is_dense(out) || !rows ||
      !is_of(out, *type_of(weight)) || (bias && !is_of(*bias, *type_of(weight))) ||
      !(is_of(x, lmi::Type::float32) || is_of(x, *type_of(weight)))) {
    return false;
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const lmi::NormParams p{.x = operand(x),
                          .weight = operand(weight),
                          .bias = operand(bias),
                          .out = out.data_ptr(),
                          .eps = static_cast<float>(eps),
                          .rows = static_cast<int>(rows),
                          .features = static_cast<int>(features)};
  lmi::norm(p, device_of(x), stream_of(x));
  return true;
}

bool run_linear(Tensor x, Tensor weight, Maybe scale, Maybe bias, Maybe norm_weight,
                Maybe norm_bias, double eps, Maybe residual, int64_t activation, bool gated, int64_t splits, Tensor work,
            Tensor counters, Tensor out) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1), rows = x.numel() / inputs;
  const int64_t tiles = gated ? (outputs / 2 + 7) / 8 : (outputs + 15) / 16;
  const bool int8 = weight.scalar_type() == ScalarType::Char;
  if (!type_of(weight) || int8 != scale.has_value() || inputs % (int8 ? 16 : 8) ||
      !is_dense(weight) || !is_float(x) || !is_dense(x) || !is_float32(scale) ||
      !is_vector(bias, outputs) || !is_vector(norm_weight, inputs) ||
      !is_vector(norm_bias, inputs) || !is_float(out) || !is_dense(out) ||
      (gated && outputs % 2) || tiles > counters.numel() ||
      (residual && !(is_float(*residual) && residual->is_contiguous()))) {
    return false;
  }
  const lmi::Type type = *type_of(!int8 ? weight : norm_weight ? *norm_weight : x);
  const int most = type == lmi::Type::float32 ? lmi::MOST_ROWS_FLOAT32 : lmi::MOST_ROWS;
  if (rows < 1 || rows > most || !(is_of(x, lmi::Type::float32) || is_of(x, type)) ||
      (norm_weight && !is_of(*norm_weight, type)) || (norm_bias && !is_of(*norm_bias, type))) {
    return false;
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const lmi::LinearParams p{.x = operand(x),
                            .norm_weight = operand(norm_weight),
                            .norm_bias = operand(norm_bias),
                            .bias = operand(bias),
                            .residual = operand(residual),
                            .weight = weight.data_ptr(),
                            .scale = pointer<float>(scale),
                            .out = out.data_ptr(),
                            .work = pointer<float>(work),
                            .counters = pointer<int>(counters),
                            .weight_type = *type_of(weight),
                            .out_type = *type_of(out),
                            .activation = static_cast<lmi::Activation>(activation),
                            .gated = gated,
                            .eps = static_cast<float>(eps),
                            .rows = static_cast<int>(rows),
                            .inputs = static_cast<int>(inputs),
                            .outputs = static_cast<int>(outputs),
                            .tiles = static_cast<int>(tiles),
                            .slice = 0,
                            .slots = 0};
  const lmi::Resources use{device_of(x), stream_of(x), static_cast<int>(splits), work.numel()};
  switch (type) {
    case lmi::Type::float16: return lmi::linear_float16(p, use);
    case lmi::Type::bfloat16: return lmi::linear_bfloat16(p, use);
    default: return lmi::linear_float32(p, use);
  }
}

bool run_attention(Tensor q, Tensor k, Tensor v, Tensor table, Tensor lengths, bool write, int64_t heads,
               Maybe q_norm, Maybe k_norm, double eps, Maybe cos, Maybe sin, Maybe bias,
               Maybe slopes, int64_t window, double scale, int64_t splits, Tensor work,
               Tensor counters, Tensor out) {
  const int64_t rows = lengths.numel(), block = k.size(1), kv_heads = k.size(2), dim = k.size(3);
  const int64_t stride = (heads + (write ? 2 * kv_heads : 0)) * dim;
  const auto type = type_of(q);
  if (!is_float(q) || k.scalar_type() != q.scalar_type() || v.scalar_type() != q.scalar_type() ||
      out.scalar_type() != q.scalar_type() || dim % 8 || dim > lmi::MOST_HEAD_DIM ||
      block & (block - 1) || heads % kv_heads || !is_dense(q) || !is_dense(k) || !is_dense(v) ||
      !is_dense(out) || q.numel() != rows * stride || table.scalar_type() != ScalarType::Int ||
      lengths.scalar_type() != ScalarType::Int || !table.is_contiguous() || !is_float32(cos) ||
      !is_float32(sin) || !is_float32(bias) || !is_float32(slopes) || !is_vector(q_norm, dim) ||
      !is_vector(k_norm, dim) || rows * heads > counters.numel() ||
      (splits > 1 && rows * heads * splits * (dim + 2) > work.numel())) {
    return false;
  }
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const char* start = static_cast<const char*>(q.data_ptr());
  const int64_t bytes = dim * (*type == lmi::Type::float32 ? 4 : 2);
  int shift = 0;
  while (1 << shift < block) ++shift;
  const lmi::AttentionParams p{
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
      .width = 0};
  switch (*type) {
    case lmi::Type::float16: lmi::attention_float16(p, device_of(q), stream_of(q)); break;
    case lmi::Type::bfloat16: lmi::attention_bfloat16(p, device_of(q), stream_of(q)); break;
    default: lmi::attention_float32(p, device_of(q), stream_of(q));
  }
  return true;
}

bool run_activate(Tensor x, int64_t activation, bool gated, Tensor out) {
  const int64_t features = out.size(-1), rows = out.numel() / features;
  if (!is_float(x) || !is_dense(x) || !is_dense(out) || out.scalar_type() != x.scalar_type() ||
      features % 8 || x.numel() != out.numel() * (gated ? 2 : 1) || !rows) {
    return false;
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const lmi::ActivateParams p{.x = operand(x),
                              .out = out.data_ptr(),
                              .activation = static_cast<lmi::Activation>(activation),
                              .gated = gated,
                              .rows = rows,
                              .features = static_cast<int>(features)};
  lmi::activate(p, device_of(x), stream_of(x));
  return true;
}

bool run_greedy(Tensor logits, Tensor drawn, Tensor ids, Tensor lengths, Tensor live, Tensor work,
                Tensor counters) {
  const int64_t vocab = logits.size(-1), rows = logits.numel() / vocab;
  if (!is_float(logits) || !logits.is_cuda() || !logits.is_contiguous() || !rows ||
      !is_row(drawn, ScalarType::Long, rows) || !is_row(ids, ScalarType::Long, rows) ||
      !is_row(lengths, ScalarType::Int, rows) || !is_row(live, ScalarType::Int, rows) ||
      rows > counters.numel() || rows > 65535 || vocab > 1LL << 30 ||
      2 * rows * lmi::GREEDY_PARTS > work.numel()) {
    return false;
  }
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const lmi::GreedyParams p{.logits = operand(logits),
                            .drawn = static_cast<int64_t*>(drawn.data_ptr()),
                            .ids = static_cast<int64_t*>(ids.data_ptr()),
                            .lengths = static_cast<int*>(lengths.data_ptr()),
                            .live = static_cast<const int*>(live.data_ptr()),
                            .work = static_cast<unsigned long long*>(work.data_ptr()),
                            .counters = static_cast<int*>(counters.data_ptr()),
                            .rows = static_cast<int>(rows),
                            .vocab = static_cast<int>(vocab)};
  lmi::greedy(p, device_of(logits), stream_of(logits));
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY(lmi_multi, m) {
  m.def("activate(Tensor x, int activation, bool gated, Tensor(a!) out) -> bool");
  m.def(
      "greedy(Tensor logits, Tensor(a!) drawn, Tensor(b!) ids, Tensor(c!) lengths, Tensor live, "
      "Tensor(d!) work, Tensor(e!) counters) -> bool");
  m.def("norm(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor(a!) out) -> bool");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? norm_weight, "
      "Tensor? norm_bias, float eps, Tensor? residual, int activation, bool gated, int splits, "
      "Tensor(a!) work, Tensor(b!) counters, Tensor(c!) out) -> bool");
  m.def(
      "attention(Tensor q, Tensor(a!) k, Tensor(b!) v, Tensor table, Tensor lengths, bool write, "
      "int heads, Tensor? q_norm, Tensor? k_norm, float eps, Tensor? cos, Tensor? sin, "
      "Tensor? bias, Tensor? slopes, int window, float scale, int splits, Tensor(c!) work, "
      "Tensor(d!) counters, Tensor(e!) out) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lmi_multi, CUDA, m) {
  m.impl("activate", TORCH_BOX(&run_activate));
  m.impl("greedy", TORCH_BOX(&run_greedy));
  m.impl("norm", TORCH_BOX(&run_norm));
  m.impl("linear", TORCH_BOX(&run_linear));
  m.impl("attention", TORCH_BOX(&run_attention));
}
