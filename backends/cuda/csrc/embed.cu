// How a step begins: each row's embedding, and the cosines and sines of its position. A thread does
// eight features; with angles, one more block a row does these.
#include "embed.h"

namespace lmi {
namespace {

constexpr int THREADS = 256;

int blocks_of_features(int features) { return (features / 8 + THREADS - 1) / THREADS; }

// One beyond the tables is a mistake of the host's, which torch's own lookup also ends with a trap.
__device__ int64_t position_of(const EmbedParams& p, int row) {
  const int position = p.lengths[row] - 1;
  if (position < 0 || position >= p.most_positions) __trap();
  return position;
}

__device__ void look_up_angles(const EmbedParams& p, int row) {
  const int64_t from = position_of(p, row) * p.pairs, to = static_cast<int64_t>(row) * p.pairs;
  for (int i = threadIdx.x; i < p.pairs; i += THREADS) {
    p.cos[to + i] = p.cos_table[from + i];
    p.sin[to + i] = p.sin_table[from + i];
  }
}

template <typename W, typename X>
__global__ void __launch_bounds__(THREADS) embed_kernel(const EmbedParams p) {
  let_next_start();  // there is no last one: a graph begins with this
  const int row = blockIdx.y;
  if (p.pairs && blockIdx.x == gridDim.x - 1) return look_up_angles(p, row);
  const int at = static_cast<int>(blockIdx.x * THREADS + threadIdx.x) * 8;
  if (at >= p.features) return;
  const int64_t token = p.ids[row] - p.first;
  Raw<W> found;
  if (token >= 0 && token < p.count) {
    found.read(static_cast<const W*>(p.tokens.data) + token * p.features + at);
    if (p.positions.data) {
      const W* position = static_cast<const W*>(p.positions.data) + position_of(p, row) * p.features;
      float x[8], more[8];
      found.unpack(x);
      load8(position + at, more);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += more[i];
      found.pack(x);  // rounded, as the sum by itself would be
    }
  }
  X* x = static_cast<X*>(p.x) + static_cast<int64_t>(row) * p.features + at;
  if constexpr (std::is_same_v<W, X>) {
    found.write(x);
  } else {
    float wide[8];
    found.unpack(wide);
    store8(x, wide);
  }
}

template <typename W, typename X>
void launch_embed(const EmbedParams& p, cudaStream_t stream) {
  const dim3 grid(blocks_of_features(p.features) + (p.pairs ? 1 : 0), p.rows);
  launch(&embed_kernel<W, X>, p, grid, THREADS, 0, Start::after_last, stream);
}

template <typename W>
void to_type(const EmbedParams& p, cudaStream_t stream) {
  if (p.x_type == Type::float32) return launch_embed<W, float>(p, stream);
  launch_embed<W, W>(p, stream);
}

}  // namespace

void embed(const EmbedParams& p, cudaStream_t stream) {
  switch (p.tokens.type) {
    case Type::float16: return to_type<__half>(p, stream);
    case Type::bfloat16: return to_type<__nv_bfloat16>(p, stream);
    default: return launch_embed<float, float>(p, stream);
  }
}

}  // namespace lmi
