// A fused product as a kernel of its own, for few rows.
#pragma once

#include "multiply.cuh"

namespace lmi {

constexpr int WARPS = 8, THREADS = WARPS * 32;
constexpr int RING_SLOTS = WARPS * SLOT_BYTES;  // bytes of one slot of every warp

// How shared memory is used: as few splits as let x fit beside rings of a useful depth, two blocks
// on a processor if both find room. Its bytes, or 0.
template <typename X, int NT>
int share_out(LinearParams& p, const Resources& use, int& slots, int& at_once) {
  constexpr int STATIC = 1024;  // what the system takes is in it
  Weights& w = p.weights;
  const int room = use.gpu.shared_per_processor, most = use.gpu.shared_per_block - STATIC;
  for (int splits = std::max(use.splits, 1);; ++splits) {
    split(w, splits);
    const int row = row_stride<X>(std::min(w.slice, w.inputs)) * static_cast<int>(sizeof(X));
    const int fixed = 2 * PARTIALS<NT, WARPS> * static_cast<int>(sizeof(float)) + p.rows * row;
    for (at_once = 2; at_once > 0; --at_once) {
      slots = ring_slots((std::min(room / at_once - 2 * STATIC, most) - fixed) / RING_SLOTS);
      if (slots) return fixed + slots * RING_SLOTS;
    }
    if (w.slice == PAD) return 0;
  }
}

struct LaunchedLinear {
  LinearParams params;
  int slots;
};

template <typename Product, int NT>
__global__ void __launch_bounds__(THREADS, Product::AT_ONCE)
    linear_kernel(const __grid_constant__ LaunchedLinear launched) {
  using X = typename Product::X;
  using W = typename Product::W;
  // The warps' rings, the partial sums, and x.
  extern __shared__ __align__(128) unsigned char shared[];
  const LinearParams& p = launched.params;
  float* partial = reinterpret_cast<float*>(shared + launched.slots * RING_SLOTS);
  X* x = reinterpret_cast<X*>(partial + 2 * PARTIALS<NT, WARPS>);
  const Part part(p.weights, blockIdx.x, gridDim.x);

  let_next_start();
  Stream<W, WARPS> weights(&p.weights, 1, shared, launched.slots * WARPS);
  weights.fill();  // weights are nobody's results: the last kernel may still be at work
  const RowShare<WARPS> share(p.rows);
  NormTerms<X> norm;
  norm.read(p, part.begin + share.own, part.end, share.width * 8);
  wait_for_last();
  if (sizeof(X) < 4 && p.x.type == Type::float32) {
    stage<X, W, float>(p, share, norm, part.begin, part.end, x, partial);
  } else {
    stage<X, W, X>(p, share, norm, part.begin, part.end, x, partial);
  }
  __syncthreads();
  StagedRows<Product, NT, WARPS> rows{x, row_stride<X>(part.end - part.begin), p.rows};
  multiply<WARPS>(p, part, weights, rows, partial);
}

template <typename Product, int NT>
bool launch_rows(LinearParams p, const Resources& use) {
  int slots = 0, at_once = 0;
  Weights& w = p.weights;
  const int bytes = share_out<typename Product::X, NT>(p, use, slots, at_once);
  const bool enough = static_cast<int64_t>(w.tiles) * w.splits * NT * 128 <= use.work_floats;
  if (!bytes || (w.splits > 1 && !enough)) return false;

  const int places = std::max(1, use.gpu.processors * at_once / w.splits);
  const int rounds = (w.tiles + places - 1) / places;
  const dim3 grid((w.tiles + rounds - 1) / rounds * w.splits);
  launch(&linear_kernel<Product, NT>, LaunchedLinear{p, slots}, grid, THREADS, bytes,
         early(use.gpu), use.stream);
  return true;
}

}  // namespace lmi
