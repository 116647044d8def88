// What the blocks of a cluster tell each other in a step: their parts of products' sums, and of rows'
// means and squares. They arrive in the receiver's shared memory, whose barriers count their bytes.
#pragma once

#include "cluster.cuh"
#include "normal.cuh"
#include "step.h"

namespace lmi {

constexpr int TEAM_WARPS = 4;  // of a block, that share a tile with as many of the cluster's others
constexpr int BLOCK_TEAMS = STEP_WARPS / TEAM_WARPS;

// A row's features that one block has: how many, their mean (0 where it is not asked for), and the sum of
// squares of what is left of them.
struct Moments {
  float count, mean, squares, unused;
};

struct Exchange {
  // Two of each, in turns: a block sends the next ones only when it has got those of this turn from all
  // others, which have then read those of the turn before.
  Barrier sums[BLOCK_TEAMS][2];  // of teams
  Barrier moments[MOST_CLUSTER_ROWS][2];
  Moments of_rows[2][CLUSTER][MOST_CLUSTER_ROWS];
  unsigned turns[BLOCK_TEAMS];  // tiles that a team has sent, in all products
  unsigned norms;              // that have been staged
  // Teams that are done with each tile that all share, of which a cluster has no more than teams.
  int done[BLOCK_TEAMS];

  // By one thread, before the cluster's first barrier.
  __device__ void begin() {
    for (int i = 0; i < BLOCK_TEAMS; ++i) {
      sums[i][0].init(1), sums[i][1].init(1);
      turns[i] = 0, done[i] = 0;
    }
    for (auto& of_row : moments) of_row[0].init(1), of_row[1].init(1);
    norms = 0;
    fence_barriers();
  }

  // Whether this warp's team is the last one that has held what it found of a shared tile. By a whole
  // warp.
  __device__ bool is_last_team(int number) {
    __threadfence_block();
    __syncwarp();
    int before = 0;
    if (threadIdx.x % 32 == 0) {
      before = atomicAdd(&done[number], 1);
      if (before == BLOCK_TEAMS - 1) done[number] = 0;
    }
    const bool last = __shfl_sync(~0u, before, 0) == BLOCK_TEAMS - 1;
    __threadfence_block();
    return last;
  }
};

// Which phase of its barrier a turn is.
__device__ inline int phase_of(unsigned turn) { return turn / 2 % 2; }

// A whole row's shift and factor, from the moments of this block's part of it and of the cluster's
// others' ("Updating formulae", Chan et al., 1979). By a whole warp.
__device__ inline Normal combine(Exchange& exchange, int row, int rank, const Moments& own,
                                 const LinearParams& p) {
  const unsigned lane = threadIdx.x % 32, turn = exchange.norms;
  Barrier& arrived = exchange.moments[row][turn % 2];
  auto& found = exchange.of_rows[turn % 2];
  if (lane == 0) arrived.arrive_and_expect(CLUSTER * sizeof(Moments));
  if (lane < CLUSTER) {
    send(in_block(&found[rank][row], lane), {own.count, own.mean, own.squares, 0},
         in_block(&arrived, lane));
  }
  arrived.wait_for_cluster(phase_of(turn));
  Normal by;
#pragma unroll
  for (int r = 0; r < CLUSTER; ++r) by.shift += found[r][row].mean * found[r][row].count;
  by.shift = __fdividef(by.shift, p.weights.inputs);
  float squares = 0;
#pragma unroll
  for (int r = 0; r < CLUSTER; ++r) {
    const float apart = found[r][row].mean - by.shift;
    squares += found[r][row].squares + apart * apart * found[r][row].count;
  }
  by.factor = rsqrtf(__fdividef(squares, p.weights.inputs) + p.eps);
  return by;
}

}  // namespace lmi
