// What a block of prefill_long.cuh has in shared memory, and how it comes there.
//
// Queries, keys and values lie in panels of 64 features, rows of 128 bytes, whose chunks of 16 bytes
// are permuted as the copy engine does: products expect that.
#pragma once

#include "copy.cuh"
#include "hopper.cuh"
#include "prefill_tile.cuh"
#include "tensor_map.h"

namespace lmi {

constexpr int GROUP = 128, GROUPS = 2;  // threads that multiply together, and how many such groups
constexpr int LONG_THREADS = (1 + GROUPS) * GROUP;
constexpr int LONG_ALIGNED = 1024;

// What a kernel is made for. D_: the head's features, filled up with zeros.
template <int D_>
struct LongShape {
  static constexpr int D = D_, PANELS = D / 64;
  static constexpr int QUERIES = GROUPS * 64, KEYS = D > 128 ? 64 : 128;  // of a tile
  static constexpr int DEPTH = 2;                                         // tiles in the ring
  static constexpr int HELD = QUERIES * D * 2, TILE = KEYS * D * 2;       // bytes
  static constexpr int MEMORY = LONG_ALIGNED + HELD + DEPTH * 2 * TILE;
  // Registers of a thread that copies, and of one that multiplies; three groups share 504.
  static constexpr int TO_COPY = D > 128 ? 40 : 56, TO_MULTIPLY = (504 - TO_COPY) / 2;
  static constexpr int AT_ONCE = D > 128 ? 1 : 4;  // copies, which few registers allow
  // Distances beyond the bias' ends that a tile which sees any before them may ask for.
  static constexpr int BEYOND = QUERIES + KEYS;

  static int shared(int distances) {
    constexpr int BARRIERS = 256;  // what the kernel has besides, and some more
    const int bias = distances ? distances + 2 * BEYOND : 0;
    return BARRIERS + MEMORY + bias * static_cast<int>(sizeof(float));
  }
};

struct LongParams : PrefillParams {
  CUtensorMap keys, values;  // [tokens, heads, dim], in boxes of `box` tokens of a head's 64 features
  int box;
};

template <typename S>
struct LongMemory {
  unsigned char *queries, *tiles;
  float* bias;  // of the block's head, base 2
  Barrier* held;  // queries are there
  Barrier (*full)[S::DEPTH], (*empty)[S::DEPTH];  // of keys, and of values

  __device__ unsigned char* tile(int at, int side) const {
    return tiles + (2 * at + side) * S::TILE;
  }
};

// What generic stores and copies have left in shared memory, products may read.
__device__ inline void fence_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int COUNT>
__device__ inline void give_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

template <int COUNT>
__device__ inline void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// Start copying rows into panels: the token that `token` says, or zeros where that is negative.
template <typename T, typename S, int ROWS, typename Token>
__device__ void copy_rows(unsigned char* to, const T* from, int64_t stride, int dim,
                          const Token& token) {
  constexpr int CHUNKS = S::D / 8, STEP = GROUP / CHUNKS, AT_ONCE = S::AT_ONCE;
  const int chunk = threadIdx.x % CHUNKS;
  from += chunk * 8;
  to += chunk / 8 * (ROWS * 128);
#pragma unroll 1
  for (int first = threadIdx.x / CHUNKS; first < ROWS; first += STEP * AT_ONCE) {
    int at[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) at[i] = chunk * 8 < dim ? token(first + i * STEP) : -1;
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int row = first + i * STEP;
      copy16(shared_address(to + row * 128 + ((chunk ^ row) & 7) * 16),
             at[i] < 0 ? from : from + at[i] * stride, at[i] >= 0);
    }
  }
}

// Where a row's token lies: in the cache, or among the packed ones.
__device__ inline int token_at(const PrefillParams& p, const Tile& tile, int key) {
  if (!p.table) return tile.begin + key;
  const int block = p.table[static_cast<int64_t>(tile.row) * p.table_width + (key >> p.block_shift)];
  return (block << p.block_shift) + (key & ((1 << p.block_shift) - 1));
}

// Have the copy engine fetch a tile's keys or values, all of which the row has: a lane for each box.
template <typename S>
__device__ void fetch_tile(const LongParams& p, const Tile& tile, const CUtensorMap* from, int first,
                           unsigned char* to, Barrier* full) {
  const int lane = threadIdx.x % 32, boxes = S::KEYS / p.box;
  if (lane == 0) full->arrive_and_expect(S::TILE);
  __syncwarp();
  if (lane >= boxes * S::PANELS) return;
  const int box = lane % boxes * p.box, panel = lane / boxes;
  copy_box(to + (panel * S::KEYS + box) * 128, from, token_at(p, tile, first + box), tile.kv,
           panel * 64, full);
}

// What the copying warps do. The row's last keys they copy by themselves, with zeros behind them: what
// lies there may be anything.
template <typename T, typename S>
__device__ void copy_long(const LongParams& p, const Tile& tile, int tiles,
                          const LongMemory<S>& memory) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto announce = [&](Barrier* full) {
    await<0>();
    fence_products();
    __syncwarp();
    if (lane == 0) full->arrive();
  };
  copy_rows<T, S, S::QUERIES>(
      memory.queries, static_cast<const T*>(p.q) + static_cast<int64_t>(tile.head) * p.dim,
      p.q_stride, p.dim, [&](int row) {
        return tile.first + row < tile.count ? tile.begin + tile.first + row : -1;
      });
  close_group();
  RingSlot slot;
#pragma unroll 1
  for (int part = 0; part < 2 * tiles; ++part) {
    const int side = part % 2, first = tile.from + part / 2 * S::KEYS;
    unsigned char* to = memory.tile(slot.at, side);
    Barrier* full = &memory.full[side][slot.at];
    memory.empty[side][slot.at].wait(slot.phase ^ 1);
    if (first + S::KEYS > tile.length) {
      copy_rows<T, S, S::KEYS>(
          to, static_cast<const T*>(side ? p.v : p.k) + static_cast<int64_t>(tile.kv) * p.dim,
          p.kv_stride, p.dim, [&](int row) {
            return first + row < tile.length ? token_at(p, tile, first + row) : -1;
          });
      close_group();
      announce(full);
    } else if (warp == 0) {
      fetch_tile<S>(p, tile, side ? &p.values : &p.keys, first, to, full);
    } else if (lane == 0) {
      full->arrive();
    }
    if (part == 0) announce(memory.held);  // the first keys come meanwhile
    if (side) slot.next(S::DEPTH);
  }
}

}  // namespace lmi
