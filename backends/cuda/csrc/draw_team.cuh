// Blocks that have a row's tokens together, and what they tell each other through memory.
#pragma once

#include "draw.h"
#include "grid.cuh"
#include "ranking.cuh"

namespace lmi {

using Weight = unsigned long long;

constexpr int DRAW_THREADS = 256, DRAW_WARPS = DRAW_THREADS / 32;
constexpr int BIN_BITS = 11, BINS = 1 << BIN_BITS, OWN_BINS = BINS / DRAW_THREADS;
constexpr int LOW_BITS = 16;  // of a weight of 39 bits: with them two sums of 32 bits do
constexpr int MOST_DRAW_BLOCKS = 64;  // two a lane
constexpr int LIST = DRAW_THREADS;
static_assert(BINS == OWN_BINS * DRAW_THREADS);

// Two numbers that are joined at a time.
struct alignas(16) Both {
  Weight first = 0, second = 0;
};

struct Largest {
  __device__ Both operator()(Both a, Both b) const {
    return {max(a.first, b.first), max(a.second, b.second)};
  }
};

struct Sums {
  __device__ Both operator()(Both a, Both b) const { return {a.first + b.first, a.second + b.second}; }
};

// A token as a selection sees it: those with larger keys come first, equal ones together. Of weight 0: it is
// not there.
struct Seen {
  uint32_t key;
  Weight weight;
};

// The last tokens that a selection needs to come to its target: their key, what those before them weigh, and
// they together. `none`: it does not come to it.
struct Cut {
  uint32_t key;
  Weight above, own;
  bool none;
};

// What a team's blocks have in memory, from launch to launch. Zero at first.
struct DrawTeam {
  unsigned barrier;
  // Bins are used in turns: while those of one turn are added to, nobody needs the next ones any more,
  // which are made zero; those before are still read.
  unsigned turn;
  alignas(16) Weight bins[3][BINS];
  unsigned lists;  // in turns: how many tokens are on those of three, and what of two is read
  unsigned listed[3];
  Seen list[2][LIST];
  Both told[2][MOST_DRAW_BLOCKS];  // in turns, too
  Entry likeliest[MOST_DRAW_BLOCKS][32];
};
static_assert(sizeof(DrawTeam) == DRAW_TEAM_BYTES);

// What a block's threads tell each other.
struct DrawShared {
  // What weighs how much, by LOW_BITS and the rest: atomics of 32 bits are one instruction. Zero outside
  // `Meet::crossing` and what goes before it.
  uint32_t low[BINS], high[BINS];
  Both of_warps[DRAW_WARPS];
  Entry likeliest[DRAW_WARPS][32];
  int bin;
  unsigned turn, told, lists, key;
  Weight above, own;
  uint32_t keys[LIST];
  Weight weights[LIST];
};

// Where sums over bins come to a target: the bin, -1 if there is none, its own weight, and that of all
// before it.
struct Crossing {
  int bin;
  Weight above, own;
};

// All threads of all blocks call what is here, one after the other.
class Meet {
 public:
  static __device__ int block() { return blockIdx.x; }
  static __device__ int blocks() { return gridDim.x; }

  __device__ Meet(DrawShared& shared, DrawTeam& team)
      : shared_(shared), team_(team), barrier_(&team.barrier) {
    // Before the first barrier, see `end`.
    if (threadIdx.x == 0) {
      shared.told = 0;
      shared.turn = *static_cast<volatile unsigned*>(&team.turn);
      shared.lists = *static_cast<volatile unsigned*>(&team.lists);
    }
    for (int i = threadIdx.x; i < BINS; i += DRAW_THREADS) shared.low[i] = shared.high[i] = 0;
    __syncthreads();
  }

  // Leave the team as the next launch wants it.
  __device__ void end() const {
    if (block() == 0 && threadIdx.x == 0) team_.turn = shared_.turn, team_.lists = shared_.lists;
  }

