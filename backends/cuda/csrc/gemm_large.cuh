// A fused product for many rows: prompts.
//
// A block works on a tile of 128 rows of x and 256 of the weights. Two blocks, a cluster, have rows of
// x below each other and the same weights, of which each has half copied into both. One warp copies;
// two warpgroups multiply, 64 rows each, and leave their results in shared memory, from where other
// warps fetch, finish and write them while the next tile is multiplied.
#pragma once

#include <array>
#include <mutex>

#include "activation.cuh"
#include "cluster.cuh"
#include "gemm.h"
#include "gemm_large.h"

namespace lmi {

constexpr int LARGE_DEPTH = 3;       // steps in the ring
constexpr int LARGE_ROWS = 128;      // of x in a tile, and of weights in half of one
constexpr int LARGE_BOX = LARGE_ROWS * BOX_BYTES, LARGE_STEP = 3 * LARGE_BOX;
constexpr int LARGE_WIDTH = 2 * LARGE_ROWS, LARGE_SUMS = LARGE_WIDTH / 2;
constexpr int MULTIPLIERS = 8, FINISHERS = 3;  // warps
constexpr int LARGE_THREADS = (MULTIPLIERS + 1 + FINISHERS) * 32;
constexpr int LARGE_ALIGNED = 1024;
// Results of a tile: boxes of 64 columns, as the ring's.
constexpr int LARGE_SHARED = LARGE_ALIGNED + LARGE_DEPTH * LARGE_STEP + 4 * LARGE_BOX;

struct LargeMemory {
  unsigned char *steps, *results;
  Barrier *full, *empty;    // of the ring's slots
  // Results are there; and have been read. Every lane arrives, by itself: one for its warp would do,
  // but racecheck does not follow what the others did before.
  Barrier *dumped, *taken;
};

// Pairs of tiles of a column lie behind each other, eight at a time: so what runs at a time reads
// about as many rows of x as of weights, again and again from L2.
struct TileOf {
  int row, column;  // first row of x, and first output

  __device__ TileOf(const LargeParams& p, unsigned tile) {
    constexpr unsigned DEEP = 8;
    const unsigned group = tile / (DEEP * p.columns), first = group * DEEP;
    const unsigned deep = min(DEEP, p.pairs - first), within = tile % (DEEP * p.columns);
    row = (2 * (first + within % deep) + blockIdx.x % 2) * LARGE_ROWS;
    column = within / deep * (p.gated ? LARGE_ROWS : LARGE_WIDTH);
  }
};

// A block's tiles, every so many.
struct Tiles {
  unsigned first, stride, count;

  __device__ explicit Tiles(const LargeParams& p)
      : first(blockIdx.x / 2),
        stride(gridDim.x / 2),
        count((p.pairs * p.columns - first + stride - 1) / stride) {}

  __device__ TileOf operator()(const LargeParams& p, unsigned i) const {
    return TileOf(p, first + i * stride);
  }
};

__device__ inline void copy_tiles(const LargeParams& p, const LargeMemory& memory) {
  const int own = blockIdx.x % 2;  // which half of the weights
  const Tiles tiles(p);
  RingSlot slot;
#pragma unroll 1
  for (unsigned i = 0; i < tiles.count; ++i) {
    const TileOf tile = tiles(p, i);
    const int weight = tile.column + own * p.upper;
#pragma unroll 1
    for (int k = 0; k < p.steps; ++k, slot.next(LARGE_DEPTH)) {
      unsigned char* to = memory.steps + slot.at * LARGE_STEP;
      Barrier* full = memory.full + slot.at;
      memory.empty[slot.at].wait_for_cluster(slot.phase ^ 1);
      full->arrive_and_expect(LARGE_STEP);
      copy_box(to, &p.x, tile.row, k * (BOX_BYTES / 2), full);
      copy_box_to(3, to + (1 + own) * LARGE_BOX, &p.weights, weight, k * (BOX_BYTES / 2), full);
    }
  }
}

// Eight outputs of a row; what they need beside their sums is read before any is waited for.
template <typename T>
struct Eight {
  int64_t at;
  bool ours;  // inside of `out`
  Raw<T> own, gated;
  uint4 residual[2];

  __device__ void read(const LargeParams& p, const unsigned char* from, int row, int output) {
    at = static_cast<int64_t>(row) * p.outputs + output;
    ours = row < p.rows && output < p.outputs;
    own.read(reinterpret_cast<const T*>(from));
    if (p.gated) gated.read(reinterpret_cast<const T*>(from + 2 * LARGE_BOX));
    if (!ours || !p.residual.data) return;
    const bool wide = p.residual.type == Type::float32;
    const auto* bytes = static_cast<const unsigned char*>(p.residual.data) + at * (wide ? 4 : 2);
    residual[0] = reinterpret_cast<const uint4*>(bytes)[0];
    if (wide) residual[1] = reinterpret_cast<const uint4*>(bytes)[1];
  }

