// The likeliest tokens as torch sees them; false as in library.cu.
#include "greedy.h"
#include "peers.h"
#include "tensors.h"

namespace lmi {
namespace {

// `drawn`: int64 [2, rows or more], on the device or in pinned memory. Of an empty vocabulary nothing is
// usable. See greedy.h.
bool choose(const Tensor& logits, int64_t first, const Peers& peers, const Tensor& drawn,
            const Tensor& ids, const Tensor& lengths, const Tensor& live, const Tensor& turns,
            const Tensor& work, const Tensor& counters) {
  if (logits.dim() != 2 || drawn.dim() != 2) return false;
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  if (!is_float(logits) || !logits.is_cuda() || !rows || logits.stride(1) != 1 ||
      drawn.scalar_type() != ScalarType::Long || !drawn.is_contiguous() || drawn.size(0) != 2 ||
      drawn.size(1) < rows || !is_row(ids, ScalarType::Long, rows) ||
      !is_row(lengths, ScalarType::Int, rows) || !is_row(live, ScalarType::Int, rows) ||
      !is_row(turns, ScalarType::Int, rows) || rows > counters.numel() || rows > 65535 ||
      first < 0 || first + vocab > 1LL << 30 || 2 * rows * GREEDY_PARTS > work.numel()) {
    return false;
  }
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const GreedyParams p{.logits = operand(logits),
                       .drawn = static_cast<int64_t*>(drawn.data_ptr()),
                       .ids = static_cast<int64_t*>(ids.data_ptr()),
                       .lengths = static_cast<int*>(lengths.data_ptr()),
                       .turns = static_cast<int*>(turns.data_ptr()),
                       .live = static_cast<const int*>(live.data_ptr()),
                       .work = static_cast<unsigned long long*>(work.data_ptr()),
                       .counters = static_cast<int*>(counters.data_ptr()),
                       .stride = logits.stride(0),
                       .drawn_stride = drawn.size(1),
                       .rows = static_cast<int>(rows),
                       .vocab = static_cast<int>(vocab),
                       .first = static_cast<int>(first),
                       .peers = peers};
  greedy(p, device_of(logits), stream_of(logits));
  return true;
}

bool run_greedy(Tensor logits, Tensor drawn, Tensor ids, Tensor lengths, Tensor live, Tensor turns,
                Tensor work, Tensor counters) {
  return choose(logits, 0, {}, drawn, ids, lengths, live, turns, work, counters);
}

// The same of ranks that have neighbouring parts of the vocabulary: `logits` [rows, own part], which
// begins with id `first`. All ranks call it together.
bool run_greedy_of_ranks(Tensor logits, int64_t first, Tensor inboxes, int64_t rank,
                         int64_t patience, Tensor failed, Tensor drawn, Tensor ids, Tensor lengths,
                         Tensor live, Tensor turns, Tensor work, Tensor counters) {
  const auto peers = peers_of(inboxes, rank, patience, failed);
  if (!peers || logits.dim() != 2 || logits.size(0) > MOST_CHOSEN_ROWS) return false;
  return choose(logits, first, *peers, drawn, ids, lengths, live, turns, work, counters);
}

}  // namespace
}  // namespace lmi

STABLE_TORCH_LIBRARY_FRAGMENT(lmi_multi, m) {
  m.def(
      "greedy(Tensor logits, Tensor(a!) drawn, Tensor(b!) ids, Tensor(c!) lengths, Tensor live, "
      "Tensor(d!) turns, Tensor(e!) work, Tensor(f!) counters) -> bool");
  m.def(
      "greedy_of_ranks(Tensor logits, int first, Tensor inboxes, int rank, int patience, "
      "Tensor(a!) failed, Tensor(b!) drawn, Tensor(c!) ids, Tensor(d!) lengths, Tensor live, "
      "Tensor(e!) turns, Tensor(f!) work, Tensor(g!) counters) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lmi_multi, CUDA, m) {
  m.impl("greedy", TORCH_BOX(&lmi::run_greedy));
  m.impl("greedy_of_ranks", TORCH_BOX(&lmi::run_greedy_of_ranks));
}
