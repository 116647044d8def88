// The operations of a prefill as torch sees them; false as in library.cu.
#include "lay_out.h"
#include "prefill.h"
#include "tensors.h"
#include "write_kv.h"

namespace lmi {
namespace {

bool is_half(const Tensor& tensor) {
  return is_of(tensor, Type::float16) || is_of(tensor, Type::bfloat16);
}

bool is_int32(const Maybe& tensor) {
  return !tensor || (tensor->scalar_type() == ScalarType::Int && tensor->is_contiguous());
}

bool is_like(const Tensor& tensor, const Tensor& other) {
  return tensor.scalar_type() == other.scalar_type() && is_dense(tensor);
}

// [blocks, block_size, kv_heads, dim] with blocks that are a power of two long.
bool is_cache(const Maybe& pool, const Tensor& like, int64_t kv_heads, int64_t dim) {
  return pool && is_like(*pool, like) && pool->dim() == 4 && pool->size(2) == kv_heads &&
         pool->size(3) == dim && !(pool->size(1) & (pool->size(1) - 1));
}

int shift_of(int64_t block) {
  int shift = 0;
  while (1 << shift < block) ++shift;
  return shift;
}

// Tokens' queries, keys and values, all of them packed in one tensor.
struct Packed {
  int64_t heads, kv_heads, dim;

