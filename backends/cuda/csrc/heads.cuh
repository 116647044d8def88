// Norm, a head's query, key and value, and attention with them, in one kernel for few rows.
//
// A cluster of blocks does a kv head with its query heads. Each block multiplies some tiles of their
// weights with all rows, and puts what comes out into the shared memory of the blocks that want it;
// then they share out the rows, and where these are few, rows' tokens. In front of small products it
// is starting a kernel, and waiting for what the last one wrote, that takes time: here it is done once
// for two kernels. A block's weights have room in its shared memory as a whole, so all of them, and
// its first keys and values, are on their way before the last kernel has ended.
#pragma once

#include "attention.cuh"
#include "cluster.cuh"
#include "heads.h"
#include "multiply.cuh"

namespace lmi {

constexpr int TEAM_WARPS = 8;           // that attend together
constexpr int MOST_CLUSTER = 8;         // more is not portable
constexpr int MOST_WEIGHTS = 80 << 10;  // bytes a block: with more it is reading that takes time

#if __CUDA_ARCH__ >= 900  // clusters

__device__ inline int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster arrive, and later wait until all have. Relaxed: nothing that was written
// before needs to be seen.
__device__ inline void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Write to where another block of the cluster has what lies at `own` here.
template <typename T>
__device__ void store_at(int rank, const T* own, T value) {
  const uint16_t bits = reinterpret_cast<const uint16_t&>(value);
  asm volatile("st.shared::cluster.u16 [%0], %1;" ::"r"(in_block(own, rank)), "h"(bits) : "memory");
}

// The first of a tile's rows in the fused weights.
__device__ inline int tile_row(const HeadsParams& p, int kv, int tile) {
  const AttentionParams& a = p.attention;
  const int tiles = a.dim / TILE, part = tile / tiles;
  const int head =
      part < p.group ? kv * p.group + part : a.heads + (part - p.group) * a.kv_heads + kv;
  return head * a.dim + tile % tiles * TILE;
}

// Start copying the block's tiles, each warp the units that it will multiply.
template <typename T, int WARPS>
__device__ void fetch_tiles(const HeadsParams& p, int kv, int rank, unsigned char* to) {
  const int lane = threadIdx.x % 32, inputs = p.product.weights.inputs;
  uint32_t tile_at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
#pragma unroll 1
  for (int tile = rank; tile < p.tiles; tile += p.cluster, tile_at += p.units * SLOT_BYTES) {
    const T* rows = static_cast<const T*>(p.product.weights.data) +
                    static_cast<int64_t>(tile_row(p, kv, tile) + lane / 8) * inputs;
#pragma unroll 1
    for (int unit = threadIdx.x / 32; unit < p.units; unit += WARPS) {
      const int feature = unit * UNIT<T> + lane % 8 * 8;
      const bool present = feature < inputs;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int place = in_slot(i * 4 + lane / 8, lane % 8) * 16;
        copy16(tile_at + unit * SLOT_BYTES + place, rows + i * 4 * inputs + (present ? feature : 0),
               present);
      }
    }
  }
  close_group();
}

// The block's tiles times x, which is staged: each warp leaves its sums.
template <typename Product, int NT, int WARPS>
__device__ void multiply_tiles(const HeadsParams& p, int rank, const unsigned char* tiles,
                               const typename Product::X* x, float* partial) {
  using W = typename Product::W;
  const int stride = row_stride<W>(p.product.weights.inputs);
#pragma unroll 1
  for (int tile = rank; tile < p.tiles; tile += p.cluster) {
    Product product;
#pragma unroll 1
    for (int unit = threadIdx.x / 32; unit < p.units; unit += WARPS) {
      const Chunks weights = read_chunks(tiles + unit * SLOT_BYTES);
      product.add(weights, x + unit * UNIT<W>, stride, p.product.rows);
    }
    float sums[NT][4];
    product.finish(sums);
    leave_sums<NT>(sums, partial);
    tiles += p.units * SLOT_BYTES, partial += PARTIALS<NT, WARPS>;
  }
}

// The biases of two rows of the weights, on their way.
struct Biases {
  uint32_t low = 0, high = 0;

