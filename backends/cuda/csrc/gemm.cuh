// A fused product for up to 64 rows. Weights stream through a ring in shared memory, which the copy
// engine fills while tensor cores multiply; every weight byte is read once.
//
// All tiles' steps form one sequence, which blocks share evenly ("Stream-K", Osama et al., 2023):
// none idles while others have a tile left. A tile whose steps several blocks have is finished by
// the one that is done last: it adds up, always in the same order, what each has left in memory.
#pragma once

#include "activation.cuh"
#include "gemm.h"
#include "hopper.cuh"

namespace lmi {

constexpr int HALF_WARPS = 4, GEMM_WARPS = 2 * HALF_WARPS;  // a half of a tile is a warpgroup's
constexpr int GEMM_THREADS = (GEMM_WARPS + 1) * 32;         // and one warp copies
constexpr int HALF_BYTES = HALF * TILE_FEATURES * 2;

// ROWS of x, filled up with zeros.
template <typename T, int ROWS>
struct Gemm {
  static constexpr int X_BYTES = ROWS * TILE_FEATURES * 2;
  static constexpr int STEP_BYTES = 2 * HALF_BYTES + X_BYTES;
  static constexpr int SUMS = ROWS / 2;       // that a thread has of a tile
  static constexpr int STRIDE = 2 * HALF + 4;  // of a tile's sums in shared memory: no two lanes'
                                               // are in one bank
  static constexpr int TILE_BYTES = ROWS * STRIDE * 4;
  static constexpr int ALIGNED = 1024;
  static constexpr int DEPTH = std::min(12, (220 * 1024 - TILE_BYTES) / STEP_BYTES);
  static constexpr int BYTES = DEPTH * STEP_BYTES + TILE_BYTES + ALIGNED;

  struct Ring {
    unsigned char* steps;
    Barrier* full;
    Barrier* empty;

    __device__ unsigned char* weights(int slot, int half) const {
      return steps + slot * STEP_BYTES + half * HALF_BYTES;
    }
    __device__ unsigned char* x(int slot) const {
      return steps + slot * STEP_BYTES + 2 * HALF_BYTES;
    }
  };

  // Where in the ring a step is, and the phase of its barriers.
  struct Slot {
    int at = 0, phase = 0;

    __device__ void next() {
      if (++at == DEPTH) at = 0, phase ^= 1;
    }
  };
};

// The steps of all tiles in a row, and what of them a block has.
struct Share {
  unsigned total, blocks;  // their product fits 32 bits

