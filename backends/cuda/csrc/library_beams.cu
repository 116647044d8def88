// How searches go on, as torch sees it; false as in library.cu.
#include "beams.h"
#include "tensors.h"

namespace lmi {
namespace {

bool is_table_of(const Tensor& tensor, int64_t rows, int64_t columns) {
  return tensor.dim() == 2 && tensor.scalar_type() == ScalarType::Int && tensor.is_contiguous() &&
         tensor.is_cuda() && tensor.size(0) == rows && tensor.size(1) == columns;
}

// `found`: int32 [2, searches * record or more], on the device or in pinned memory. See beams.h.
bool run_beams(Tensor logits, int64_t width, int64_t keep, Tensor own, Tensor stops, Tensor live,
               Tensor found, Tensor scores, Tensor ids, Tensor lengths, Tensor turns, Tensor table,
               Tensor copies, int64_t block_size, Tensor work, Tensor counters) {
  if (logits.dim() != 2 || table.dim() != 2 || found.dim() != 2) return false;
  const int64_t rows = logits.size(0), vocab = logits.size(1), columns = table.size(1);
  if (width < 1 || width > MOST_BEAMS || keep < 1 || keep > MOST_KEPT || block_size < 1 || !rows ||
      !vocab || rows % width || rows > 65535 || vocab * width > 1LL << 30 || !is_float(logits) ||
      !logits.is_cuda() || logits.stride(1) != 1 || !is_table_of(own, rows, columns) ||
      !is_table_of(table, rows, columns) || !is_table_of(stops, rows, MOST_STOPS) ||
      !is_table_of(copies, rows, 2) || !is_row(live, ScalarType::Int, rows) ||
      !is_row(scores, ScalarType::Float, rows) || !is_row(ids, ScalarType::Long, rows) ||
      !is_row(lengths, ScalarType::Int, rows) || !is_row(turns, ScalarType::Int, rows) ||
      found.scalar_type() != ScalarType::Int || !found.is_contiguous() || found.size(0) != 2 ||
      rows / width > counters.numel() || rows * BEAM_LISTS * (2 * keep + 1) > work.numel()) {
    return false;
  }
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const BeamParams p{.logits = operand(logits),
                     .found = static_cast<int*>(found.data_ptr()),
                     .scores = static_cast<float*>(scores.data_ptr()),
                     .ids = static_cast<int64_t*>(ids.data_ptr()),
                     .lengths = static_cast<int*>(lengths.data_ptr()),
                     .turns = static_cast<int*>(turns.data_ptr()),
                     .table = static_cast<int*>(table.data_ptr()),
                     .copies = static_cast<int*>(copies.data_ptr()),
                     .live = static_cast<const int*>(live.data_ptr()),
                     .own = static_cast<const int*>(own.data_ptr()),
                     .stops = static_cast<const int*>(stops.data_ptr()),
                     .work = static_cast<unsigned long long*>(work.data_ptr()),
                     .counters = static_cast<int*>(counters.data_ptr()),
                     .stride = logits.stride(0),
                     .found_stride = found.size(1),
                     .searches = static_cast<int>(rows / width),
                     .width = static_cast<int>(width),
                     .keep = static_cast<int>(keep),
                     .vocab = static_cast<int>(vocab),
                     .table_width = static_cast<int>(columns),
                     .block_size = static_cast<int>(block_size)};
  if (int64_t{1} * p.searches * p.record() > found.size(1)) return false;
  beams(p, device_of(logits), stream_of(logits));
  return true;
}

// `cache`: [layers, 2, blocks, ...]; `pairs`: int32 [count, 2].
bool run_copy_blocks(Tensor cache, Tensor pairs) {
  if (cache.dim() < 4 || !is_float(cache) || !is_dense(cache) || !cache.numel()) return false;
  const int64_t pools = cache.size(0) * cache.size(1), blocks = cache.size(2);
  const int64_t item = is_of(cache, Type::float32) ? 4 : 2;
  const int64_t bytes = cache.numel() / (pools * blocks) * item;
  if (bytes % 16 || bytes > 1LL << 30 || pools > 65535 || !pairs.size(0) ||
      !is_table_of(pairs, pairs.size(0), 2)) {
    return false;
  }
  const torch::stable::accelerator::DeviceGuard guard(cache.get_device_index());
  const CopyBlocksParams p{.cache = static_cast<char*>(cache.data_ptr()),
                           .pairs = static_cast<const int*>(pairs.data_ptr()),
                           .bytes = bytes,
                           .blocks = blocks,
                           .pools = static_cast<int>(pools),
                           .count = static_cast<int>(pairs.size(0))};
  copy_blocks(p, device_of(cache), stream_of(cache));
  return true;
}

}  // namespace
}  // namespace lmi

STABLE_TORCH_LIBRARY_FRAGMENT(lmi_multi, m) {
  m.def(
      "beams(Tensor logits, int width, int keep, Tensor own, Tensor stops, Tensor live, "
      "Tensor(a!) found, Tensor(b!) scores, Tensor(c!) ids, Tensor(d!) lengths, Tensor(e!) turns, "
      "Tensor(f!) table, Tensor(g!) copies, int block_size, Tensor(h!) work, Tensor(i!) counters) "
      "-> bool");
  m.def("copy_blocks(Tensor(a!) cache, Tensor pairs) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lmi_multi, CUDA, m) {
  m.impl("beams", TORCH_BOX(&lmi::run_beams));
  m.impl("copy_blocks", TORCH_BOX(&lmi::run_copy_blocks));
}