  // Bias, activation or gate, and residual.
  __device__ void finish(const LargeParams& p, const float (&bias)[2][8]) const {
    if (!ours) return;
    float y[8], other[8];
    own.unpack(y);
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] += bias[0][i];
    activate8(y, p.activation);
    if (p.gated) {
      gated.unpack(other);
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] *= other[i] + bias[1][i];
    }
    if (p.residual.data) {
      load8(Operand{residual, p.residual.type}, 0, other);
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] += other[i];
    }
    if (p.out_type == Type::float32) {
      store8(static_cast<float*>(p.out) + at, y);
    } else {
      store8(static_cast<T*>(p.out) + at, y);
    }
  }
};

// A warp's part of a tile, one of so many.
template <typename T>
__device__ void finish_tile(const LargeParams& p, const LargeMemory& memory, const TileOf& tile,
                            int part, int parts) {
  constexpr int GROUP = 16, MINE = GROUP * 8 / 32;  // rows of a box that a warp takes, a lane's eights
  const int lane = threadIdx.x % 32, chunk = lane % 8, boxes = p.gated ? 2 : 4;
#pragma unroll 1
  for (int item = part; item < boxes * (LARGE_ROWS / GROUP); item += parts) {
    const int box = item % boxes, output = tile.column + box * (BOX_BYTES / 2) + chunk * 8;
    const int first = item / boxes * GROUP + lane / 8;
    float bias[2][8] = {};
    if (p.bias.data && output < p.outputs) {
      load8(p.bias, output, bias[0]);
      if (p.gated) load8(p.bias, output + p.upper, bias[1]);
    }
    Eight<T> eights[MINE];
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      const int row = first + i * (32 / 8);
      const unsigned char* at =
          memory.results + box * LARGE_BOX + row * BOX_BYTES + (chunk ^ row % 8) * 16;
      eights[i].read(p, at, tile.row + row, output);
    }
#pragma unroll
    for (int i = 0; i < MINE; ++i) eights[i].finish(p, bias);
  }
}

// The warps that do nothing else. Those that multiply help them with the last tile.
template <typename T>
__device__ void finish_tiles(const LargeParams& p, const LargeMemory& memory) {
  const int part = threadIdx.x / 32 - MULTIPLIERS - 1;
  const Tiles tiles(p);
#pragma unroll 1
  for (unsigned i = 0; i < tiles.count; ++i) {
    const bool last = i + 1 == tiles.count;
    memory.dumped->wait(i % 2);
    finish_tile<T>(p, memory, tiles(p, i), part, last ? FINISHERS + MULTIPLIERS : FINISHERS);
    memory.taken->arrive();
  }
}

// A warp's sums, rounded: rows g and g + 8 of its sixteen, columns 2t and 2t + 1 of every eight.
template <typename T>
__device__ void dump(unsigned char* results, const float (&sums)[LARGE_SUMS]) {
  using Two = typename TwoOf<T>::type;
  const int lane = threadIdx.x % 32, g = lane / 4;
  unsigned char* row = results + (threadIdx.x / 32 * 16 + g) * BOX_BYTES + lane % 4 * 4;
#pragma unroll
  for (int j = 0; j < LARGE_SUMS / 4; ++j) {
    unsigned char* at = row + j / 8 * LARGE_BOX + ((j % 8) ^ g) * 16;  // swizzled as boxes are
    Two low, high;
    low.x = narrow<T>(sums[4 * j]), low.y = narrow<T>(sums[4 * j + 1]);
    high.x = narrow<T>(sums[4 * j + 2]), high.y = narrow<T>(sums[4 * j + 3]);
    *reinterpret_cast<Two*>(at) = low;
    *reinterpret_cast<Two*>(at + 8 * BOX_BYTES) = high;
  }
}

