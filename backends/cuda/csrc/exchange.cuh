// What the blocks of a cluster tell each other in a step: their parts of products' sums, and of rows'
// means and squares. They arrive in the receiver's shared memory, whose barriers count their bytes.
#pragma once

#include "cluster.cuh"
#include "normal.cuh"
#include "step.h"

namespace lmi {

// A row's features that one block has: their mean (0 where it is not asked for), and the sum of squares
// of what is left of them.
struct Moments {
  float mean, squares;
};

struct Exchange {
  // Two of each, in turns: a block sends the next ones only when it has got those of this turn from all
  // others, which have then read those of the turn before.
  Barrier sums[STEP_WARPS][2];  // of teams
  Barrier moments[MOST_CLUSTER_ROWS][2];
  Moments of_rows[2][CLUSTER][MOST_CLUSTER_ROWS];
  unsigned turns[STEP_WARPS];  // tiles that a team has sent, in all products
  unsigned norms;              // that have been staged

  // By one thread, before the cluster's first barrier.
  __device__ void begin() {
    for (int i = 0; i < STEP_WARPS; ++i) sums[i][0].init(1), sums[i][1].init(1), turns[i] = 0;
    for (auto& of_row : moments) of_row[0].init(1), of_row[1].init(1);
    norms = 0;
    fence_barriers();
  }
};

// Which phase of its barrier a turn is.
__device__ inline int phase_of(unsigned turn) { return turn / 2 % 2; }

// Send eight bytes to another block's memory; its barrier counts them when they are there.
__device__ inline void send(uint32_t to, const Moments& x, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          to),
      "f"(x.mean), "f"(x.squares), "r"(barrier)
      : "memory");
}

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// A whole row's shift and factor, from the moments of this warp's slice of it and of the cluster's
// other slices ("Updating formulae", Chan et al., 1979). By a whole warp.
__device__ inline Normal combine(Exchange& exchange, unsigned turn, int row, int rank,
                                 const Moments& own, const LinearParams& p) {
  const int lane = threadIdx.x % 32, inputs = p.weights.inputs;
  Barrier& arrived = exchange.moments[row][turn % 2];
  auto& found = exchange.of_rows[turn % 2];
  if (lane == 0) arrived.arrive_and_expect(CLUSTER * sizeof(Moments));
  if (lane < CLUSTER) {
    send(in_block(&found[rank][row], lane), own, in_block(&arrived, lane));
  }
  arrived.wait_for_cluster(phase_of(turn));
  const auto count = [&](int r) { return min(max(inputs - r * p.weights.slice, 0), p.weights.slice); };
  Normal by;
#pragma unroll
  for (int r = 0; r < CLUSTER; ++r) by.shift += found[r][row].mean * count(r);
  by.shift = __fdividef(by.shift, inputs);
  float squares = 0;
#pragma unroll
  for (int r = 0; r < CLUSTER; ++r) {
    const float apart = found[r][row].mean - by.shift;
    squares += found[r][row].squares + apart * apart * count(r);
  }
  by.factor = rsqrtf(__fdividef(squares, inputs) + p.eps);
  return by;
}

}  // namespace lmi
