// The likeliest token of every row, and what a step leaves for the next.
#include "greedy.h"

namespace lmi {
namespace {

constexpr int THREADS = 256;

// Larger logits have larger keys, NaN the largest. Keys of one float order as integers do once
// negative ones are turned over.
__device__ inline uint32_t key_of(float x) {
  if (x != x) return ~0u;
  const uint32_t bits = __float_as_uint(x == 0 ? 0.0f : x);  // -0 ties with 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline bool is_usable(uint32_t key) {
  return key < key_of(INFINITY) && key > key_of(-INFINITY);
}

__device__ inline unsigned long long larger(unsigned long long a, unsigned long long b) {
  return a > b ? a : b;
}

__device__ inline unsigned long long largest_in_block(unsigned long long own) {
  __shared__ unsigned long long of_warp[THREADS / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    own = larger(own, __shfl_xor_sync(~0u, own, offset));
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = own;
  __syncthreads();
  own = of_warp[0];
#pragma unroll
  for (int w = 1; w < THREADS / 32; ++w) own = larger(own, of_warp[w]);
  return own;
}

template <typename T>
__global__ void __launch_bounds__(THREADS) greedy_kernel(const GreedyParams p) {
  let_next_start();
  wait_for_last();
  const int row = blockIdx.y;
  const T* logits = static_cast<const T*>(p.logits.data) + static_cast<int64_t>(row) * p.vocab;
  unsigned long long best = 0;
#pragma unroll 8
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < p.vocab; i += GREEDY_PARTS * THREADS) {
    // Of equal logits the lowest id wins.
    const auto key = static_cast<unsigned long long>(key_of(widen(logits[i])));
    best = larger(best, key << 32 | ~static_cast<uint32_t>(i));
  }
  best = largest_in_block(best);
  unsigned long long* work = p.work + row * GREEDY_PARTS;
  if (threadIdx.x == 0) work[blockIdx.x] = best;
  if (!is_last_part(Team::whole_block(), p.counters + row, GREEDY_PARTS) || threadIdx.x > 0) return;
  for (int i = 0; i < GREEDY_PARTS; ++i) best = larger(best, __ldcg(work + i));
  const bool usable = is_usable(static_cast<uint32_t>(best >> 32));
  const auto token = static_cast<int64_t>(~static_cast<uint32_t>(best));
  p.drawn[row] = usable ? token : -1;
  p.ids[row] = usable ? token : 0;
  p.lengths[row] += p.live[row];
}

template <typename T>
void launch_greedy(const GreedyParams& p, const Device& gpu, cudaStream_t stream) {
  launch(&greedy_kernel<T>, p, dim3(GREEDY_PARTS, p.rows), THREADS, 0, early(gpu), stream);
}

}  // namespace

void greedy(const GreedyParams& p, const Device& gpu, cudaStream_t stream) {
  switch (p.logits.type) {
    case Type::float16: return launch_greedy<__half>(p, gpu, stream);
    case Type::bfloat16: return launch_greedy<__nv_bfloat16>(p, gpu, stream);
    default: return launch_greedy<float>(p, gpu, stream);
  }
}

}  // namespace lmi
