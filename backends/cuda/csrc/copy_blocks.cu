// Blocks of the cache copied in all pools at once: where beams of a search part.
#include "beams.h"

namespace lmi {
namespace {

constexpr int THREADS = 256, AT_ONCE = 4;
constexpr int CHUNK = THREADS * AT_ONCE * 16;  // bytes

__device__ void copy_chunk(const char* from, char* to, int64_t bytes) {
  uint4 raw[AT_ONCE];
#pragma unroll
  for (int n = 0; n < AT_ONCE; ++n) {
    const int64_t at = (n * THREADS + threadIdx.x) * 16;
    if (at < bytes) raw[n] = *reinterpret_cast<const uint4*>(from + at);
  }
#pragma unroll
  for (int n = 0; n < AT_ONCE; ++n) {
    const int64_t at = (n * THREADS + threadIdx.x) * 16;
    if (at < bytes) *reinterpret_cast<uint4*>(to + at) = raw[n];
  }
}

// A graph of the step before wrote the pairs, and one of the next step reads what is copied: this
// neither starts early nor lets others.
__global__ void __launch_bounds__(THREADS) copy_blocks_kernel(const CopyBlocksParams p) {
  const int chunks = static_cast<int>((p.bytes + CHUNK - 1) / CHUNK);
  const int items = p.pools * chunks;
  for (int pair = blockIdx.y; pair < p.count; pair += gridDim.y) {
    const int from = p.pairs[2 * pair], to = p.pairs[2 * pair + 1];
    if (from < 0 || to < 0) continue;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      char* pool = p.cache + item / chunks * p.blocks * p.bytes;
      const int64_t at = static_cast<int64_t>(item % chunks) * CHUNK;
      copy_chunk(pool + from * p.bytes + at, pool + to * p.bytes + at, p.bytes - at);
    }
  }
}

}  // namespace

void copy_blocks(const CopyBlocksParams& p, const Device& gpu, cudaStream_t stream) {
  const int64_t items = p.pools * ((p.bytes + CHUNK - 1) / CHUNK);
  // Many pairs are none: with a block for each of their chunks starting blocks would take longest.
  const int wide = static_cast<int>(std::min<int64_t>(items, gpu.processors));
  const dim3 grid(wide, std::min(p.count, 1024));
  launch(&copy_blocks_kernel, p, grid, THREADS, 0, Start::after_last, stream);
}

}  // namespace lmi
