// A decode step's layers in one persistent kernel.
//
// A step of few rows is bound by reading its weights. Kernel by kernel, memory idles while one
// kernel ends and the next one begins. Here a block for every processor stays for all layers: its
// warps' streams (stream.cuh) read weights on and on, past the barriers between the phases, so that
// the next product's are there before its inputs are.
#pragma once

#include "attention.cuh"
#include "grid.cuh"
#include "hand.cuh"
#include "held.cuh"
#include "multiply.cuh"
#include "normalize.cuh"
#include "step.h"
#include "sum.cuh"

namespace lmi {

// Ask for an item's keys and values behind the first ones, which are under way.
template <typename T>
__device__ void prefetch_rest(const AttentionParams& p, const Item<STEP_HEADS>& it,
                              const Lane& lane) {
  if (lane.first * sizeof(T) % 128 || !lane.active) return;  // a line is asked for by one lane
  const int64_t first = it.kv * p.dim + lane.first, stride = p.kv_heads * p.dim;
#pragma unroll 1
  for (int key = it.begin + lane.worker + lane.workers * KEYS<T>; key < it.cached;
       key += lane.workers) {
    const int64_t at = slot_of(p, it.row, key) * stride + first;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const T*>(p.k) + at));
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const T*>(p.v) + at));
  }
}

// The fewer items, the more warps have one, but no more than are needed to have its keys at once, and
// all features of its heads. Of the splits, only those count that the longest row has: `p.splits`
// allows for the longest that there may ever be.
template <typename T>
__device__ int team_warps(const AttentionParams& p) {
  const int row = threadIdx.x % 32;
  const int longest = __reduce_max_sync(~0u, row < p.rows ? p.lengths[row] : 1);
  const int tokens = p.window ? min(longest, p.window) : longest, share = share_of(p, tokens);
  const int items = p.rows * p.kv_heads * p.chunks *
                    (p.splits == 1 ? 1 : (tokens + share - 1) / share);
  int warps = STEP_WARPS;
  // Shifts in place of divisions: all of this is in front of the first key.
  while (warps > least_team(p.dim) &&
         (items > static_cast<int>(gridDim.x * STEP_WARPS >> log2_of(warps)) ||
          (min(share, tokens) <= (warps / 2 * 32 >> log2_of(p.width)) * KEYS<T> &&
           2 * p.dim <= warps / 2 * 32))) {
    warps /= 2;
  }
  return warps;
}

// The block's share of an attention. `wait`: until its queries are there. PREFETCH: so long, ask for
// what will be wanted.
template <typename X, bool PREFETCH, typename Wait, typename Put = Stored>
__device__ void attend_phase(const AttentionParams& p, float* shared, Wait wait, Put put = {}) {
  const Team team = Team::of_warps(team_warps<X>(p));
  const int stride = gridDim.x * STEP_WARPS >> log2_of(team.warps);
  float* of_team = shared + team.place() * shared_floats(STEP_HEADS, team.warps, p.dim);
  attend_all<X, STEP_HEADS, false>(p, team, team.place() * gridDim.x + blockIdx.x, stride, of_team,
                                   [&](const Item<STEP_HEADS>& it, const Lane& lane) {
                                     if (PREFETCH) prefetch_rest<X>(p, it, lane);
                                     wait();
                                   },
                                   put);
}

// Not inlined: where a product holds x in registers there are too few for both. The grid's barrier is handed
// in and back in parts: a whole one would be kept in memory. Returns how it stands.
template <typename X>
static __device__ __noinline__ unsigned attend_apart(const AttentionParams& p, float* shared,
                                                     unsigned* word, unsigned stands, bool waits) {
  GridBarrier barrier(word, BARRIER_PATIENCE, stands);
  attend_phase<X, false>(p, shared, [&] {
    if (waits) barrier.wait();
  });
  return barrier.stands();
}

// The block's rows of a norm.
template <typename X>
__device__ void normalize_phase(const NormParams& p) {
  for (int row = blockIdx.x; row < p.rows; row += gridDim.x) {
    normalize<X, X>(p, row);
    __syncthreads();
  }
}

// The program's phases, one after the other: this one and the next in shared memory.
class PhaseList {
 public:
  // Behind the block's next barrier the first one is there.
  __device__ explicit PhaseList(const StepParams& s) : s_(s) {
    if (copies()) held()[0][threadIdx.x] = word(0);
  }

