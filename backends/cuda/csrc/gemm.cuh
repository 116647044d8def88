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
#include "product.cuh"

namespace lmi {

constexpr int HALF_WARPS = 4, GEMM_WARPS = 2 * HALF_WARPS;  // a half of a tile is a warpgroup's
constexpr int GEMM_THREADS = (GEMM_WARPS + 1) * 32;         // and one warp copies
constexpr int HALF_BYTES = HALF * BOX_BYTES;

// x of type T has so many ROWS, filled up with zeros.
template <typename T_, typename W_, int ROWS_>
struct Gemm {
  using T = T_;
  using W = W_;
  static constexpr int ROWS = ROWS_;
  static constexpr int FEATURES = BOX_BYTES / sizeof(W);  // of a step
  static constexpr int X_FEATURES = BOX_BYTES / sizeof(T), X_BOXES = FEATURES / X_FEATURES;
  static constexpr int X_BYTES = ROWS * BOX_BYTES;  // of a box
  static constexpr int STEP_BYTES = 2 * HALF_BYTES + X_BOXES * X_BYTES;
  static constexpr int SUMS = ROWS / 2;       // that a thread has of a tile
  static constexpr int STRIDE = 2 * HALF + 4;  // of a tile's sums in shared memory: no two lanes'
                                               // are in one bank
  // Blocks whose sums are read at a time: one waits for some as long as for one.
  static constexpr unsigned MERGED = std::max(2, 32 / SUMS);
  static constexpr int TILE_BYTES = ROWS * STRIDE * 4;
  static constexpr int ALIGNED = 1024;
  static constexpr int DEPTH = (220 * 1024 - TILE_BYTES) / STEP_BYTES;
  static constexpr int BYTES = DEPTH * STEP_BYTES + TILE_BYTES + ALIGNED;

  struct Ring {
    unsigned char* steps;
    Barrier* full;
    Barrier* empty;

    __device__ unsigned char* weights(int slot, int half) const {
      return steps + slot * STEP_BYTES + half * HALF_BYTES;
    }
    __device__ unsigned char* x(int slot, int box) const {
      return steps + slot * STEP_BYTES + 2 * HALF_BYTES + box * X_BYTES;
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
    const int tile = step / p.steps, feature = step % p.steps * G::FEATURES;
    const int row = tile * (p.gated ? HALF : 2 * HALF);
    Barrier* full = ring.full + slot;
    full->arrive_and_expect(G::STEP_BYTES);
    copy_box(ring.weights(slot, 0), &p.weights, row, feature, full);
    copy_box(ring.weights(slot, 1), &p.weights, row + p.upper, feature, full);
  };
  const auto x = [&](unsigned step, int slot) {
    const int feature = step % p.steps * G::FEATURES;
#pragma unroll
    for (int i = 0; i < G::X_BOXES; ++i) {
      copy_box(ring.x(slot, i), &p.x, 0, feature + i * G::X_FEATURES, ring.full + slot);
    }
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
  // Of the output, and of what it gates.
  const int second = p.gated ? n + p.upper : n;
  const float scale[2] = {p.scale ? p.scale[n] : 1, p.scale ? p.scale[second] : 1};
  const float bias[2] = {p.bias.data ? load(p.bias, n) : 0, p.bias.data ? load(p.bias, second) : 0};
  constexpr int AT_ONCE = 8;  // residuals on their way: types and activations are branches
  const int step = GEMM_WARPS * 32 / width;
  const auto place = [&](int m) { return static_cast<int64_t>(min(m, p.rows - 1)) * p.outputs + n; };
#pragma unroll 1
  for (int first = thread / width; first < p.rows; first += AT_ONCE * step) {
    uint32_t more[AT_ONCE] = {};
    if (p.residual.data) {
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) more[i] = read(p.residual, place(first + i * step));
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int m = first + i * step;
      if (m >= p.rows) break;
      const float* sum = all + m * G::STRIDE + column;
      float y = activate(sum[0] * scale[0] + bias[0], p.activation);
      if (p.gated) y *= sum[HALF] * scale[1] + bias[1];
      store(p.out, p.out_type, place(m), y + widen(more[i], p.residual.type));
    }
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
  for (unsigned block = first; block <= last; block += G::MERGED) {
    float found[G::MERGED][G::SUMS];
#pragma unroll
    for (unsigned i = 0; i < G::MERGED; ++i) {
      const float* from = place(min(block + i, last));
#pragma unroll
      for (int j = 0; j < G::SUMS; ++j) found[i][j] = __ldcg(from + j * THREADS);
    }
#pragma unroll
    for (unsigned i = 0; i < G::MERGED; ++i) {
      const bool counts = block + i <= last;  // no branch, behind which reads would be put off
#pragma unroll
      for (int j = 0; j < G::SUMS; ++j) sums[j] += counts ? found[i][j] : 0;
    }
  }
  return true;
}

// A step's products, on their way. Quantized weights are widened in `held`, which must stay as it is
// until they are done.
template <typename G>
__device__ void multiply_step(const typename G::Ring& ring, int slot, int half,
                              float (&sums)[G::SUMS], uint32_t (&held)[G::FEATURES / 16][4]) {
  using T = typename G::T;
  using W = typename G::W;
  constexpr int IN_BOX = G::X_FEATURES / 16;
  if constexpr (sizeof(W) == 1) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    const unsigned char* row = ring.weights(slot, half) + lane % 4 * 2 +
                               (threadIdx.x / 32 % HALF_WARPS * 16 + g) * BOX_BYTES;
#pragma unroll
    for (int k = 0; k < G::FEATURES / 16; ++k) {
      const unsigned char* at = row + (k ^ g) * 16;  // the swizzle: g is also the row modulo eight
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto* two = reinterpret_cast<const uint16_t*>(at + i % 2 * 8 * BOX_BYTES + i / 2 * 8);
        held[k][i] = expand(*two, 0x4140, W(), T());
      }
    }
#pragma unroll
    for (int k = 0; k < G::FEATURES / 16; ++k) hold(held[k]);
    begin_products();
#pragma unroll
    for (int k = 0; k < G::FEATURES / 16; ++k) {  // 32 bytes further, in units of 16
      const uint64_t b = matrix(ring.x(slot, k / IN_BOX)) + 2 * (k % IN_BOX);
      multiply_add<T, G::ROWS>(sums, held[k], b);
    }
  } else {
    const uint64_t a = matrix(ring.weights(slot, half)), b = matrix(ring.x(slot, 0));
    begin_products();
#pragma unroll
    for (int k = 0; k < IN_BOX; ++k) multiply_add<T, G::ROWS>(sums, a + 2 * k, b + 2 * k);
  }
  close_products();
}

// The warpgroups that multiply.
template <typename G>
__device__ void multiply_steps(const GemmParams& p, const Share& share,
                               const typename G::Ring& ring, float* all, unsigned begin,
                               unsigned end) {
  const int half = threadIdx.x / (HALF_WARPS * 32);
  const bool tells = threadIdx.x % 32 == 0;
  typename G::Slot slot;
  int before = -1;  // the slot of the step whose products may not be done yet
  float sums[G::SUMS];
  // In turn: those of the last step are still being read while this one's are widened.
  uint32_t held[2][G::FEATURES / 16][4];
  const auto multiply = [&](int turn) {
    ring.full[slot.at].wait(slot.phase);
    multiply_step<G>(ring, slot.at, half, sums, held[turn]);
    await_products<1>();
    if (tells && before >= 0) ring.empty[before].arrive();
    before = slot.at;
    slot.next();
  };
#pragma unroll 1
  for (unsigned step = begin; step < end;) {
    const unsigned tile = step / p.steps, stop = min(end, (tile + 1) * p.steps);
#pragma unroll
    for (int j = 0; j < G::SUMS; ++j) sums[j] = 0;
    hold(sums);
#pragma unroll 1
    for (; step + 1 < stop; step += 2) multiply(0), multiply(1);
    if (step < stop) multiply(0), ++step;
    await_products<0>();
    hold(sums);
    if (tells) ring.empty[before].arrive();
    before = -1;
    if (merge<G>(p, share, tile, sums)) put<G>(p, tile, sums, all);
  }
}

template <typename G>
__global__ void __launch_bounds__(GEMM_THREADS, 1) gemm_kernel(const __grid_constant__ GemmParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
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
    multiply_steps<G>(p, share, ring, all, begin, end);
  } else if (threadIdx.x % 32 == 0) {
    copy_steps<G>(p, ring, begin, end);
  }
#endif
}

