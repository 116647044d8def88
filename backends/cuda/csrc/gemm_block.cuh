// What a block of a product of 9 to 64 rows has: its memory, and its share of the work.
#pragma once

#include "cluster.cuh"
#include "gemm.h"

namespace lmi {

constexpr int HALF_WARPS = 4, GEMM_WARPS = 2 * HALF_WARPS;  // a half of a tile is a warpgroup's
constexpr int GEMM_THREADS = (GEMM_WARPS + 1) * 32;         // and one warp copies
constexpr int HALF_BYTES = HALF * BOX_BYTES;
// Steps in the ring, and of x beside it: a warp's lanes make their barriers.
constexpr int MOST_DEPTH = 16, MOST_KEPT = 32;

// x of type T has so many ROWS, filled up with zeros.
template <typename T_, typename W_, int ROWS_>
struct Gemm {
  using T = T_;
  using W = W_;
  static constexpr int ROWS = ROWS_;
  static constexpr int FEATURES = BOX_BYTES / sizeof(W);  // of a step
  static constexpr int X_FEATURES = BOX_BYTES / sizeof(T), X_BOXES = FEATURES / X_FEATURES;
  static constexpr int BOX = ROWS * BOX_BYTES;  // of x
  static constexpr int IN_BOX = X_FEATURES / 16;  // products of sixteen features
  static constexpr int X_BYTES = X_BOXES * BOX, WEIGHT_BYTES = 2 * HALF_BYTES;  // of a step
  static constexpr int SUMS = ROWS / 2;                    // that a thread has of a tile
  static constexpr int PARTS = ROWS * 2 * HALF * 4;        // bytes of a tile's sums
  static constexpr int ALIGNED = 1024;
  // Two blocks on a processor where both find room: the next product's weights are then under way
  // while this one's sums are added up.
  static constexpr int AT_ONCE = X_BOXES * ROWS >= 64 ? 1 : 2;
  static constexpr int ROOM = (AT_ONCE == 1 ? 224 : 112) * 1024 - PARTS - ALIGNED;
};

// What a block does: a share of the features of every tile that its cluster has.
struct Share {
  unsigned rank, cluster, clusters;
  unsigned first, count;  // steps
  unsigned tiles;

  __device__ explicit Share(const GemmParams& p) {
    rank = blockIdx.x % p.splits, cluster = blockIdx.x / p.splits, clusters = gridDim.x / p.splits;
    first = rank * p.steps / p.splits, count = (rank + 1) * p.steps / p.splits - first;
    tiles = (p.tiles - cluster + clusters - 1) / clusters;
  }
};

struct GemmMemory {
  unsigned char *steps, *x;  // the ring; and x, if it is kept
  float4* parts;             // of a tile's sums, from each block of the cluster
  Barrier *full, *empty;     // of the ring's slots
  Barrier *x_full;           // of x, for each of the block's steps
  Barrier *sent, *taken;     // parts are here; and those that this block sent have been read
};

}  // namespace lmi
