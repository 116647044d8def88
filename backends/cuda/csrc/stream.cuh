// A warp's stream of weights: units under way from memory to a ring in shared memory, which no
// other warp touches, so that it needs no barrier. Depth is what hides memory's latency, and a ring
// can be deeper than registers allow.
#pragma once

#include "copy.cuh"
#include "linear.h"
#include "product.cuh"

namespace lmi {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int TILE = 16;  // weight rows
constexpr int SLOT_BYTES = TILE * UNIT_BYTES;
// A ring's slots: few choices, since waiting for a slot wants a constant.
constexpr int FEW_SLOTS = 4, SOME_SLOTS = 6, MANY_SLOTS = 10;

// A tile's r-th weight row (gated: eight of the gate, eight of what it gates); beyond the end, the
// last one again.
__device__ inline int weight_row(const LinearParams& p, int tile, int r) {
  if (!p.gated) return min(tile * TILE + r, p.outputs - 1);
  return r / 8 * (p.outputs / 2) + min(tile * 8 + r % 8, p.outputs / 2 - 1);
}

// Until the oldest of `slots` - 1 groups of copies is there.
__device__ inline void await_oldest(int slots) {
  if (slots == FEW_SLOTS) return await<FEW_SLOTS - 2>();
  if (slots == SOME_SLOTS) return await<SOME_SLOTS - 2>();
  await<MANY_SLOTS - 2>();
}

template <typename W>
class Stream {
 public:
  // Of features begin to end of the block's tiles; this warp takes every eighth unit.
  __device__ Stream(const LinearParams& p, void* rings, int begin, int end)
      : p_(p), begin_(begin), end_(end), tile_(blockIdx.x), unit_(threadIdx.x / 32) {
    const auto ring = static_cast<unsigned char*>(rings) + threadIdx.x / 32 * p.slots * SLOT_BYTES;
    ring_ = ring;
    shared_ = static_cast<uint32_t>(__cvta_generic_to_shared(ring));
    if (unit_ >= units()) tile_ = p.tiles;
    find_rows();
  }

  __device__ int units() const { return (end_ - begin_ + UNIT<W> - 1) / UNIT<W>; }

  __device__ void fill() {
    for (int i = 0; i < p_.slots - 1; ++i) fetch(i);
  }

  // The next unit's chunks, once they are there; and one more unit is under way.
  __device__ Chunks next() {
    await_oldest(p_.slots);
    __syncwarp();  // everybody's copies are there, and everybody has read the slot before
    fetch(slot_ ? slot_ - 1 : p_.slots - 1);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const auto* rows = reinterpret_cast<const uint4*>(ring_ + slot_ * SLOT_BYTES);
    Chunks found;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      found.low[c] = rows[place(g, t + 4 * c)];
      found.high[c] = rows[place(g + 8, t + 4 * c)];
    }
    slot_ = slot_ + 1 == p_.slots ? 0 : slot_ + 1;
    return found;
  }

 private:
  static constexpr int CHUNK = 16 / sizeof(W);

  // Rows of one parity keep the halves of their 128 bytes swapped: eight lanes that read together
  // then touch all banks.
  static __device__ int place(int row, int chunk) { return row * 8 + (chunk ^ (row % 2 * 4)); }

  // Where the lane's features of the tile's rows begin: it copies a chunk of every fourth row.
  __device__ void find_rows() {
    const int lane = threadIdx.x % 32;
    const W* chunk = static_cast<const W*>(p_.weight) + begin_ + lane % 8 * CHUNK;
#pragma unroll
    for (int i = 0; i < TILE / 4; ++i) {
      rows_[i] = chunk + static_cast<int64_t>(weight_row(p_, tile_, i * 4 + lane / 8)) * p_.inputs;
    }
  }

  // Start copying the unit that is next in turn; nothing, but still a group, after the last.
  __device__ void fetch(int slot) {
    if (tile_ < p_.tiles) {
      const int lane = threadIdx.x % 32, at = unit_ * UNIT<W>;
      const bool present = begin_ + at + lane % 8 * CHUNK < end_;
#pragma unroll
      for (int i = 0; i < TILE / 4; ++i) {
        const int to = slot * SLOT_BYTES + place(i * 4 + lane / 8, lane % 8) * 16;
        copy16(shared_ + to, rows_[i] + (present ? at : 0), present);
      }
      unit_ += WARPS;
      if (unit_ >= units()) {
        unit_ = threadIdx.x / 32, tile_ += gridDim.x;
        find_rows();
      }
    }
    close_group();
  }

  const LinearParams& p_;
  const W* rows_[TILE / 4];
  const unsigned char* ring_;
  uint32_t shared_;
  int begin_, end_, tile_, unit_, slot_ = 0;
};

}  // namespace lmi