  __device__ unsigned begin(unsigned block) const { return block * total / blocks; }
  __device__ unsigned owner(unsigned step) const { return ((step + 1) * blocks - 1) / total; }
};

// The warp that copies: all of a block's steps, as many ahead of their use as there is room.
template <typename G>
__device__ void copy_steps(const GemmParams& p, const typename G::Ring& ring, unsigned begin,
                           unsigned end) {
  const auto weights = [&](unsigned step, int slot) {
    const int tile = step / p.steps, feature = step % p.steps * TILE_FEATURES;
    const int row = tile * (p.gated ? HALF : 2 * HALF);
    Barrier* full = ring.full + slot;
    full->arrive_and_expect(G::STEP_BYTES);
    copy_box(ring.weights(slot, 0), &p.weights, row, feature, full);
    copy_box(ring.weights(slot, 1), &p.weights, row + p.upper, feature, full);
  };
  const auto x = [&](unsigned step, int slot) {
    copy_box(ring.x(slot), &p.x, 0, step % p.steps * TILE_FEATURES, ring.full + slot);
  };
  // Weights are nobody's results: the last kernel may still be at work.
  const unsigned first = min(end, begin + G::DEPTH);
#pragma unroll 1
  for (unsigned step = begin; step < first; ++step) weights(step, step - begin);
  wait_for_last();
#pragma unroll 1
  for (unsigned step = begin; step < first; ++step) x(step, step - begin);
  typename G::Slot slot;
#pragma unroll 1
  for (unsigned step = first; step < end; ++step) {
    ring.empty[slot.at].wait(slot.phase);
    weights(step, slot.at);
    x(step, slot.at);
    slot.next();
  }
}

// What a tile's sums become: bias, activation or gate, residual. A thread's sums are those of two
// weight rows, eight apart, for two neighbouring rows of x in each eight; what it finishes is one
// output of every other row.
template <typename G>
__device__ void put(const GemmParams& p, int tile, const float (&sums)[G::SUMS], float* all) {
  const int thread = threadIdx.x, lane = thread % 32;
  const Team both{1, thread, GEMM_WARPS};
  both.sync();  // the last tile's have been read
  float* own = all + lane % 4 * 2 * G::STRIDE + thread / 32 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < G::SUMS; ++j) {
    own[(j / 4 * 8 + j % 2) * G::STRIDE + j / 2 % 2 * 8] = sums[j];
  }
  both.sync();
  const int width = p.gated ? HALF : 2 * HALF, column = thread % width, n = tile * width + column;
  if (n >= p.outputs) return;
  const float bias = p.bias.data ? load(p.bias, n) : 0;
  const float gated = p.bias.data && p.gated ? load(p.bias, n + p.upper) : 0;
#pragma unroll 4
  for (int m = thread / width; m < p.rows; m += GEMM_WARPS * 32 / width) {
    const int64_t at = static_cast<int64_t>(m) * p.outputs + n;
    const float more = p.residual.data ? load(p.residual, at) : 0;
    float y = activate(all[m * G::STRIDE + column] + bias, p.activation);
    if (p.gated) y *= all[m * G::STRIDE + column + HALF] + gated;
    store(p.out, p.out_type, at, y + more);
  }
}

// Leave what this block has of a tile, or, if all others have done so, take the sum of all; false
// if it was left.
template <typename G>
__device__ bool merge(const GemmParams& p, const Share& share, int tile, float (&sums)[G::SUMS]) {
  constexpr int THREADS = GEMM_WARPS * 32;
  const unsigned start = tile * p.steps;
  const unsigned first = share.owner(start), last = share.owner(start + p.steps - 1);
  if (first == last) return true;
  // A block has at most two such tiles: the one that it begins with, and another.
  const auto place = [&](unsigned block) {
    const int other = share.begin(block) < start;
    return p.work + (static_cast<int64_t>(block) * 2 + other) * G::SUMS * THREADS + threadIdx.x;
  };
  float* own = place(blockIdx.x);
#pragma unroll
  for (int j = 0; j < G::SUMS; ++j) __stcg(own + j * THREADS, sums[j]);
  const Team both{1, static_cast<int>(threadIdx.x), GEMM_WARPS};
  if (!is_last_part(both, p.counters + tile, last - first + 1)) return false;
#pragma unroll
  for (int j = 0; j < G::SUMS; ++j) sums[j] = 0;
#pragma unroll 1
  for (unsigned block = first; block <= last; ++block) {
    const float* from = place(block);
#pragma unroll
    for (int j = 0; j < G::SUMS; ++j) sums[j] += __ldcg(from + j * THREADS);
  }
  return true;
}

// The warpgroups that multiply.
template <typename T, int ROWS>
__device__ void multiply_steps(const GemmParams& p, const Share& share,
                               const typename Gemm<T, ROWS>::Ring& ring, float* all,
                               unsigned begin, unsigned end) {
  using G = Gemm<T, ROWS>;
  const int half = threadIdx.x / (HALF_WARPS * 32);
  const bool tells = threadIdx.x % 32 == 0;
  typename G::Slot slot;
#pragma unroll 1
  for (unsigned step = begin; step < end;) {
    const int tile = step / p.steps;
    const unsigned stop = min(end, (tile + 1) * p.steps);
    float sums[G::SUMS];
#pragma unroll
    for (int j = 0; j < G::SUMS; ++j) sums[j] = 0;
    hold(sums);
    int before = -1;  // the slot of the step whose products may not be done yet
#pragma unroll 1
    for (; step < stop; ++step) {
      ring.full[slot.at].wait(slot.phase);
      const uint64_t a = matrix(ring.weights(slot.at, half)), b = matrix(ring.x(slot.at));
      begin_products();
#pragma unroll
      for (int k = 0; k < TILE_FEATURES / 16; ++k) {  // 32 bytes further, in units of 16
        multiply_add<T, ROWS>(sums, a + 2 * k, b + 2 * k, false);
      }
      close_products();
      await_products<1>();
      if (tells && before >= 0) ring.empty[before].arrive();
      before = slot.at;
      slot.next();
    }
    await_products<0>();
    hold(sums);
    if (tells && before >= 0) ring.empty[before].arrive();
    if (merge<G>(p, share, tile, sums)) put<G>(p, tile, sums, all);
  }
}

