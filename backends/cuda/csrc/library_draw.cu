// Tokens drawn by their rows' options, as torch sees it; false as in library.cu.
#include "draw.h"
#include "tensors.h"

namespace lmi {
namespace {

bool is_table(const Tensor& tensor, ScalarType type, int64_t rows) {
  return tensor.dim() == 2 && tensor.scalar_type() == type && tensor.is_contiguous() && tensor.size(0) >= rows;
}

// All have a place for each row or more; `options` uint8 [rows, sizeof(DrawOptions)], `drawn` int64 [2, most]
// and `logprobs` int32 [2, most, 1 + 2 * MOST_LOGPROBS], on the device or in pinned memory. See draw.h.
bool run_draw(Tensor logits, Tensor options, Tensor uniform, Tensor lists, Tensor history, Tensor table,
              Tensor cross_table, Tensor cross_lengths, Tensor drawn, Tensor logprobs, Tensor ids,
              Tensor lengths, Tensor live, Tensor turns, Tensor teams) {
  if (logits.dim() != 2 || drawn.dim() != 2 || logprobs.dim() != 3) return false;
  const int64_t rows = logits.size(0), vocab = logits.size(1), most = drawn.size(1);
  if (!is_float(logits) || !logits.is_cuda() || !rows || rows > 65535 || !vocab || logits.stride(1) != 1 ||
      vocab > MOST_DRAWN_VOCAB || !is_table(options, ScalarType::Byte, rows) ||
      options.size(1) != static_cast<int64_t>(sizeof(DrawOptions)) || !is_row(uniform, ScalarType::Float, rows) ||
      lists.scalar_type() != ScalarType::Int || !lists.is_contiguous() ||
      !is_table(history, ScalarType::Int, 0) || !is_table(table, ScalarType::Int, rows) ||
      !is_table(cross_table, ScalarType::Int, rows) || !is_row(cross_lengths, ScalarType::Int, rows) ||
      !is_table(drawn, ScalarType::Long, 2) || most < rows || logprobs.scalar_type() != ScalarType::Int ||
      !logprobs.is_contiguous() || logprobs.size(1) != most || logprobs.size(2) != 1 + 2 * MOST_LOGPROBS ||
      !is_row(ids, ScalarType::Long, rows) || !is_row(lengths, ScalarType::Int, rows) ||
      !is_row(live, ScalarType::Int, rows) || !is_row(turns, ScalarType::Int, rows) ||
      teams.scalar_type() != ScalarType::Byte || teams.numel() < MOST_DRAW_TEAMS * DRAW_TEAM_BYTES) {
    return false;
  }
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const auto ints = [](const Tensor& t) { return static_cast<int*>(t.data_ptr()); };
  const DrawParams p{.logits = operand(logits),
                     .options = static_cast<const DrawOptions*>(options.data_ptr()),
                     .uniform = static_cast<const float*>(uniform.data_ptr()),
                     .lists = ints(lists),
                     .history = {.tokens = ints(history),
                                 .table = ints(table),
                                 .cross_table = ints(cross_table),
                                 .cross_lengths = ints(cross_lengths),
                                 .block_size = static_cast<int>(history.size(1)),
                                 .width = static_cast<int>(table.size(1)),
                                 .cross_width = static_cast<int>(cross_table.size(1))},
                     .drawn = static_cast<int64_t*>(drawn.data_ptr()),
                     .logprobs = ints(logprobs),
                     .ids = static_cast<int64_t*>(ids.data_ptr()),
                     .lengths = ints(lengths),
                     .turns = ints(turns),
                     .live = ints(live),
                     .teams = teams.data_ptr(),
                     .stride = logits.stride(0),
                     .drawn_stride = most,
                     .rows = static_cast<int>(rows),
                     .vocab = static_cast<int>(vocab)};
  return draw(p, device_of(logits), stream_of(logits));
}

}  // namespace
}  // namespace lmi

STABLE_TORCH_LIBRARY_FRAGMENT(lmi_multi, m) {
  m.def(
      "draw(Tensor logits, Tensor options, Tensor uniform, Tensor lists, Tensor(a!) history, "
      "Tensor table, Tensor cross_table, Tensor cross_lengths, Tensor(b!) drawn, "
      "Tensor(c!) logprobs, Tensor(d!) ids, Tensor(e!) lengths, Tensor live, Tensor(f!) turns, "
      "Tensor(g!) teams) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lmi_multi, CUDA, m) { m.impl("draw", TORCH_BOX(&lmi::run_draw)); }
