// A warp's stream of weights: units under way from memory to a ring in shared memory, which no
// other warp touches, so that it needs no barrier. Depth is what hides memory's latency, and a ring
// can be deeper than registers allow. A stream runs through the products of a step one after the
// other: the next one's weights are under way while this one's results are still awaited.
#pragma once

#include "copy.cuh"
#include "linear.h"
#include "product.cuh"

namespace lmi {

constexpr int SLOT_BYTES = TILE * UNIT_BYTES;
// A ring's slots: few choices, since waiting for a slot wants a constant.
constexpr int FEW_SLOTS = 4, MANY_SLOTS = 12;

// The largest choice that is not above `slots`; 0: there is none.
constexpr int ring_slots(int slots) {
  return slots < FEW_SLOTS ? 0 : slots < 8 ? slots : std::min(slots / 2 * 2, MANY_SLOTS);
}

// The same of so many warps' rings together, of which some may have one slot more.
constexpr int ring_slots(int slots, int warps) {
  const int each = ring_slots(slots / warps);
  return each && each < 8 ? slots : each * warps;
}

// Whether each warp's ring is then one of the choices.
constexpr bool are_choices(int warps) {
  for (int slots = 0; slots < 2 * MANY_SLOTS * warps; ++slots) {
    const int all = ring_slots(slots, warps), each = all / warps, most = each + (all % warps > 0);
    if (all > slots || ring_slots(each) != each || ring_slots(most) != most) return false;
  }
  return true;
}
static_assert(are_choices(8) && are_choices(16));

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

// The lane's chunks of a unit in a slot: t and t + 4 of rows g and g + 8, which are of one parity.
__device__ inline Chunks read_chunks(const unsigned char* slot) {
  const int lane = threadIdx.x % 32, own = in_slot(lane / 4, lane % 4);
  Chunks found;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const uint4* chunk = reinterpret_cast<const uint4*>(slot) + (own ^ c * 4);
    found.low[c] = chunk[0], found.high[c] = chunk[in_slot(8, 0)];
  }
  return found;
}

// Until the oldest of `slots` groups of copies is there.
__device__ inline void await_oldest(int slots) {
  switch (slots) {
    case 4: return await<3>();
    case 5: return await<4>();
    case 6: return await<5>();
    case 7: return await<6>();
    case 8: return await<7>();
    case 10: return await<9>();
    default: return await<11>();
  }
}

// Of a block's warp, through `count` products, which lie in shared or constant memory. The block's warps
// take a tile's units in turns.
template <typename W, int WARPS>
class Stream {
 public:
  // `slots`: of all warps' rings together.
  __device__ Stream(const Weights* products, int count, unsigned char* rings, int slots)
      : now_(products - 1), last_(products + count - 1), all_slots_(slots) {
    const int warp = threadIdx.x / 32, before = warp * (slots / WARPS) + min(warp, slots % WARPS);
    ring_ = static_cast<uint32_t>(__cvta_generic_to_shared(rings)) + before * SLOT_BYTES;
    begin_product();
    if (live_) find_rows();
  }

  __device__ void fill() {
#pragma unroll 1
    for (int i = 0; i < slots(); ++i) fetch(i);
  }

  // The next unit's chunks, once they are there.
  __device__ Chunks next() const {
    await_oldest(slots());
    __syncwarp();  // everybody's copies are there
    const void* slot = __cvta_shared_to_generic(ring_ + slot_ * SLOT_BYTES);
    return read_chunks(static_cast<const unsigned char*>(slot));
  }

  // The lane has what it wants of these: one more unit is on its way to where they were.
  __device__ void refill() {
    __syncwarp();  // so has everybody
    fetch(slot_);
    slot_ = slot_ + 1 == slots() ? 0 : slot_ + 1;
  }

 private:
  static constexpr int CHUNK = 16 / sizeof(W);

  // Of the warp's own ring; the first warps may have one more than others.
  __device__ int slots() const {
    return all_slots_ / WARPS + (threadIdx.x / 32 < static_cast<unsigned>(all_slots_ % WARPS));
  }

  static __device__ int first() { return threadIdx.x / 32 * UNIT<W>; }

  // The next product that this warp has a share of.
  __device__ void begin_product() {
    live_ = false;
#pragma unroll 1
    while (now_ != last_ && !live_) {
      const Part part(*++now_, blockIdx.x, gridDim.x);
      begin_ = part.begin, features_ = part.end - part.begin;
      tile_ = part.tile, tile_step_ = part.tile_step;
      at_ = first();
      live_ = tile_ < now_->tiles && at_ < features_;
    }
  }

  // Where the lane's features of the tile's rows begin: it copies a chunk of every fourth row. A
  // tile's rows are sixteen in turn (gated: eight of the gate, and the eight that these gate);
  // beyond the end, the last one again.
  __device__ void find_rows() {
    const int lane = threadIdx.x % 32;
    const int outputs = now_->gated ? now_->outputs / 2 : now_->outputs;
    const int first = tile_ * (now_->gated ? 8 : 16), upper = now_->gated ? 0 : 8;
    const int moved = now_->gated ? outputs : 0;
    const W* chunk = static_cast<const W*>(now_->data) + begin_ + lane % 8 * CHUNK;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = first + i % 2 * 4 + lane / 8 + (i < 2 ? 0 : upper);
      const int64_t row = min(r, outputs - 1) + (i < 2 ? 0 : moved);
      const W* found = chunk + row * now_->inputs;
      if (i == 0) {
        row_ = found;
      } else {
        others_[i - 1] = static_cast<int>(found - row_);
      }
    }
  }

  // Start copying the unit that is next in turn; nothing, but still a group, after the last.
  __device__ void fetch(int slot) {
    if (live_) {
      const int lane = threadIdx.x % 32;
      const bool present = at_ + lane % 8 * CHUNK < features_;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int to = slot * SLOT_BYTES + in_slot(i * 4 + lane / 8, lane % 8) * 16;
        copy16(ring_ + to, row_ + ((i ? others_[i - 1] : 0) + (present ? at_ : 0)), present);
      }
      at_ += WARPS * UNIT<W>;
      if (at_ >= features_) next_tile();
    }
    close_group();
  }

  __device__ void next_tile() {
    at_ = first(), tile_ += tile_step_;
    if (tile_ >= now_->tiles) begin_product();
    if (live_) find_rows();
  }

  const Weights *now_, *last_;  // the product whose weights are fetched, and the last one
  const W* row_;   // the lane's first row
  int others_[3];  // how many elements behind it its others are
  uint32_t ring_;  // where it lies in shared memory
  int all_slots_, begin_, features_, tile_, tile_step_;
  int at_;  // of the part's features, the next unit's first
  int slot_ = 0;
  bool live_;
};

}  // namespace lmi
