// A fused product for up to 64 rows. Weights stream through a ring in shared memory, which the copy
// engine fills while tensor cores multiply; every weight byte is read once.
//
// A cluster of blocks works on a tile: each has a share of the features, the same for all tiles.
// What they find they send to each other, and each adds up and finishes some rows of x.
#pragma once

#include "activation.cuh"
#include "cluster.cuh"
#include "gemm.h"
#include "product.cuh"

// What the best choice depends on the chip for; see docs/performance-notes.md.
#ifndef LMI_GEMM_DEEP
#define LMI_GEMM_DEEP 64  // rows from which on a block has a processor to itself
#endif
#ifndef LMI_GEMM_AHEAD
#define LMI_GEMM_AHEAD 0  // steps that are brought to L2 before x is there
#endif
#ifndef LMI_GEMM_BURST
#define LMI_GEMM_BURST 1  // steps that are copied together: neighbouring bytes of the same rows
#endif

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
  static constexpr int AT_ONCE = ROWS >= LMI_GEMM_DEEP ? 1 : 2;
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

// Where in the ring a step is, and the phase of its barriers.
struct RingSlot {
  int at = 0, phase = 0;

  __device__ void next(int depth) {
    if (++at == depth) at = 0, phase ^= 1;
  }
};

// A step of a block: of which tile, and which of the block's share.
struct Step {
  unsigned tile, k = 0;

  __device__ void next(const Share& share) {
    if (++k == share.count) k = 0, tile += share.clusters;
  }
};

// The warp that copies: all of a block's steps, as many ahead of their use as there is room.
template <typename G>
__device__ void copy_steps(const GemmParams& p, const Share& share, const GemmMemory& memory) {
  const int height = p.gated ? HALF : 2 * HALF;
  const auto row = [&](Step step, int half) { return step.tile * height + half * p.upper; };
  const auto feature = [&](unsigned k) { return (share.first + k) * G::FEATURES; };
  const auto weights = [&](Step step, int slot, int half) {
    copy_box(memory.steps + slot * p.stride + half * HALF_BYTES, &p.weights, row(step, half),
             feature(step.k), memory.full + slot);
  };
  const auto x = [&](unsigned k, unsigned char* to, Barrier* full) {
#pragma unroll
    for (int box = 0; box < G::X_BOXES; ++box) {
      copy_box(to + box * G::BOX, &p.x, 0, feature(k) + box * G::X_FEATURES, full);
    }
  };
  const auto x_in_ring = [&](unsigned k, int slot) {
    if (!p.keep) x(k, memory.steps + slot * p.stride + G::WEIGHT_BYTES, memory.full + slot);
  };
  // Weights are nobody's results: the last kernel may still be at work.
  const unsigned total = share.tiles * share.count, begun = min(total, p.depth);
  Step step{share.cluster};
#pragma unroll 1
  for (unsigned i = 0; i < begun; ++i, step.next(share)) {
    memory.full[i].arrive_and_expect(p.stride);
    weights(step, i, 0), weights(step, i, 1);
  }
  Step ahead = step;
#pragma unroll 1
  for (unsigned i = begun; i < min(total, begun + LMI_GEMM_AHEAD); ++i, ahead.next(share)) {
    prefetch_box(&p.weights, row(ahead, 0), feature(ahead.k));
    prefetch_box(&p.weights, row(ahead, 1), feature(ahead.k));
  }
  wait_for_last();
#pragma unroll 1
  for (unsigned k = 0; p.keep && k < share.count; ++k) {
    memory.x_full[k].arrive_and_expect(G::X_BYTES);
    x(k, memory.x + k * G::X_BYTES, memory.x_full + k);
  }
  Step again{share.cluster};
#pragma unroll 1
  for (unsigned i = 0; i < begun; ++i, again.next(share)) x_in_ring(again.k, i);
  RingSlot slot;
#pragma unroll 1
  for (unsigned i = begun; i < total; i += LMI_GEMM_BURST) {
    Step steps[LMI_GEMM_BURST];
    int at[LMI_GEMM_BURST];
    const int count = min(total - i, LMI_GEMM_BURST);
#pragma unroll
    for (int j = 0; j < LMI_GEMM_BURST; ++j) {
      if (j == count) break;
      steps[j] = step, at[j] = slot.at;
      memory.empty[slot.at].wait(slot.phase);
      memory.full[slot.at].arrive_and_expect(p.stride);
      step.next(share), slot.next(p.depth);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < LMI_GEMM_BURST; ++j) {
        if (j < count) weights(steps[j], at[j], half);
      }
    }
#pragma unroll
    for (int j = 0; j < LMI_GEMM_BURST; ++j) {
      if (j < count) x_in_ring(steps[j].k, at[j]);
    }
  }
}

// What four results need beside their sums, on its way: those of weight rows n and n + 8, for rows
// m and m + 1 of x.
struct GemmTerms {
  float scale[2][2] = {{1, 1}, {1, 1}};         // of the output, and of what it gates
  uint32_t bias[2][2] = {}, residual[2][2] = {};  // the latter for m and m + 1

