// A warp's stream of a product's weights: units under way from memory to a ring in shared memory, which no
// other warp touches, so that it needs no barrier. Depth is what hides memory's latency, and a ring
// can be deeper than registers allow.
#pragma once

#include "copy.cuh"
#include "linear.h"
#include "product.cuh"

namespace lmi {

constexpr int SLOT_BYTES = TILE * UNIT_BYTES;
// A ring's slots: few choices, since waiting for a slot wants a constant.
constexpr int FEW_SLOTS = 4, MANY_SLOTS = 12;

// The largest choice that is not above `slots`; 0: there is none.
inline int ring_slots(int slots) {
  return slots < FEW_SLOTS ? 0 : slots < 8 ? slots : std::min(slots / 2 * 2, MANY_SLOTS);
}

// What a block does of a product.
struct Part {
  int begin, end;       // features
  int split;
  int tile, tile_step;  // the first tile, and how far it is to the next

  __device__ Part(const Weights& w, int block, int blocks) {
    split = 0, tile = block, tile_step = blocks;
    if (w.splits > 1) {
      split = block % w.splits, tile = block / w.splits, tile_step = blocks / w.splits;
      if (tile >= tile_step) tile = w.tiles;  // blocks that remain have none
    }
    begin = split * w.slice, end = min(w.inputs, begin + w.slice);
  }
};

// Where a slot keeps 16 bytes of a tile's row. Rows of one parity keep the halves of their 128 bytes
// swapped: eight lanes that read together then touch all banks.
__device__ inline int in_slot(int row, int chunk) { return row * 8 + (chunk ^ (row % 2 * 4)); }

// The lane's chunks of a unit in a slot.
__device__ inline Chunks read_chunks(const unsigned char* slot) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const auto* rows = reinterpret_cast<const uint4*>(slot);
  Chunks found;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    found.low[c] = rows[in_slot(g, t + 4 * c)];
    found.high[c] = rows[in_slot(g + 8, t + 4 * c)];
  }
  return found;
}

// Until the oldest of `slots` - 1 groups of copies is there.
__device__ inline void await_oldest(int slots) {
  switch (slots) {
    case 4: return await<2>();
    case 5: return await<3>();
    case 6: return await<4>();
    case 7: return await<5>();
    case 8: return await<6>();
    case 10: return await<8>();
    default: return await<10>();
  }
}

// The warps of a block take a tile's units in turns.
template <typename W, int WARPS>
class Stream {
 public:
  __device__ Stream(const Weights& weights, const Part& part, unsigned char* rings, int slots)
      : weights_(weights), part_(part), slots_(slots) {
    ring_ = static_cast<uint32_t>(__cvta_generic_to_shared(rings)) +
            threadIdx.x / 32 * slots * SLOT_BYTES;
    begin_tile();
  }

  // The weight row, of eight, that a lane has as row g.
  static __device__ int row(int g) { return g; }

  __device__ void fill() {
#pragma unroll 1
    for (int i = 0; i < slots_ - 1; ++i) fetch(i);
  }

  // The next unit's chunks, once they are there; and one more unit is under way.
  __device__ Chunks next() {
    await_oldest(slots_);
    __syncwarp();  // everybody's copies are there, and everybody has read the slot before
    fetch(slot_ ? slot_ - 1 : slots_ - 1);
    const void* slot = __cvta_shared_to_generic(ring_ + slot_ * SLOT_BYTES);
    const Chunks found = read_chunks(static_cast<const unsigned char*>(slot));
    slot_ = slot_ + 1 == slots_ ? 0 : slot_ + 1;
    return found;
  }

 private:
  static constexpr int CHUNK = 16 / sizeof(W);

  // The warp's share of this tile, if it has some.
  __device__ void begin_tile() {
    at_ = threadIdx.x / 32 * UNIT<W>;
    live_ = part_.tile < weights_.tiles && at_ < part_.end - part_.begin;
    if (live_) find_rows();
  }

  // Where the lane's features of the tile's rows begin: it copies a chunk of every fourth row. A
  // tile's rows are sixteen in turn (gated: eight of the gate, and the eight that these gate);
  // beyond the end, the last one again.
  __device__ void find_rows() {
    const int lane = threadIdx.x % 32;
    const int outputs = weights_.gated ? weights_.outputs / 2 : weights_.outputs;
    const int first = part_.tile * (weights_.gated ? 8 : 16), upper = weights_.gated ? 0 : 8;
    const int moved = weights_.gated ? outputs : 0;
    const W* chunk = static_cast<const W*>(weights_.data) + part_.begin + lane % 8 * CHUNK;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = first + i % 2 * 4 + lane / 8 + (i < 2 ? 0 : upper);
      const int64_t row = min(r, outputs - 1) + (i < 2 ? 0 : moved);
      rows_[i] = chunk + row * weights_.inputs;
    }
  }

  // Start copying the unit that is next in turn; nothing, but still a group, after the last.
  __device__ void fetch(int slot) {
    if (live_) {
      const int lane = threadIdx.x % 32;
      const bool present = at_ + lane % 8 * CHUNK < part_.end - part_.begin;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int to = slot * SLOT_BYTES + in_slot(i * 4 + lane / 8, lane % 8) * 16;
        copy16(ring_ + to, rows_[i] + (present ? at_ : 0), present);
      }
      at_ += WARPS * UNIT<W>;
      if (at_ >= part_.end - part_.begin) part_.tile += part_.tile_step, begin_tile();
    }
    close_group();
  }

  const Weights& weights_;
  Part part_;  // from the tile on that is fetched
  const W* rows_[4];
  uint32_t ring_;  // where it lies in shared memory
  int slots_;
  int at_;  // of the part's features, the next unit's first
  int slot_ = 0;
  bool live_;
};

}  // namespace lmi