  // What all threads' numbers join to, zeros being nothing.
  template <typename Join>
  __device__ Both all(Both own, Join join) {
    own = of_block(own, join);
    if (blocks() == 1) return own;
    tell(own);
    const int lane = threadIdx.x % 32;
    return of_lanes<32>(join(heard(lane), heard(lane + 32)), join);
  }

  // The sum of all threads' weights. `before`: of those of blocks before this one; `of_block`: of its own.
  __device__ Weight total(Weight own, Weight& before, Weight& own_block) {
    own_block = of_block({own, 0}, Sums()).first, before = 0;
    if (blocks() == 1) return own_block;
    tell({own_block, 0});
    const int lane = threadIdx.x % 32;
    const Both one = heard(lane), two = heard(lane + 32);
    const Weight earlier = (lane < block() ? one.first : 0) + (lane + 32 < block() ? two.first : 0);
    before = of_lanes<32>(Both{earlier, 0}, Sums()).first;
    return of_lanes<32>(Both{one.first + two.first, 0}, Sums()).first;
  }

  // The sum of what threads of this block before this one have.
  __device__ Weight before(Weight own) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Weight until = of_lanes_until(own);
    __syncthreads();
    if (lane == 31) shared_.of_warps[warp].first = until;
    __syncthreads();
    Weight first = 0;
    for (int w = 0; w < warp; ++w) first += shared_.of_warps[w].first;
    return first + until - own;
  }