  __device__ void read_from(const GemmParams& p, int n, int m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int output = n + i * 8;
      if (output >= p.outputs) continue;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (j < 1 + p.gated) {
          if (p.scale) scale[i][j] = p.scale[output + j * p.upper];
          if (p.bias.data) bias[i][j] = read(p.bias, output + j * p.upper);
        }
        if (p.residual.data && m + j < p.rows) {
          residual[i][j] = read(p.residual, static_cast<int64_t>(m + j) * p.outputs + output);
        }
      }
    }
  }
};

// Scale, bias, activation or gate, and residual.
__device__ inline void put(const GemmParams& p, const GemmTerms& terms, int n, int m,
                           const float4& sums, const float4& gated) {
  const float y[2][2] = {{sums.x, sums.y}, {sums.z, sums.w}};
  const float by[2][2] = {{gated.x, gated.y}, {gated.z, gated.w}};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int output = n + i * 8;
    const float bias[2] = {widen(terms.bias[i][0], p.bias.type),
                           widen(terms.bias[i][1], p.bias.type)};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (output >= p.outputs || m + j >= p.rows) continue;
      float value = activate(y[i][j] * terms.scale[i][0] + bias[0], p.activation);
      if (p.gated) value *= by[i][j] * terms.scale[i][1] + bias[1];
      store(p.out, p.out_type, static_cast<int64_t>(m + j) * p.outputs + output,
            value + widen(terms.residual[i][j], p.residual.type));
    }
  }
}

// The results of a tile that this block finishes, four at a time: a pair of x's rows, and weight
// rows g and g + 8 of a warp's sixteen.
template <typename G>
struct Finish {
  static constexpr int WIDTH_LOG2 = 6, OF_PAIR = 1 << WIDTH_LOG2;  // fours of a pair of rows
  static_assert(OF_PAIR == GEMM_WARPS * 8);

  const GemmParams& p;
  const Share& share;
  // Powers of two: pairs that a block finishes, and results of a pair, of which two fours become
  // one if gated.
  int pairs_log2, width_log2;

  __device__ Finish(const GemmParams& p, const Share& share)
      : p(p),
        share(share),
        pairs_log2(__ffs(G::ROWS / 2 / p.splits) - 1),
        width_log2(WIDTH_LOG2 - p.gated) {}

  __device__ int in_pair(int i) const { return i & ((1 << width_log2) - 1); }
  __device__ int pair(int i) const { return i >> width_log2; }
  __device__ int own() const { return 1 << (pairs_log2 + width_log2); }
  __device__ int row(int i) const { return 2 * ((share.rank << pairs_log2) + pair(i)); }
  __device__ int output(int i, unsigned tile) const {
    return tile * (p.gated ? HALF : 2 * HALF) + in_pair(i) / 8 * 16 + in_pair(i) % 8;
  }

  __device__ void read_terms(GemmTerms& terms, int i, unsigned tile) const {
    if (i < own()) terms.read_from(p, output(i, tile), row(i));
  }

  // A thread's sums to the blocks that finish them.
  __device__ void send_sums(const GemmMemory& memory, const float (&sums)[G::SUMS]) const {
    const int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
    for (int j = 0; j < G::SUMS / 4; ++j) {
      const unsigned pair = j * 4 + t, block = pair >> pairs_log2;
      const unsigned its = (share.rank << pairs_log2) + (pair & ((1 << pairs_log2) - 1));
      const int at = its * OF_PAIR + threadIdx.x / 32 * 8;
      send(in_block(memory.parts + at + lane / 4, block),
           {sums[j * 4], sums[j * 4 + 1], sums[j * 4 + 2], sums[j * 4 + 3]},
           in_block(memory.sent, block));
    }
  }

  // Always in the same order.
  __device__ float4 add_up(const float4* parts) const {
    float4 sum = parts[0];
#pragma unroll 4
    for (unsigned block = 1; block < p.splits; ++block) {
      const float4 more = parts[(block << pairs_log2) * OF_PAIR];
      sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    return sum;
  }

  __device__ void operator()(const GemmMemory& memory, GemmTerms& terms, unsigned tile) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < own(); i += GEMM_WARPS * 32) {
      if (i >= GEMM_WARPS * 32) terms = {}, read_terms(terms, i, tile);
      const float4* parts = memory.parts + pair(i) * OF_PAIR + in_pair(i);
      const float4 sums = add_up(parts);
      put(p, terms, output(i, tile), row(i), sums, p.gated ? add_up(parts + OF_PAIR / 2) : sums);
    }
  }
};

