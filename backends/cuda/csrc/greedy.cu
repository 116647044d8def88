// The likeliest token of every row, and what a step leaves for the next.
#include "greedy.h"

#include "ranking.cuh"
#include "words.cuh"

namespace lmi {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int AT_ONCE = 4;  // loads of a thread under way
static_assert(WARPS <= 32 && GREEDY_PARTS <= 32, "a warp compares what warps and blocks found");

// The largest key so far, and the lowest id that has it.
struct Best {
  uint32_t key = 0, id = ~0u;

  // Ids come rising.
  __device__ void see(float logit, int at) {
    const uint32_t own = key_of(logit);
    if (own > key) key = own, id = at;
  }

  __device__ Best of_warp() const {
    const uint32_t most = __reduce_max_sync(~0u, key);
    return {most, __reduce_min_sync(~0u, key == most ? id : ~0u)};
  }

  __device__ unsigned long long packed() const {
    return static_cast<unsigned long long>(key) << 32 | id;
  }

  static __device__ Best unpacked(unsigned long long both) {
    return {static_cast<uint32_t>(both >> 32), static_cast<uint32_t>(both)};
  }
};

// A thread's share of a row: 16 bytes at a time, but for what lies before and behind whole ones.
template <typename T>
__device__ Best best_of_share(const T* logits, int vocab) {
  constexpr int EACH = 16 / sizeof(T), STRIDE = GREEDY_PARTS * THREADS;
  const int place = blockIdx.x * THREADS + threadIdx.x;
  const int skipped = static_cast<int>(-reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
  const int before = min(skipped, vocab), count = (vocab - before) / EACH;
  const int behind = before + count * EACH;
  const auto* whole = reinterpret_cast<const uint4*>(logits + before);
  Best best;
  if (place < before) best.see(widen(logits[place]), place);
#pragma unroll 1
  for (int first = place; first < count; first += AT_ONCE * STRIDE) {
    uint4 raw[AT_ONCE];
#pragma unroll
    for (int n = 0; n < AT_ONCE; ++n) {
      if (first + n * STRIDE < count) raw[n] = whole[first + n * STRIDE];
    }
#pragma unroll
    for (int n = 0; n < AT_ONCE; ++n) {
      const int from = first + n * STRIDE;
      if (from >= count) break;
      const T* values = reinterpret_cast<const T*>(&raw[n]);
#pragma unroll
      for (int i = 0; i < EACH; ++i) best.see(widen(values[i]), before + from * EACH + i);
    }
  }
  if (place < vocab - behind) best.see(widen(logits[behind + place]), behind + place);
  return best;
}

// What this rank has of a row, and one of its peers: a lane of a warp looks after each. Two sets of words,
// used in turns, as in all_reduce.cu: here turns are a row's.
__device__ Best best_of_ranks(const Peers& peers, int row, Best own) {
  const int lane = threadIdx.x % 32;
  const unsigned mark = after(peers.own->best_marks[row]);
  const unsigned long long patience = peers.own->broken ? 0 : peers.patience;
  Best found = lane == peers.rank ? own : Best();
  if (lane < peers.ranks && lane != peers.rank) {
    unsigned long long* to = peers.inboxes[lane]->best[mark & 1][peers.rank][row];
    send(to, own.key, mark), send(to + 1, own.id, mark);
    unsigned long long* from = peers.own->best[mark & 1][lane][row];
    unsigned long long key = peek(from), id = peek(from + 1), begun = now();
    while ((mark_of(key) != mark || mark_of(id) != mark) && now() - begun <= patience) {
      key = peek(from), id = peek(from + 1);
    }
    if (mark_of(key) == mark && mark_of(id) == mark) {
      found = {static_cast<uint32_t>(key), static_cast<uint32_t>(id)};
      send(from, 0, 0), send(from + 1, 0, 0);
    } else {
      peers.own->broken = 1;
      *static_cast<volatile int*>(peers.failed) = 1;
    }
  }
  found = found.of_warp();
  if (lane == 0) peers.own->best_marks[row] = mark;
  return found;
}

// What the step leaves: the token for the host and for the next step, which is one further.
__device__ void leave(const GreedyParams& p, int row, Best best) {
  const int live = p.live[row], turn = p.turns[row], length = p.lengths[row];
  const bool usable = is_usable(best.key);
  p.drawn[(turn & 1) * p.drawn_stride + row] = usable ? static_cast<int64_t>(best.id) : -1;
  p.ids[row] = usable ? best.id : 0;
  p.turns[row] = (turn + live) & 1;
  p.lengths[row] = length + live;
}

template <typename T>
__global__ void __launch_bounds__(THREADS) greedy_kernel(const GreedyParams p) {
  __shared__ unsigned long long of_warps[WARPS];
  let_next_start();
  wait_for_last();
  const int row = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* logits = static_cast<const T*>(p.logits.data) + row * p.stride;
  Best best = best_of_share(logits, p.vocab).of_warp();
  if (lane == 0) of_warps[warp] = best.packed();
  __syncthreads();
  if (warp > 0) return;
  best = Best::unpacked(lane < WARPS ? of_warps[lane] : 0).of_warp();
  unsigned long long* work = p.work + row * GREEDY_PARTS;
  if (lane == 0) work[blockIdx.x] = best.packed();
  const Team own{1, lane, 1};  // the first warp alone: others may have ended
  if (!is_last_part(own, p.counters + row, GREEDY_PARTS)) return;
  best = Best::unpacked(lane < GREEDY_PARTS ? __ldcg(work + lane) : 0).of_warp();
  if (best.key) best.id += p.first;
  if (p.peers.ranks) best = best_of_ranks(p.peers, row, best);
  if (lane == 0) leave(p, row, best);
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