template <typename T>
__device__ void multiply_tiles(const LargeParams& p, const LargeMemory& memory) {
  const int lane = threadIdx.x % 32, x = threadIdx.x / 128 * (LARGE_BOX / 2);
  const auto release = [&](int slot) {
    if (lane < 2) release_at(memory.empty + slot, lane);
  };
  RingSlot slot;
  float sums[LARGE_SUMS];
  const Tiles tiles(p);
#pragma unroll 1
  for (unsigned n = 0; n < tiles.count; ++n) {
#pragma unroll
    for (int i = 0; i < LARGE_SUMS; ++i) sums[i] = 0;
    hold(sums);
    int before = -1;  // the slot whose products may not be done yet
#pragma unroll 1
    for (int k = 0; k < p.steps; ++k) {
      const unsigned char* step = memory.steps + slot.at * LARGE_STEP;
      const uint64_t a = matrix(step + x), b = matrix(step + LARGE_BOX);
      memory.full[slot.at].wait(slot.phase);
      begin_products();
#pragma unroll
      for (int i = 0; i < 4; ++i) multiply_add<T, LARGE_WIDTH>(sums, a + 2 * i, b + 2 * i);
      close_products();
      await_products<1>();
      if (before >= 0) release(before);
      before = slot.at;
      slot.next(LARGE_DEPTH);
    }
    await_products<0>();
    hold(sums);
    release(before);
    memory.taken->wait(n % 2 ^ 1);
    dump<T>(memory.results, sums);
    memory.dumped->arrive();
  }
  const unsigned last = tiles.count - 1;
  memory.dumped->wait(last % 2);
  finish_tile<T>(p, memory, tiles(p, last), FINISHERS + threadIdx.x / 32, FINISHERS + MULTIPLIERS);
}

template <typename T>
__global__ void __launch_bounds__(LARGE_THREADS, 1)
    gemm_large_kernel(const __grid_constant__ LargeParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char shared[];
  __shared__ Barrier full[LARGE_DEPTH], empty[LARGE_DEPTH], dumped, taken;
  unsigned char* steps = shared + (-shared_address(shared) & (LARGE_ALIGNED - 1));
  const LargeMemory memory{steps, steps + LARGE_DEPTH * LARGE_STEP, full, empty, &dumped, &taken};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  let_next_start();
  if (threadIdx.x == 0) {
    prefetch(&p.x), prefetch(&p.weights);
    for (int i = 0; i < LARGE_DEPTH; ++i) full[i].init(1), empty[i].init(2 * MULTIPLIERS);
    dumped.init(32 * MULTIPLIERS), taken.init(32 * FINISHERS);
    fence_barriers();
  }
  __syncthreads();
  arrive_in_cluster(), await_cluster();
  if (warp < MULTIPLIERS) {
    multiply_tiles<T>(p, memory);
  } else {
    wait_for_last();
    if (warp > MULTIPLIERS) {
      finish_tiles<T>(p, memory);
    } else if (lane == 0) {
      copy_tiles(p, memory);
    }
  }
  // Nobody ends while the other block may still arrive here.
  __syncwarp();
  arrive_in_cluster(), await_cluster();
#endif
}

// How many clusters find room at a time on the current device.
template <typename T>
unsigned large_clusters() {
  static std::array<int, 64> found;
  static std::array<std::once_flag, 64> known;
  int device = 0;
  check(cudaGetDevice(&device), "device");
  std::call_once(known.at(device), [&] {
    found[device] = most_clusters(&gemm_large_kernel<T>, LARGE_THREADS, LARGE_SHARED, 2);
  });
  return static_cast<unsigned>(found[device]);
}

template <typename T>
bool gemm_large(const LinearParams& given, const Resources& use, Type type) {
  const Weights& w = given.weights;
  const int outputs = w.gated ? w.outputs / 2 : w.outputs, width = w.gated ? LARGE_ROWS : LARGE_WIDTH;
  const auto parts = [](int whole, int part) { return (whole + part - 1) / part; };
  const LargeParams p{.x = tensor_map(given.x.data, type, given.rows, w.inputs, LARGE_ROWS),
                      .weights = tensor_map(w.data, type, w.outputs, w.inputs, LARGE_ROWS),
                      .bias = given.bias,
                      .residual = given.residual,
                      .out = given.out,
                      .out_type = given.out_type,
                      .activation = given.activation,
                      .rows = given.rows,
                      .outputs = outputs,
                      .steps = parts(w.inputs, BOX_BYTES / 2),
                      .pairs = static_cast<unsigned>(parts(given.rows, 2 * LARGE_ROWS)),
                      .columns = static_cast<unsigned>(parts(outputs, width)),
                      .upper = w.gated ? outputs : LARGE_ROWS,
                      .gated = w.gated};
  const unsigned clusters = std::min(large_clusters<T>(), p.pairs * p.columns);
  if (!clusters) return false;
  launch(&gemm_large_kernel<T>, p, dim3(2 * clusters), LARGE_THREADS, LARGE_SHARED,
         early(use.gpu), use.stream, 2);
  return true;
}

}  // namespace lmi