  __device__ bool any() const { return at_ < s_.count; }
  __device__ const Phase& now() const { return reinterpret_cast<const Phase&>(held()[at_ % 2]); }

  // Ask for the next one, in front of the work on this one.
  __device__ void read_ahead() {
    if (copies() && at_ + 1 < s_.count) ahead_ = word(at_ + 1);
  }

  // The block is done with this one.
  __device__ void next(GridBarrier& barrier) {
    ++at_;
    if (copies()) held()[at_ % 2][threadIdx.x] = ahead_;
    __syncthreads();
    if (!any()) return;
    if (now().barrier) barrier.arrive();
    read_ahead();
  }

 private:
  static constexpr int WORDS = PHASE_BYTES / 4;
  using Held = uint32_t[2][WORDS];

  static __device__ Held& held() {
    __shared__ alignas(16) Held phases;
    return phases;
  }
  static __device__ bool copies() { return threadIdx.x < WORDS; }  // a word each
  __device__ uint32_t word(int phase) const {
    return reinterpret_cast<const uint32_t*>(s_.phases + phase)[threadIdx.x];
  }

  const StepParams& s_;
  int at_ = 0;
  uint32_t ahead_ = 0;
};

// Whether products take sums, and what attention hands over: a float32 one leaves that no registers.
template <typename X, bool SUMS>
constexpr bool takes_sums = SUMS && sizeof(X) == 2;

// The block's share of a product, with x in shared memory.
template <typename Product, bool SUMS, typename S>
__device__ void multiply_staged(const StepParams& s, const Phase& phase, GridBarrier& barrier,
                                S& weights, typename Product::X* x, float* partial,
                                const Meeting& peers) {
  using X = typename Product::X;
  using W = typename Product::W;
  constexpr bool TAKES = takes_sums<X, SUMS>;
  const LinearParams& p = phase.linear;
  const Part part(p.weights, blockIdx.x, gridDim.x);
  const RowShare<STEP_WARPS> share(p.rows);
  NormTerms<X> norm;
  const bool takes = TAKES && (phase.taken || phase.hand);
  if (!takes) norm.read(p, part.begin + share.own, part.end, share.width * 8);
  if (phase.barrier) barrier.wait();
  if constexpr (TAKES) {
    if (phase.taken) forget_sum(peers, phase.taken, s.words);
    if (phase.hand) forget_handed(peers, phase.hand - 1, s.handed);
  }
  if (part.tile >= p.weights.tiles) return;
  if (takes) {
    if constexpr (TAKES) {
      if (phase.taken) {
        take<X, W>(phase, peers, x, partial);
      } else {
        take_handed<X, W>(phase, peers, x);
      }
    }
  } else if (!phase.staged) {
    stage<X, W, X>(p, share, norm, part.begin, part.end, x, partial);
  }
  __syncthreads();
  StagedRows<Product, 1, STEP_WARPS> rows{x, row_stride<X>(part.end - part.begin), p.rows};
  if constexpr (SUMS) {
    const PutOrSend<X> put{peers, phase};
    multiply<STEP_WARPS>(p, part, weights, rows, partial, put);
  } else {
    multiply<STEP_WARPS>(p, part, weights, rows, partial, Store<X>());
  }
}

// The same with x in registers.
template <typename Product, typename S>
__device__ void multiply_held(const Phase& phase, GridBarrier& barrier, S& weights, float* partial) {
  const LinearParams& p = phase.linear;
  const Part part(p.weights, blockIdx.x, gridDim.x);
  // The half of `partial` that the first tile's sums do not go to is free so long.
  using Rows = HeldRows<Product>;
  static_assert(Rows::PARTIALS == PARTIALS<2, STEP_WARPS>);  // for which the plan leaves room
  Rows rows(p, part, partial + Rows::PARTIALS);
  if (phase.barrier) {
    barrier.wait();
  } else {
    __syncthreads();
  }
  if (part.tile >= p.weights.tiles) return;
  rows.read(p, part);
  multiply<STEP_WARPS>(p, part, weights, rows, partial, Store<typename Product::X, true>());
}

