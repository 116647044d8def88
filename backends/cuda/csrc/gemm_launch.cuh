// How blocks share a product of 9 to 64 rows, and its launch.
#pragma once

#include <array>
#include <mutex>

#include "gemm.cuh"

namespace lmi {

constexpr unsigned MOST_SPLITS = 8;  // what clusters may have on every chip

// How many clusters of 1, 2, 4 and 8 blocks find room at a time, by the chip's make: its processors
// are in groups, which a cluster does not leave.
template <typename G>
const std::array<unsigned, 4>& places(const Device& gpu) {
  static std::array<std::array<unsigned, 4>, 64> found;
  static std::array<std::once_flag, 64> known;
  int device = 0;
  check(cudaGetDevice(&device), "device");
  std::call_once(known.at(device), [&] {
    const int shared = G::ROOM + G::PARTS + G::ALIGNED;
    const auto* kernel = reinterpret_cast<const void*>(&gemm_kernel<G>);
    allow_shared(kernel, shared);
    // So that a second block, the next product's, finds room.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared),
          "shared memory");
    for (unsigned i = 0; i < 4; ++i) {
      Attributes how(Start::after_last, 1u << i);
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(1u << i);
      config.blockDim = dim3(GEMM_THREADS);
      config.dynamicSmemBytes = shared;
      config.attrs = how.list;
      config.numAttrs = how.count;
      int clusters = 0;
      // A part of a GPU may have room for none.
      if (cudaOccupancyMaxActiveClusters(&clusters, &gemm_kernel<G>, &config)) cudaGetLastError();
      found[device][i] = std::min(clusters, gpu.processors >> i);
    }
  });
  return found[device];
}

// What a block does, and what that takes.
struct Plan {
  unsigned splits, clusters, depth;
  int stride, shared;  // bytes of a step, and of everything
  bool keep;
  int64_t cost;
};

template <typename G>
Plan plan(const GemmParams& p, unsigned splits, unsigned places) {
  const int64_t rounds = (p.tiles + places - 1) / places;
  const int64_t slice = (p.steps + splits - 1) / splits;
  // x is the same for all tiles: keep it if that costs no depth.
  const int64_t streamed = G::ROOM / (G::WEIGHT_BYTES + G::X_BYTES);
  const int64_t kept = (G::ROOM - slice * G::X_BYTES) / G::WEIGHT_BYTES;
  const bool keep = rounds > 1 && slice <= MOST_KEPT && kept >= streamed;
  // Bytes that a block brings in: those of weights come from memory, which is slower than L2; and
  // a tile's end costs as much as some.
  constexpr int64_t END = 8 << 10;
  const int64_t weights = rounds * slice * G::WEIGHT_BYTES;
  const int64_t all = weights + (keep ? 1 : rounds) * slice * G::X_BYTES;
  const int64_t depth = std::min({keep ? kept : streamed, rounds * slice, int64_t{MOST_DEPTH}});
  const int64_t stride = G::WEIGHT_BYTES + (keep ? 0 : G::X_BYTES);
  const int64_t shared = G::ALIGNED + G::PARTS + depth * stride + (keep ? slice * G::X_BYTES : 0);
  return {.splits = splits,
          .clusters = static_cast<unsigned>((p.tiles + rounds - 1) / rounds),
          .depth = static_cast<unsigned>(depth),
          .stride = static_cast<int>(stride),
          .shared = static_cast<int>(shared),
          .keep = keep,
          .cost = std::max(weights + weights / 4, all) + rounds * END};
}

template <typename G>
Plan best_plan(const GemmParams& p, const Device& gpu) {
  const auto& found = places<G>(gpu);
  Plan best = plan<G>(p, 1, found[0]);
  for (unsigned i = 1; 1u << i <= std::min({MOST_SPLITS, p.steps, G::ROWS / 2u}); ++i) {
    if (!found[i]) break;
    const Plan other = plan<G>(p, 1u << i, found[i]);
    if (other.cost < best.cost) best = other;
  }
  return best;
}

template <typename G>
bool launch_gemm(GemmParams p, const LinearParams& given, const Resources& use, Type type) {
  if (!places<G>(use.gpu)[0]) return false;
  const Plan best = best_plan<G>(p, use.gpu);
  p.splits = best.splits, p.depth = best.depth, p.stride = best.stride, p.keep = best.keep;
  p.x = tensor_map(given.x.data, type, given.rows, given.weights.inputs, G::ROWS);
  launch(&gemm_kernel<G>, p, dim3(best.clusters * best.splits), GEMM_THREADS,
         best.shared, early(use.gpu), use.stream, best.splits);
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
                     .out_type = given.out_type,
                     .activation = given.activation,
                     .rows = given.rows,
                     .outputs = outputs,
                     .tiles = static_cast<unsigned>((outputs + tile - 1) / tile),
                     .steps = static_cast<unsigned>((w.inputs + features - 1) / features),
                     .splits = 1,
                     .depth = 0,
                     .stride = 0,
                     .upper = w.gated ? outputs : HALF,
                     .gated = w.gated,
                     .keep = false};
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
