// Recording a step's phases into a program, and running it, as torch sees them.
//
// A program is uint8 [1 + 2 * phases, PHASE_BYTES] in host memory: the `Program`, the phases, and
// room for the list of weights. A copy of it is on the device. Recording a phase says whether the
// step kernel covers it.
#include <cstring>

#include "arguments.h"
#include "grid.cuh"
#include "peers.h"
#include "step.h"

namespace lmi {
namespace {

constexpr int CYCLES = 2;  // of a GPU in a nanosecond, at most

bool is_place(const Tensor& phase) {
  return phase.is_cpu() && phase.scalar_type() == ScalarType::Byte && phase.is_contiguous() &&
         phase.numel() == PHASE_BYTES;
}

template <typename Params>
bool put_phase(const Tensor& to, Work work, Params Phase::* member, const Params& params,
               bool barrier) {
  if (!is_place(to)) return false;
  Phase phase;
  phase.work = work;
  phase.barrier = barrier;
  phase.*member = params;
  std::memcpy(to.data_ptr(), &phase, PHASE_BYTES);
  return true;
}

bool record_norm(Tensor x, Tensor weight, Maybe bias, double eps, Tensor out, bool barrier,
                 Tensor phase) {
  const auto p = norm_params(x, weight, bias, eps, out);
  return p && put_phase(phase, Work::norm, &Phase::norm, *p, barrier);
}

// See LinearParams::norm_terms.
bool are_terms(const Maybe& terms, const LinearParams& p) {
  if (!terms) return true;
  return p.rows > MOST_STAGED_ROWS && p.norm_weight.data && !p.norm_bias.data && !p.bias.data &&
         is_float32(terms) && is_dense(*terms) && terms->numel() == 2 * p.weights.outputs;
}

bool record_linear(Tensor x, Tensor weight, Maybe scale, Maybe bias, Maybe norm_weight,
                   Maybe norm_bias, Maybe norm_terms, double eps, Maybe residual,
                   int64_t activation, bool gated, Tensor work, Tensor counters, Tensor out,
                   bool barrier, Tensor phase) {
  auto p = linear_params(x, weight, scale, bias, norm_weight, norm_bias, eps, residual, activation,
                         gated, work, counters, out);
  if (!p || !are_terms(norm_terms, *p)) return false;
  p->norm_terms = static_cast<const float2*>(norm_terms ? norm_terms->data_ptr() : nullptr);
  const bool planned = p->rows <= MOST_STEP_ROWS &&
                       plan_linear(*p, computed_in(x, weight, norm_weight), device_of(x),
                                   work.numel(), counters.numel());
  return planned && put_phase(phase, Work::linear, &Phase::linear, ProductParams{*p, {}}, barrier);
}

// The sum over ranks of what `product`, the phase before, has been recorded to find.
bool record_sum(Tensor product, Tensor x, Tensor residual, Maybe bias, Tensor out, bool barrier,
                Tensor phase) {
  if (!is_place(product)) return false;
  Phase made;
  std::memcpy(&made, product.data_ptr(), PHASE_BYTES);
  if (made.work != Work::linear || made.sum) return false;
  const LinearParams& p = made.linear;
  const int64_t features = p.weights.outputs, words = p.rows * features;
  if (p.out != x.data_ptr() || p.weights.gated || p.activation != Activation::none ||
      p.bias.data || p.rows > MOST_STAGED_ROWS || words > MOST_STEP_WORDS || !is_float(residual) ||
      !residual.is_contiguous() || residual.numel() != words ||
      !is_vector(bias, features) || !is_float(out) || !out.is_contiguous() || out.numel() != words) {
    return false;
  }
  const SumParams sum{.residual = operand(residual),
                      .bias = operand(bias),
                      .out = out.data_ptr(),
                      .out_type = *type_of(out),
                      .features = static_cast<int>(features),
                      .words = static_cast<int>(words)};
  if (!put_phase(phase, Work::sum, &Phase::sum_params, sum, barrier)) return false;
  made.sum = 1;  // that it is one of them: plan_program numbers them
  std::memcpy(product.data_ptr(), &made, PHASE_BYTES);
  return true;
}

bool record_attention(Tensor q, Tensor k, Tensor v, Tensor table, Tensor lengths, bool write,
                      int64_t heads, Maybe q_norm, Maybe k_norm, double eps, Maybe cos, Maybe sin,
                      Maybe bias, Maybe slopes, int64_t window, double scale, int64_t splits,
                      Tensor work, Tensor counters, Tensor out, bool barrier, Tensor phase) {
  auto p = attention_params(q, k, v, table, lengths, write, heads, q_norm, k_norm, eps, cos, sin,
                            bias, slopes, window, scale, splits, work, counters, out);
  if (!p) return false;
  arrange(*p, STEP_HEADS);
  return put_phase(phase, Work::attention, &Phase::attention, *p, barrier);
}

bool is_program(const Tensor& program) {
  return program.is_cpu() && program.scalar_type() == ScalarType::Byte &&
         program.is_contiguous() && program.dim() == 2 && program.size(1) == PHASE_BYTES &&
         program.size(0) > 1 && program.size(0) % 2 == 1;
}

// How many phases were recorded into a program: their list has room for as many.
int recorded(const Tensor& program) { return static_cast<int>(program.size(0)) / 2; }

// `x`: what the program begins with, [rows, features]; `ranks`: how many run it together.
bool finish_program(Tensor program, Tensor x, Tensor weight, int64_t ranks) {
  if (!is_program(program) || !is_float(x) || !type_of(weight)) return false;
  Program made{.type = *type_of(x),
               .weight_type = *type_of(weight),
               .rows = static_cast<int>(x.size(0)),
               .phases = recorded(program),
               .products = 0,
               .sums = 0,
               .words = 0,
               .hands = 0,
               .handed = 0,
               .slots = 0,
               .products_at = 0,
               .shared_bytes = 0};
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  char* bytes = static_cast<char*>(program.data_ptr());
  auto* phases = reinterpret_cast<Phase*>(bytes + PHASE_BYTES);
  auto* weights = reinterpret_cast<Weights*>(phases + made.phases);
  if (!plan_program(made, phases, weights, static_cast<int>(ranks), device_of(x))) return false;
  std::memcpy(bytes, &made, sizeof(made));
  return true;
}

void run(const Tensor& program, const Tensor& on_device, const Tensor& barrier,
         const StepPeers& peers) {
  const torch::stable::accelerator::DeviceGuard guard(on_device.get_device_index());
  Program made;
  std::memcpy(&made, program.data_ptr(), sizeof(made));
  const char* bytes = static_cast<const char*>(on_device.data_ptr());
  const auto* phases = reinterpret_cast<const Phase*>(bytes + PHASE_BYTES);
  const StepParams p{.phases = phases,
                     .weights = reinterpret_cast<const Weights*>(phases + recorded(program)),
                     .count = made.phases,
                     .products = made.products,
                     .slots = made.slots,
                     .products_at = made.products_at,
                     .barrier = static_cast<unsigned*>(barrier.data_ptr()),
                     .sums = made.sums,
                     .words = made.words,
                     .hands = made.hands,
                     .handed = made.handed,
                     // Some blocks wait for peers before they come to a barrier.
                     .barrier_patience =
                         BARRIER_PATIENCE + CYCLES * static_cast<long long>(peers.patience),
                     .peers = peers};
  const Device& gpu = device_of(on_device);
  const cudaStream_t stream = stream_of(on_device);
  switch (made.type) {
    case Type::float16: return step_float16(made, p, gpu, stream);
    case Type::bfloat16: return step_bfloat16(made, p, gpu, stream);
    default: return step_float32(made, p, gpu, stream);
  }
}

// `barrier`: int32 [1], zero at first, one for each stream. A program with sums exchanges nothing.
void run_program(Tensor program, Tensor on_device, Tensor barrier) {
  run(program, on_device, barrier, StepPeers{});
}

// The same with `inboxes`, `rank`, `patience` and `failed` as all_reduce has them.
void run_program_of_ranks(Tensor program, Tensor on_device, Tensor barrier, Tensor inboxes,
                          int64_t rank, int64_t patience, Tensor failed) {
  const auto given = peers_of(inboxes, rank, patience, failed);
  if (!given) throw std::runtime_error("inboxes: int64 [ranks] on the CPU of 2 to 8 ranks is wanted");
  StepPeers peers{.rank = given->rank,
                  .ranks = given->ranks,
                  .patience = given->patience,
                  .failed = given->failed,
                  .own = &given->own->step,
                  .inboxes = {}};
  for (int r = 0; r < given->ranks; ++r) peers.inboxes[r] = &given->inboxes[r]->step;
  run(program, on_device, barrier, peers);
}

}  // namespace
}  // namespace lmi