// NT: times eight rows. More than eight have x in registers. SUMS: some products' results are summed over
// GPUs. A kernel of its own, so that the other one has no code for it.
template <typename Product, int NT, bool SUMS>
__global__ void __launch_bounds__(STEP_THREADS, 1) step_kernel(const StepParams s) {
#if __CUDA_ARCH__ >= 900  // on others there is too little shared memory, and no kernel to launch
  using X = typename Product::X;
  using W = typename Product::W;
  // The warps' rings; the partial sums and x, whose place attention has for itself; and what all
  // products' weights are.
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr bool TAKES = takes_sums<X, SUMS>;
  __shared__ Meeting peers;
  float* partial = reinterpret_cast<float*>(shared + s.slots * SLOT_BYTES);
  X* x = reinterpret_cast<X*>(partial + 2 * PARTIALS<NT, STEP_WARPS>);

  PhaseList phases(s);
  auto* products = reinterpret_cast<Weights*>(shared + s.products_at);
#pragma unroll 1
  for (int i = threadIdx.x; i < s.products; i += STEP_THREADS) products[i] = s.weights[i];
  if constexpr (SUMS) {
    if (threadIdx.x == 0) peers.begin(s.peers);
  }
  GridBarrier barrier(s.barrier, SUMS ? s.barrier_patience : BARRIER_PATIENCE);
  __syncthreads();
  Stream<W, STEP_WARPS> weights(products, s.products, shared, s.slots);
  weights.fill();
  phases.read_ahead();
#pragma unroll 1
  while (phases.any()) {
    const Phase& phase = phases.now();
    const auto wait = [&] {
      if (phase.barrier) barrier.wait();
    };
    if (phase.work == Work::linear) {
      if constexpr (NT > 1) {
        multiply_held<Product>(phase, barrier, weights, partial);
      } else {
        multiply_staged<Product, SUMS>(s, phase, barrier, weights, x, partial, peers);
      }
    } else if (phase.work == Work::attention) {
      if constexpr (NT > 1) {
        barrier.go_on(attend_apart<X>(phase.attention, partial, s.barrier, barrier.stands(),
                                      phase.barrier));
      } else if constexpr (TAKES) {
        attend_phase<X, true>(phase.attention, partial, wait, StoreOrHand{peers, phase});
      } else {
        attend_phase<X, true>(phase.attention, partial, wait);
      }
    } else if (SUMS && phase.work == Work::sum) {
      wait();
      if constexpr (SUMS) {
        forget_sum(peers, phase.sum, s.words);
        add_up(phase, peers);
      }
    } else {
      wait();
      normalize_phase<X>(phase.norm);
    }
    phases.next(barrier);
  }
  if constexpr (TAKES) forget_handed(peers, s.hands, s.handed);
  if constexpr (SUMS) {
    if (blockIdx.x == 0 && threadIdx.x == 0) peers.end(s.sums, s.words);
  }
#endif
}

template <typename Product, int NT, bool SUMS = false>
void launch_step(const Program& program, const StepParams& p, const Device& gpu,
                 cudaStream_t stream) {
  launch(&step_kernel<Product, NT, SUMS>, p, dim3(gpu.processors), STEP_THREADS,
         program.shared_bytes, Start::together, stream);
}

// Weights of type W, x of type X, which is W or a half type.
template <typename X, typename W>
void step_of(const Program& program, const StepParams& p, const Device& gpu, cudaStream_t stream) {
  using Product = std::conditional_t<sizeof(X) == 4, PlainProduct<W, 1>, TensorProduct<X, W, 1>>;
  if constexpr (sizeof(X) == 2) {
    if (program.rows > MOST_STAGED_ROWS) {
      return launch_step<HeldProduct<X, W>, 2>(program, p, gpu, stream);
    }
  }
  if (program.sums) return launch_step<Product, 1, true>(program, p, gpu, stream);
  launch_step<Product, 1>(program, p, gpu, stream);
}

template <typename X>
void step_of(const Program& program, const StepParams& p, const Device& gpu, cudaStream_t stream) {
  switch (program.weight_type) {
    case Type::int8: return step_of<X, int8_t>(program, p, gpu, stream);
    case Type::float8: return step_of<X, __nv_fp8_e4m3>(program, p, gpu, stream);
    default: return step_of<X, X>(program, p, gpu, stream);
  }
}

}  // namespace lmi