  // The sum of what lanes of the warp up to this one have.
  static __device__ Weight of_lanes_until(Weight own) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const Weight other = __shfl_up_sync(~0u, own, offset);
      if (lane >= offset) own += other;
    }
    return own;
  }

  // Any threads, any number of times; then all, `crossing`.
  __device__ void add(int bin, Weight weight) {
    const auto low = static_cast<uint32_t>(weight) & ((1u << LOW_BITS) - 1);
    const auto high = static_cast<uint32_t>(weight >> LOW_BITS);
    if (low) atomicAdd(&shared_.low[bin], low);
    if (high) atomicAdd(&shared_.high[bin], high);
  }

  // `above`: what lies before all bins. They are empty again afterwards.
  __device__ Crossing crossing(Weight above, Weight target) {
    __syncthreads();
    const int first = OWN_BINS * threadIdx.x;
    Weight own[OWN_BINS], sum = 0;
#pragma unroll
    for (int i = 0; i < OWN_BINS; ++i) {
      own[i] = (static_cast<Weight>(shared_.high[first + i]) << LOW_BITS) + shared_.low[first + i];
      shared_.high[first + i] = shared_.low[first + i] = 0;
    }
    if (blocks() > 1) of_all_blocks(own, first);
#pragma unroll
    for (int i = 0; i < OWN_BINS; ++i) sum += own[i];
    if (threadIdx.x == 0) shared_.bin = -1;
    Weight until = above + before(sum);
#pragma unroll
    for (int i = 0; i < OWN_BINS; ++i) {
      if (until < target && until + own[i] >= target) {
        shared_.bin = first + i, shared_.above = until, shared_.own = own[i];
      }
      until += own[i];
    }
    __syncthreads();
    return {shared_.bin, shared_.above, shared_.own};
  }

  // Any threads, up to once for each token; then all, `listed`.
  __device__ void list(Seen token) {
    const unsigned turn = shared_.lists, place = atomicAdd(&team_.listed[turn % 3], 1);
    if (place >= LIST) return;
    Seen& to = team_.list[turn % 2][place];
    __stcg(&to.key, token.key), __stcg(&to.weight, token.weight);
  }

  // Of the tokens on the list, behind those that weigh `above`, the first that together come to `target`, which
  // they do. False if they were too many.
  __device__ bool listed(Weight above, Weight target, Cut& cut) {
    const unsigned turn = shared_.lists;
    if (block() == 0 && threadIdx.x == 0) team_.listed[(turn + 1) % 3] = 0;
    __syncthreads();
    barrier_.arrive();
    barrier_.wait();
    if (threadIdx.x == 0) shared_.lists = (turn + 1) % 6;
    const unsigned count = __ldcg(&team_.listed[turn % 3]), i = threadIdx.x;
    if (count <= LIST && i < count) {
      const Seen& own = team_.list[turn % 2][i];
      shared_.keys[i] = __ldcg(&own.key), shared_.weights[i] = __ldcg(&own.weight);
    }
    __syncthreads();
    if (count > LIST) return false;
    if (i < count) {
      const uint32_t key = shared_.keys[i];
      Weight before = above, own = 0;
#pragma unroll 4
      for (unsigned j = 0; j < count; ++j) {
        const Weight other = shared_.weights[j];
        if (shared_.keys[j] > key) before += other;
        if (shared_.keys[j] == key) own += other;
      }
      if (before < target && before + own >= target) {  // all with this key write the same
        shared_.key = key, shared_.above = before, shared_.own = own;
      }
    }
    __syncthreads();
    cut = {shared_.key, shared_.above, shared_.own, false};
    return true;
  }

  // The `keep` <= 32 largest entries of all warps' `own`, in the first warp of the first block.
  __device__ Ranking likeliest(Ranking own, int keep) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    shared_.likeliest[warp][lane] = own.own;
    __syncthreads();
    Ranking found;
    if (warp == 0) {
      for (int w = 0; w < DRAW_WARPS; ++w) found.take(lane < keep ? shared_.likeliest[w][lane] : 0, keep);
    }
    if (blocks() == 1) return found;
    if (warp == 0) __stcg(&team_.likeliest[block()][lane], found.own);
    __syncthreads();
    barrier_.arrive();
    barrier_.wait();
    if (warp || block()) return found;
    for (int b = 1; b < blocks(); ++b) {
      found.take(lane < keep ? __ldcg(&team_.likeliest[b][lane]) : 0, keep);
    }
    return found;
  }

 private:
  template <int LANES, typename Join>
  static __device__ Both of_lanes(Both own, Join join) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) {
      own = join(own, Both{__shfl_xor_sync(~0u, own.first, offset), __shfl_xor_sync(~0u, own.second, offset)});
    }
    return own;
  }

  template <typename Join>
  __device__ Both of_block(Both own, Join join) {
    own = of_lanes<32>(own, join);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared_.of_warps[threadIdx.x / 32] = own;
    __syncthreads();
    return of_lanes<DRAW_WARPS>(shared_.of_warps[threadIdx.x % DRAW_WARPS], join);
  }

  __device__ void tell(Both own) {
    if (threadIdx.x == 0) {
      shared_.told ^= 1;
      __stcg(reinterpret_cast<ulonglong2*>(&team_.told[shared_.told][block()]), {own.first, own.second});
    }
    barrier_.arrive();
    barrier_.wait();
  }

  __device__ Both heard(int from) const {
    if (from >= blocks()) return {};
    const ulonglong2 both = __ldcg(reinterpret_cast<const ulonglong2*>(&team_.told[shared_.told][from]));
    return {both.x, both.y};
  }

  // In place of a block's bins, from `first` on, those of all blocks together.
  __device__ void of_all_blocks(Weight (&own)[OWN_BINS], int first) {
    const unsigned turn = shared_.turn;
    Weight *bins = team_.bins[turn], *next = team_.bins[(turn + 1) % 3];
#pragma unroll
    for (int i = 0; i < OWN_BINS; ++i) {
      if (own[i]) atomicAdd(bins + first + i, own[i]);
    }
    for (int i = block() * DRAW_THREADS + threadIdx.x; i < BINS; i += blocks() * DRAW_THREADS) next[i] = 0;
    __syncthreads();
    barrier_.arrive();
    barrier_.wait();
#pragma unroll
    for (int i = 0; i < OWN_BINS; ++i) own[i] = __ldcg(bins + first + i);
    if (threadIdx.x == 0) shared_.turn = (turn + 1) % 3;
  }

  DrawShared& shared_;
  DrawTeam& team_;
  GridBarrier barrier_;
};

}  // namespace lmi