  int64_t width() const { return (heads + 2 * kv_heads) * dim; }
  void* part(const Tensor& of, int64_t first) const {
    return static_cast<char*>(of.data_ptr()) + first * dim * 2;
  }
};

bool run_lay_out(Tensor starts, Tensor lengths, Tensor reached, Tensor table, int64_t block_size,
                 Tensor positions, Tensor reach, Tensor slots) {
  const int64_t tokens = positions.numel(), rows = lengths.numel();
  if (!tokens || !rows || block_size < 1 || !is_row(starts, ScalarType::Int, rows + 1) ||
      !is_row(lengths, ScalarType::Int, rows) || !is_row(reached, ScalarType::Int, rows) ||
      table.dim() != 2 || !is_row(table, ScalarType::Int, rows * table.size(1)) ||
      !is_row(positions, ScalarType::Int, tokens) || !is_row(reach, ScalarType::Int, tokens) ||
      !is_row(slots, ScalarType::Int, tokens)) {
    return false;
  }
  const torch::stable::accelerator::DeviceGuard guard(starts.get_device_index());
  const LayOutParams p{.starts = pointer<const int>(starts),
                       .lengths = pointer<const int>(lengths),
                       .reached = pointer<const int>(reached),
                       .table = pointer<const int>(table),
                       .positions = pointer<int>(positions),
                       .reach = pointer<int>(reach),
                       .slots = pointer<int>(slots),
                       .tokens = static_cast<int>(tokens),
                       .rows = static_cast<int>(rows),
                       .width = static_cast<int>(table.size(1)),
                       .block_size = static_cast<int>(block_size)};
  lay_out(p, stream_of(starts));
  return true;
}

bool run_write_kv(Tensor kv, Tensor k, Tensor v, Tensor slots) {
  const int64_t kv_heads = k.size(2), dim = k.size(3), tokens = slots.numel();
  if (!is_float(kv) || !is_dense(kv) || dim % 8 || dim > MOST_PREFILL_DIM || !tokens ||
      kv.numel() != tokens * 2 * kv_heads * dim || !is_cache(k, kv, kv_heads, dim) ||
      !is_cache(v, kv, kv_heads, dim) || !is_row(slots, ScalarType::Int, tokens)) {
    return false;
  }
  const torch::stable::accelerator::DeviceGuard guard(kv.get_device_index());
  const WriteKvParams p{.qkv = kv.data_ptr(),
                             .k = k.data_ptr(),
                             .v = v.data_ptr(),
                             .slots = pointer<int>(slots),
                             .q_norm = {},
                             .k_norm = {},
                             .cos = nullptr,
                             .sin = nullptr,
                             .eps = 0,
                             .type = *type_of(kv),
                             .tokens = tokens,
                             .heads = 0,
                             .kv_heads = static_cast<int>(kv_heads),
                             .dim = static_cast<int>(dim),
                             .pairs = 0};
  write_kv(p, device_of(kv), stream_of(kv));
  return true;
}

// Self-attention if `slots` or no cache is given: q is packed qkv, whose keys and values are stored
// in the cache or, without one, attended to where they are. Else q are queries alone. `many`: keys,
// so many that Hopper's own kernel is worth its start.
bool run_prefill(Tensor q, Maybe k, Maybe v, Maybe slots, Maybe table, Tensor starts,
                 Tensor lengths, Tensor tiles, int64_t queries, bool many, int64_t heads,
                 int64_t kv_heads, Maybe q_norm, Maybe k_norm, double eps, Maybe cos, Maybe sin,
                 Maybe bias, Maybe slopes, bool causal, int64_t window, double scale, Tensor out) {
  const int64_t rows = lengths.numel(), count = tiles.numel() / 2;
  const int64_t dim = heads ? out.size(-1) / heads : 0;
  const int64_t tokens = dim ? out.numel() / (heads * dim) : 0;
  const bool paged = k.has_value(), own = !paged || slots.has_value();
  const Packed packed{heads, kv_heads, dim};
  const int64_t stride = own ? packed.width() : heads * dim;
  if (!is_half(q) || !is_dense(q) || !tokens || dim % 8 || dim > MOST_PREFILL_DIM ||
      out.size(-1) != heads * dim || !is_like(out, q) || q.numel() != tokens * stride ||
      !kv_heads || heads % kv_heads || paged != table.has_value() || paged != v.has_value() ||
      (slots && !(paged && is_row(*slots, ScalarType::Int, tokens))) || !is_int32(table) ||
      !is_row(starts, ScalarType::Int, rows + 1) || !is_int32(lengths) || !is_int32(tiles) ||
      !count || count > 65535 || !is_vector(q_norm, dim) || !is_vector(k_norm, dim) ||
      !is_float32(cos) || !is_float32(sin) || !is_float32(bias) || !is_float32(slopes) ||
      (cos && (!sin || !is_dense(*cos) || !is_dense(*sin) || cos->size(0) != tokens)) ||
      (bias && bias->size(0) != heads) || (slopes && slopes->numel() != heads) ||
      (paged && !(is_cache(k, q, kv_heads, dim) && is_cache(v, q, kv_heads, dim) && k->size(0)))) {
    return false;
  }
  const int distances = bias ? static_cast<int>(bias->size(1)) : 0;
  const PrefillParams p{
      .q = q.data_ptr(),
      .k = paged ? k->data_ptr() : packed.part(q, heads),
      .v = paged ? v->data_ptr() : packed.part(q, heads + kv_heads),
      .q_stride = stride,
      .kv_stride = paged ? kv_heads * dim : stride,
      .kv_tokens = paged ? k->size(0) * k->size(1) : tokens,
      .table = pointer<const int>(table),
      .starts = pointer<const int>(starts),
      .lengths = pointer<const int>(lengths),
      .tiles = pointer<const int>(tiles),
      .bias = pointer<const float>(bias),
      .slopes = pointer<const float>(slopes),
      .out = out.data_ptr(),
      .scale = static_cast<float>(scale),
      .count = static_cast<int>(count),
      .queries = static_cast<int>(queries),
      .center = causal ? 0 : (distances - 1) / 2,
      .heads = static_cast<int>(heads),
      .kv_heads = static_cast<int>(kv_heads),
      .dim = static_cast<int>(dim),
      .distances = distances,
      .window = static_cast<int>(window),
      .table_width = paged ? static_cast<int>(table->size(1)) : 0,
      .block_shift = paged ? shift_of(k->size(1)) : 0,
      .causal = causal};
  const Device& gpu = device_of(q);
  const int shared = many ? prefill_long_shared(p) : prefill_shared(p);
  if (!shared || shared > gpu.shared_per_block || (many && !gpu.hopper)) return false;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  if (own) {
    const WriteKvParams write{.qkv = q.data_ptr(),
                                   .k = paged ? k->data_ptr() : nullptr,
                                   .v = paged ? v->data_ptr() : nullptr,
                                   .slots = pointer<const int>(slots),
                                   .q_norm = operand(q_norm),
                                   .k_norm = operand(k_norm),
                                   .cos = pointer<const float>(cos),
                                   .sin = pointer<const float>(sin),
                                   .eps = static_cast<float>(eps),
                                   .type = *type_of(q),
                                   .tokens = tokens,
                                   .heads = p.heads,
                                   .kv_heads = p.kv_heads,
                                   .dim = p.dim,
                                   .pairs = cos ? static_cast<int>(cos->size(1)) : 0};
    write_kv(write, gpu, stream_of(q));
  }
  const bool half = is_of(q, Type::float16);
  const auto plain = half ? prefill_float16 : prefill_bfloat16;
  const auto run = many ? (half ? prefill_long_float16 : prefill_long_bfloat16) : plain;
  run(p, gpu, stream_of(q));
  return true;
}

}  // namespace
}  // namespace lmi

STABLE_TORCH_LIBRARY_FRAGMENT(lmi_multi, m) {
  m.def(
      "lay_out(Tensor starts, Tensor lengths, Tensor reached, Tensor table, int block_size, "
      "Tensor(a!) positions, Tensor(b!) reach, Tensor(c!) slots) -> bool");
  m.def("write_kv(Tensor kv, Tensor(a!) k, Tensor(b!) v, Tensor slots) -> bool");
  m.def(
      "prefill(Tensor(a!) q, Tensor(b!)? k, Tensor(c!)? v, Tensor? slots, Tensor? table, "
      "Tensor starts, Tensor lengths, Tensor tiles, int queries, bool many, int heads, int kv_heads, "
      "Tensor? q_norm, Tensor? k_norm, float eps, Tensor? cos, Tensor? sin, Tensor? bias, "
      "Tensor? slopes, bool causal, int window, float scale, Tensor(d!) out) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lmi_multi, CUDA, m) {
  m.impl("lay_out", TORCH_BOX(&lmi::run_lay_out));
  m.impl("write_kv", TORCH_BOX(&lmi::run_write_kv));
  m.impl("prefill", TORCH_BOX(&lmi::run_prefill));
}