  __device__ void read_of(const HeadsParams& p, int kv, int tile, int g) {
    if (!p.product.bias.data || tile >= p.tiles) return;
    const int row = tile_row(p, kv, tile) + g;
    low = read(p.product.bias, row), high = read(p.product.bias, row + 8);
  }
};

// Add up the block's tiles, each by NT * 64 threads, and put a row's features where its items are
// attended: item number i of the kv head, by splits, rows and heads, in block i % cluster.
template <typename T, int NT>
__device__ void send_tiles(const HeadsParams& p, int kv, int rank, Biases biases,
                           const float* partial, T* made) {
  constexpr int WARPS = TEAM_WARPS * NT, AT_ONCE = WARPS * 32 / (NT * 64);
  const Place<NT> at(threadIdx.x % (NT * 64));
  const int rows = p.product.rows, dim = p.attention.dim;
  int turn = threadIdx.x / (NT * 64);
#pragma unroll 1
  for (int tile = rank + turn * p.cluster; tile < p.tiles && at.m < rows;
       tile += AT_ONCE * p.cluster, turn += AT_ONCE) {
    const float2 sum = add_sums<NT, WARPS>(at, partial + turn * PARTIALS<NT, WARPS>);
    const Type type = p.product.bias.type;
    const T low = narrow<T>(sum.x + widen(biases.low, type));
    const T high = narrow<T>(sum.y + widen(biases.high, type));
    T* to = made + at.m * p.parts * dim + tile * TILE + at.g;
#pragma unroll 1
    for (int split = 0; split < p.attention.splits; ++split) {
#pragma unroll 1
      for (int head = 0; head < p.group; ++head) {
        const int block = ((split * rows + at.m) * p.group + head) & (p.cluster - 1);
        store_at(block, to, low);
        store_at(block, to + 8, high);
      }
    }
    biases.read_of(p, kv, tile + AT_ONCE * p.cluster, at.g);
  }
}

// A kv head's item, its first keys under way; beyond the last one, nothing.
template <typename T, int N>
__device__ Item<1> begin_item(const AttentionParams& a, const HeadsParams& p, int kv, int number,
                              const Lane& lane, Keys<T, 1, N>& keys) {
  const int heads = a.kv_heads * p.group, last = a.rows * p.group * a.splits - 1;
  const int of_kv = min(number, last);
  const Item<1> it(a, of_kv / p.group * heads + kv * p.group + of_kv % p.group);
  if (number <= last && it.has_work()) read_first(a, it, lane, keys);
  return it;
}

#endif

// x is of type From.
template <typename T, typename From, int NT>
__global__ void __launch_bounds__(NT * TEAM_WARPS * 32, 1)
    heads_kernel(const __grid_constant__ HeadsParams p) {
#if __CUDA_ARCH__ >= 900  // on others there are no clusters, and no kernel to launch
  constexpr int WARPS = TEAM_WARPS * NT, N = KEYS<T> / NT;
  extern __shared__ __align__(128) unsigned char shared[];
  T* made = reinterpret_cast<T*>(shared + p.made_at);
  float* partial = reinterpret_cast<float*>(shared + p.partial_at);
  T* x = reinterpret_cast<T*>(shared + p.x_at);
  const int kv = blockIdx.x / p.cluster, rank = cluster_rank();
  const int dim = p.attention.dim;

  let_next_start();
  cluster_arrive_relaxed();
  fetch_tiles<T, WARPS>(p, kv, rank, shared);
  Biases biases;
  biases.read_of(p, kv, rank + threadIdx.x / (NT * 64) * p.cluster, threadIdx.x % 32 / 4);

  AttentionParams a = p.attention;  // it counts heads from the first one on
  a.q = made - kv * p.group * dim;
  a.new_k = p.write ? made + (p.group - kv) * dim : nullptr;
  a.new_v = p.write ? made + (p.group + 1 - kv) * dim : nullptr;
  a.q_stride = p.parts * dim;
  constexpr int TEAM = TEAM_WARPS * 32;
  const int thread = threadIdx.x;
  const Team team = {NT == 1 ? 0 : thread / TEAM + 1, thread % TEAM, TEAM_WARPS};
  const int items = a.rows * p.group * a.splits;
  float* of_team = partial + team.place() * shared_floats(1, TEAM_WARPS, dim);
  const Lane lane(a, team);
  Keys<T, 1, N> keys;
  int index = rank + team.place() * p.cluster;
  Item<1> it = begin_item(a, p, kv, index, lane, keys);
  const RowShare<WARPS> share(p.product.rows);
  NormTerms<T> norm;
  norm.read(p.product, share.own, p.product.weights.inputs, share.width * 8);

  wait_for_last();
  stage<T, T, From>(p.product, share, norm, 0, p.product.weights.inputs, x, partial);
  await<0>();
  __syncthreads();
  multiply_tiles<TensorProduct<T, T, NT>, NT, WARPS>(p, rank, shared, x, partial);
  __syncthreads();
  cluster_wait();  // all blocks have begun: their shared memory is theirs
  send_tiles<T, NT>(p, kv, rank, biases, partial, made);
  cluster_arrive();
  cluster_wait();  // and nobody writes to another's any more

#pragma unroll 1
  while (index < items) {
    if (it.has_work()) attend<T, 1, false>(a, it, index, 0, team, lane, keys, of_team);
    index += NT * p.cluster;
    if (index >= items) break;
    team.sync();  // everybody has read what was shared
    it = begin_item(a, p, kv, index, lane, keys);
  }
#endif
}

