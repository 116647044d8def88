// The operations as torch sees them. Each says whether it did the work: false means that it does not
// cover these types, shapes or layouts, and nothing was written.
#include "activate.h"
#include "arguments.h"
#include "gemm.h"
#include "gemm_large.h"
#include "widen.h"

namespace lmi {
namespace {

using torch::stable::accelerator::DeviceGuard;

bool run_norm(Tensor x, Tensor weight, Maybe bias, double eps, Tensor out) {
  const auto p = norm_params(x, weight, bias, eps, out);
  if (!p) return false;
  const DeviceGuard guard(x.get_device_index());
  norm(*p, device_of(x), stream_of(x));
  return true;
}

bool run_linear(Tensor x, Tensor weight, Maybe scale, Maybe bias, Maybe norm_weight,
                Maybe norm_bias, double eps, Maybe residual, int64_t activation, bool gated,
                int64_t splits, Tensor work, Tensor counters, Tensor out) {
  const auto p = linear_params(x, weight, scale, bias, norm_weight, norm_bias, eps, residual,
                               activation, gated, work, counters, out);
  if (!p) return false;
  const Type type = computed_in(x, weight, norm_weight);
  if (p->rows > (type == Type::float32 ? MOST_ROWS_FLOAT32 : MOST_ROWS)) return false;
  const DeviceGuard guard(x.get_device_index());
  const Resources use{device_of(x), stream_of(x), static_cast<int>(splits), work.numel()};
  switch (type) {
    case Type::float16: return linear_float16(*p, use);
    case Type::bfloat16: return linear_bfloat16(*p, use);
    default: return linear_float32(*p, use);
  }
}

// Whether the kernel for many rows covers it: it reads and writes eight outputs at a time.
bool covers_large(const LinearParams& p, Type type, const Maybe& residual) {
  const int outputs = p.weights.gated ? p.weights.outputs / 2 : p.weights.outputs;
  return p.weight_type == type && outputs % 8 == 0 && (!residual || is_dense(*residual)) &&
         (p.out_type == type || p.out_type == Type::float32);
}

bool run_gemm(Tensor x, Tensor weight, Maybe scale, Maybe bias, Maybe residual, int64_t activation,
              bool gated, Tensor work, Tensor counters, Tensor out) {
  const auto p = linear_params(x, weight, scale, bias, {}, {}, 0, residual, activation, gated, work,
                               counters, out);
  if (!p) return false;
  const Type type = computed_in(x, weight, {});
  if (type == Type::float32 || !is_of(x, type)) return false;
  const bool large = p->rows > GEMM_MOST_ROWS;
  if (large && !covers_large(*p, type, residual)) return false;
  const DeviceGuard guard(x.get_device_index());
  if (!device_of(x).hopper) return false;
  const Resources use{device_of(x), stream_of(x), 1, work.numel()};
  if (large) return type == Type::float16 ? gemm_large_float16(*p, use) : gemm_large_bfloat16(*p, use);
  return type == Type::float16 ? gemm_float16(*p, use) : gemm_bfloat16(*p, use);
}

bool run_attention(Tensor q, Tensor k, Tensor v, Tensor table, Tensor lengths, bool write,
                   int64_t heads, Maybe q_norm, Maybe k_norm, double eps, Maybe cos, Maybe sin,
                   Maybe bias, Maybe slopes, int64_t window, double scale, int64_t splits,
                   Tensor work, Tensor counters, Tensor out) {
  const auto p = attention_params(q, k, v, table, lengths, write, heads, q_norm, k_norm, eps, cos,
                                  sin, bias, slopes, window, scale, splits, work, counters, out);
  if (!p) return false;
  const DeviceGuard guard(q.get_device_index());
  switch (*type_of(q)) {
    case Type::float16: attention_float16(*p, device_of(q), stream_of(q)); break;
    case Type::bfloat16: attention_bfloat16(*p, device_of(q), stream_of(q)); break;
    default: attention_float32(*p, device_of(q), stream_of(q));
  }
  return true;
}

bool run_activate(Tensor x, int64_t activation, bool gated, Tensor out) {
  const int64_t features = out.size(-1), rows = out.numel() / features;
  if (!is_float(x) || !is_dense(x) || !is_dense(out) || out.scalar_type() != x.scalar_type() ||
      features % 8 || x.numel() != out.numel() * (gated ? 2 : 1) || !rows) {
    return false;
  }
  const DeviceGuard guard(x.get_device_index());
  const ActivateParams p{.x = operand(x),
                              .out = out.data_ptr(),
                              .activation = static_cast<Activation>(activation),
                              .gated = gated,
                              .rows = rows,
                              .features = static_cast<int>(features)};
  activate(p, device_of(x), stream_of(x));
  return true;
}

bool run_widen(Tensor codes, double factor, Tensor out) {
  const auto type = type_of(codes);
  if (!type || !is_quantized(*type) || !is_dense(codes) || !is_float(out) || !is_dense(out) ||
      codes.numel() % 16 || !codes.numel() || codes.numel() != out.numel()) {
    return false;
  }
  const DeviceGuard guard(codes.get_device_index());
  const WidenParams p{.codes = operand(codes),
                      .out = out.data_ptr(),
                      .out_type = *type_of(out),
                      .factor = static_cast<float>(factor),
                      .count = codes.numel()};
  widen(p, device_of(codes), stream_of(codes));
  return true;
}

}  // namespace
}  // namespace lmi

STABLE_TORCH_LIBRARY(lmi_multi, m) {
  m.def("activate(Tensor x, int activation, bool gated, Tensor(a!) out) -> bool");
  m.def("widen(Tensor codes, float factor, Tensor(a!) out) -> bool");
  m.def("norm(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor(a!) out) -> bool");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? norm_weight, "
      "Tensor? norm_bias, float eps, Tensor? residual, int activation, bool gated, int splits, "
      "Tensor(a!) work, Tensor(b!) counters, Tensor(c!) out) -> bool");
  m.def(
      "gemm(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, int activation, "
      "bool gated, Tensor(a!) work, Tensor(b!) counters, Tensor(c!) out) -> bool");
  m.def(
      "attention(Tensor q, Tensor(a!) k, Tensor(b!) v, Tensor table, Tensor lengths, bool write, "
      "int heads, Tensor? q_norm, Tensor? k_norm, float eps, Tensor? cos, Tensor? sin, "
      "Tensor? bias, Tensor? slopes, int window, float scale, int splits, Tensor(c!) work, "
      "Tensor(d!) counters, Tensor(e!) out) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lmi_multi, CUDA, m) {
  m.impl("activate", TORCH_BOX(&lmi::run_activate));
  m.impl("widen", TORCH_BOX(&lmi::run_widen));
  m.impl("norm", TORCH_BOX(&lmi::run_norm));
  m.impl("linear", TORCH_BOX(&lmi::run_linear));
  m.impl("gemm", TORCH_BOX(&lmi::run_gemm));
  m.impl("attention", TORCH_BOX(&lmi::run_attention));
}
