// A thread does a token, whose row it finds by halving.
#include "lay_out.h"

namespace lmi {
namespace {

constexpr int THREADS = 128;

__device__ int row_of(const LayOutParams& p, int token) {
  int first = 0, behind = p.rows;  // it is one of these
  while (behind - first > 1) {
    const int middle = (first + behind) / 2;
    (p.starts[middle] <= token ? first : behind) = middle;
  }
  return first;
}

__global__ void __launch_bounds__(THREADS) lay_out_kernel(const LayOutParams p) {
  const int token = static_cast<int>(blockIdx.x) * THREADS + static_cast<int>(threadIdx.x);
  if (token >= p.tokens) return;
  int position = 0, reach = 0, slot = -1;
  if (token < p.starts[p.rows]) {
    const int row = row_of(p, token);
    position = p.lengths[row] - (p.starts[row + 1] - token);
    reach = p.reached[row];
    const int place = position / p.block_size;
    const int block = place < p.width ? p.table[row * p.width + place] : -1;
    slot = block < 0 ? -1 : block * p.block_size + position % p.block_size;
  }
  p.positions[token] = position, p.reach[token] = reach, p.slots[token] = slot;
}

}  // namespace

void lay_out(const LayOutParams& p, cudaStream_t stream) {
  const dim3 grid((p.tokens + THREADS - 1) / THREADS);
  launch(&lay_out_kernel, p, grid, THREADS, 0, Start::after_last, stream);
}

}  // namespace lmi