template <typename G>
bool launch_gemm(GemmParams p, const LinearParams& given, const Resources& use, Type type) {
  const int64_t steps = static_cast<int64_t>(p.tiles) * p.steps;
  const int64_t blocks = std::min<int64_t>(steps, use.gpu.processors);
  if (steps * (blocks + 1) > INT32_MAX ||
      use.work_floats < blocks * 2 * G::SUMS * GEMM_WARPS * 32) {
    return false;
  }
  p.x = tensor_map(given.x.data, type, given.rows, given.weights.inputs, G::ROWS);
  launch(&gemm_kernel<G>, p, dim3(static_cast<unsigned>(blocks)), GEMM_THREADS, G::BYTES,
         early(use.gpu), use.stream);
  return true;
}

// The product of `given`, x of type T, weights of type W.
template <typename T, typename W>
bool gemm(const LinearParams& given, const Resources& use, Type type) {
  const Weights& w = given.weights;
  const int outputs = w.gated ? w.outputs / 2 : w.outputs, tile = w.gated ? HALF : 2 * HALF;
  const int features = BOX_BYTES / sizeof(W);
  const GemmParams p{.weights = tensor_map(w.data, given.weight_type, w.outputs, w.inputs, HALF),
                     .x = {},
                     .bias = given.bias,
                     .residual = given.residual,
                     .scale = given.scale,
                     .out = given.out,
                     .work = given.work,
                     .counters = given.counters,
                     .out_type = given.out_type,
                     .activation = given.activation,
                     .rows = given.rows,
                     .outputs = outputs,
                     .tiles = static_cast<unsigned>((outputs + tile - 1) / tile),
                     .steps = static_cast<unsigned>((w.inputs + features - 1) / features),
                     .upper = w.gated ? outputs : HALF,
                     .gated = w.gated};
  if (given.rows <= 16) return launch_gemm<Gemm<T, W, 16>>(p, given, use, type);
  if (given.rows <= 32) return launch_gemm<Gemm<T, W, 32>>(p, given, use, type);
  return launch_gemm<Gemm<T, W, 64>>(p, given, use, type);
}

template <typename T>
bool gemm_of(const LinearParams& given, const Resources& use, Type type) {
  switch (given.weight_type) {
    case Type::int8: return gemm<T, int8_t>(given, use, type);
    case Type::float8: return gemm<T, __nv_fp8_e4m3>(given, use, type);
    default: return gemm<T, T>(given, use, type);
  }
}

}  // namespace lmi