// The products of a box of x (of quantized weights, half a step), on their way. Such weights are
// widened in `held`, which must stay as it is until they are done.
template <typename G>
__device__ void multiply_box(const unsigned char* weights, const unsigned char* x, int box,
                             float (&sums)[G::SUMS], uint32_t (&held)[G::IN_BOX][4]) {
  using T = typename G::T;
  using W = typename G::W;
  const uint64_t b = matrix(x + box * G::BOX);  // 2 units of 16 bytes to a product's next features
  if constexpr (sizeof(W) == 1) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    const unsigned char* row =
        weights + lane % 4 * 2 + (threadIdx.x / 32 % HALF_WARPS * 16 + g) * BOX_BYTES;
#pragma unroll
    for (int k = 0; k < G::IN_BOX; ++k) {
      // The swizzle: g is also the row modulo eight.
      const unsigned char* at = row + ((box * G::IN_BOX + k) ^ g) * 16;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto* two = reinterpret_cast<const uint16_t*>(at + i % 2 * 8 * BOX_BYTES + i / 2 * 8);
        held[k][i] = expand(*two, 0x4140, W(), T());
      }
    }
#pragma unroll
    for (int k = 0; k < G::IN_BOX; ++k) hold(held[k]);
    begin_products();
#pragma unroll
    for (int k = 0; k < G::IN_BOX; ++k) multiply_add<T, G::ROWS>(sums, held[k], b + 2 * k);
  } else {
    const uint64_t a = matrix(weights);
    begin_products();
#pragma unroll
    for (int k = 0; k < G::IN_BOX; ++k) multiply_add<T, G::ROWS>(sums, a + 2 * k, b + 2 * k);
  }
  close_products();
}

// The warpgroups that multiply.
template <typename G>
__device__ void multiply_steps(const GemmParams& p, const Share& share, const GemmMemory& memory) {
  const int half = threadIdx.x / (HALF_WARPS * 32), lane = threadIdx.x % 32;
  const Finish<G> finish(p, share);
  RingSlot slot;
  int before = -1;  // the slot of the step whose products may not be done yet
  float sums[G::SUMS];
  // In turn: those of the last box are still being read while this one's are widened.
  uint32_t held[G::X_BOXES][G::IN_BOX][4];
  const auto multiply = [&](unsigned k) {
    const unsigned char* step = memory.steps + slot.at * p.stride;
    if (p.keep) memory.x_full[k].wait(0);
    memory.full[slot.at].wait(slot.phase);
    const unsigned char* x = p.keep ? memory.x + k * G::X_BYTES : step + G::WEIGHT_BYTES;
#pragma unroll
    for (int box = 0; box < G::X_BOXES; ++box) {
      multiply_box<G>(step + half * HALF_BYTES, x, box, sums, held[box]);
      await_products<1>();
      if (box == 0 && lane == 0 && before >= 0) memory.empty[before].arrive();
    }
    before = slot.at;
    slot.next(p.depth);
  };
#pragma unroll 1
  for (unsigned i = 0; i < share.tiles; ++i) {
    const unsigned tile = share.cluster + i * share.clusters;
    if (threadIdx.x == 0) memory.sent->arrive_and_expect(G::PARTS);
    GemmTerms terms;
    finish.read_terms(terms, threadIdx.x, tile);
#pragma unroll
    for (int j = 0; j < G::SUMS; ++j) sums[j] = 0;
    hold(sums);
#pragma unroll 1
    for (unsigned k = 0; k < share.count; ++k) multiply(k);
    await_products<0>();
    hold(sums);
    if (lane == 0) memory.empty[before].arrive();
    before = -1;

    if (i == 0) {
      await_cluster();
    } else {
      memory.taken->wait_for_cluster((i - 1) % 2);
    }
    finish.send_sums(memory, sums);
    memory.sent->wait_for_cluster(i % 2);
    finish(memory, terms, tile);
    __syncwarp();
    // After the last tile nobody asks, and others may have ended.
    if (i + 1 < share.tiles && lane < p.splits) arrive_at(memory.taken, lane);
  }
}

template <typename G>
__global__ void __launch_bounds__(GEMM_THREADS, G::AT_ONCE)
    gemm_kernel(const __grid_constant__ GemmParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char shared[];
  __shared__ Barrier full[MOST_DEPTH], empty[MOST_DEPTH], x_full[MOST_KEPT], sent, taken;
  unsigned char* steps = shared + (-shared_address(shared) & (G::ALIGNED - 1));
  unsigned char* parts = steps + p.depth * p.stride;
  const GemmMemory memory{steps,  parts + G::PARTS, reinterpret_cast<float4*>(parts),
                          full,   empty,            x_full,
                          &sent, &taken};
  const Share share(p);
  const bool multiplies = threadIdx.x / 32 < GEMM_WARPS;
  const int lane = threadIdx.x % 32;

  let_next_start();
  if (!multiplies) {
    if (lane == 0) {
      prefetch(&p.weights), prefetch(&p.x);
      sent.init(1), taken.init(p.splits * GEMM_WARPS);
    }
    if (lane < MOST_DEPTH) full[lane].init(1), empty[lane].init(GEMM_WARPS);
    if (lane < MOST_KEPT) x_full[lane].init(1);
    fence_barriers();
  }
  __syncthreads();
  arrive_in_cluster();
  if (multiplies) {
    wait_for_last();
    multiply_steps<G>(p, share, memory);
  } else {
    if (lane == 0) copy_steps<G>(p, share, memory);
    await_cluster();
  }
#endif
}

}  // namespace lmi