// How blocks share the work and their memory; the bytes of that, or 0: not covered.
template <typename T, int NT>
int arrange(HeadsParams& p, const Device& gpu) {
  AttentionParams& a = p.attention;
  const int inputs = p.product.weights.inputs;
  arrange(a, 1);  // heads are attended one by one
  p.group = a.heads / a.kv_heads, p.parts = p.group + (p.write ? 2 : 0);
  p.tiles = p.parts * a.dim / TILE, p.units = (inputs + UNIT<T> - 1) / UNIT<T>;
  p.cluster = MOST_CLUSTER;
  while (p.cluster > 1 && a.kv_heads * p.cluster > gpu.processors) p.cluster /= 2;
  a.splits = std::min(a.splits, std::max(1, p.cluster * NT / (a.rows * p.group)));

  const int own = (p.tiles + p.cluster - 1) / p.cluster;
  p.made_at = own * p.units * SLOT_BYTES;
  p.partial_at = p.made_at + a.rows * p.parts * a.dim * static_cast<int>(sizeof(T));
  p.x_at = p.partial_at + own * PARTIALS<NT, TEAM_WARPS * NT> * static_cast<int>(sizeof(float));
  const int x_end = p.x_at + a.rows * row_stride<T>(inputs) * static_cast<int>(sizeof(T));
  const int floats = NT * shared_floats(1, TEAM_WARPS, a.dim);
  const int end = std::max(x_end, p.partial_at + floats * static_cast<int>(sizeof(float)));
  constexpr int STATIC = 1024;  // what the system takes is in it
  const bool covered = gpu.major >= 9 && p.cluster > 1 && a.dim % TILE == 0 &&
                       p.made_at <= MOST_WEIGHTS && end <= gpu.shared_per_block - STATIC;
  return covered ? end : 0;
}

template <typename T, typename From, int NT>
bool launch_heads(HeadsParams p, const Device& gpu, cudaStream_t stream) {
  const int bytes = arrange<T, NT>(p, gpu), threads = NT * TEAM_WARPS * 32;
  if (!bytes) return false;
  const dim3 grid(p.attention.kv_heads * p.cluster);
  const auto kernel = &heads_kernel<T, From, NT>;
  if (!most_clusters(kernel, threads, bytes, p.cluster)) return false;
  launch(kernel, p, grid, threads, bytes, early(gpu), stream, p.cluster);
  return true;
}

template <typename T, typename From>
bool launch_rows(const HeadsParams& p, const Device& gpu, cudaStream_t stream) {
  if (p.product.rows <= 8) return launch_heads<T, From, 1>(p, gpu, stream);
  return launch_heads<T, From, 2>(p, gpu, stream);
}

template <typename T>
bool launch_heads(const HeadsParams& p, const Device& gpu, cudaStream_t stream) {
  if (p.product.x.type == Type::float32) return launch_rows<T, float>(p, gpu, stream);
  return launch_rows<T, T>(p, gpu, stream);
}

}  // namespace lmi