STABLE_TORCH_LIBRARY_FRAGMENT(lmi_multi, m) {
  m.def(
      "record_norm(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor out, bool barrier, "
      "Tensor(a!) phase) -> bool");
  m.def(
      "record_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor? norm_terms, float eps, Tensor? residual, int activation, bool gated, "
      "Tensor work, Tensor counters, Tensor out, bool barrier, Tensor(a!) phase) -> bool");
  m.def(
      "record_sum(Tensor(a!) product, Tensor x, Tensor residual, Tensor? bias, Tensor out, "
      "bool barrier, Tensor(b!) phase) -> bool");
  m.def(
      "record_attention(Tensor q, Tensor k, Tensor v, Tensor table, Tensor lengths, bool write, "
      "int heads, Tensor? q_norm, Tensor? k_norm, float eps, Tensor? cos, Tensor? sin, "
      "Tensor? bias, Tensor? slopes, int window, float scale, int splits, Tensor work, "
      "Tensor counters, Tensor out, bool barrier, Tensor(a!) phase) -> bool");
  m.def("finish_program(Tensor(a!) program, Tensor x, Tensor weight, int ranks) -> bool");
  m.def("run_program(Tensor program, Tensor on_device, Tensor(a!) barrier) -> ()");
  m.def(
      "run_program_of_ranks(Tensor program, Tensor on_device, Tensor(a!) barrier, Tensor inboxes, "
      "int rank, int patience, Tensor(b!) failed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lmi_multi, CUDA, m) {
  m.impl("record_norm", TORCH_BOX(&lmi::record_norm));
  m.impl("record_linear", TORCH_BOX(&lmi::record_linear));
  m.impl("record_sum", TORCH_BOX(&lmi::record_sum));
  m.impl("record_attention", TORCH_BOX(&lmi::record_attention));
  m.impl("finish_program", TORCH_BOX(&lmi::finish_program));
  m.impl("run_program", TORCH_BOX(&lmi::run_program));
  m.impl("run_program_of_ranks", TORCH_BOX(&lmi::run_program_of_ranks));
}