template <typename T, int ROWS>
__global__ void __launch_bounds__(GEMM_THREADS, 1) gemm_kernel(const __grid_constant__ GemmParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using G = Gemm<T, ROWS>;
  extern __shared__ unsigned char shared[];
  __shared__ Barrier full[G::DEPTH], empty[G::DEPTH];
  unsigned char* aligned = shared + (-shared_address(shared) & (G::ALIGNED - 1));
  const typename G::Ring ring{aligned, full, empty};
  float* all = reinterpret_cast<float*>(aligned + G::DEPTH * G::STEP_BYTES);
  const Share share{p.tiles * p.steps, gridDim.x};
  const unsigned begin = share.begin(blockIdx.x), end = share.begin(blockIdx.x + 1);

  let_next_start();
  if (threadIdx.x == 0) {
    for (int i = 0; i < G::DEPTH; ++i) full[i].init(1), empty[i].init(GEMM_WARPS);
    fence_barriers();
  }
  __syncthreads();
  if (threadIdx.x / 32 < GEMM_WARPS) {
    wait_for_last();
    multiply_steps<T, ROWS>(p, share, ring, all, begin, end);
  } else if (threadIdx.x % 32 == 0) {
    copy_steps<G>(p, ring, begin, end);
  }
#endif
}

template <typename T, int ROWS>
bool launch_gemm(GemmParams& p, const LinearParams& given, const Resources& use, Type type) {
  using G = Gemm<T, ROWS>;
  const int64_t steps = static_cast<int64_t>(p.tiles) * p.steps;
  const int64_t blocks = std::min<int64_t>(steps, use.gpu.processors);
  if (steps * (blocks + 1) > INT32_MAX ||
      use.work_floats < blocks * 2 * G::SUMS * GEMM_WARPS * 32) {
    return false;
  }
  p.x = tensor_map(given.x.data, type, given.rows, given.weights.inputs, ROWS);
  launch(&gemm_kernel<T, ROWS>, p, dim3(static_cast<unsigned>(blocks)), GEMM_THREADS, G::BYTES, early(use.gpu),
         use.stream);
  return true;
}

// The product of `given`, whose weights and x are of type T.
template <typename T>
bool gemm(const LinearParams& given, const Resources& use, Type type) {
  const Weights& w = given.weights;
  const int outputs = w.gated ? w.outputs / 2 : w.outputs, tile = w.gated ? HALF : 2 * HALF;
  GemmParams p{.weights = tensor_map(w.data, type, w.outputs, w.inputs, HALF),
               .x = {},
               .bias = given.bias,
               .residual = given.residual,
               .out = given.out,
               .work = given.work,
               .counters = given.counters,
               .out_type = given.out_type,
               .activation = given.activation,
               .rows = given.rows,
               .outputs = outputs,
               .tiles = static_cast<unsigned>((outputs + tile - 1) / tile),
               .steps = static_cast<unsigned>((w.inputs + TILE_FEATURES - 1) / TILE_FEATURES),
               .upper = w.gated ? outputs : HALF,
               .gated = w.gated};
  if (given.rows <= 16) return launch_gemm<T, 16>(p, given, use, type);
  if (given.rows <= 32) return launch_gemm<T, 32>(p, given, use, type);
  return launch_gemm<T, 64>(p, given, use, type);
}

}  // namespace lmi
