// A warp's stream of weights through the products of a step, as stream.cuh has it for a single one, by
// Hopper's copy engine: one lane asks for a unit. Nobody computes addresses, and to see whether a unit is
// there is to look at a barrier that counts its bytes.
#pragma once

#include "hopper.cuh"
#include "stream.cuh"

namespace lmi {

constexpr int BOX_ALIGNED = 1024;

// The products: how the copy engine finds their weights, in memory, and how blocks share them.
struct Products {
  const CUtensorMap* maps;
  const Weights* weights;
  int count;
};

template <typename W, int WARPS>
class BoxStream {
 public:
  // `rings`: BOX_ALIGNED. `full`: a barrier for each of a warp's slots.
  __device__ BoxStream(const Products& products, unsigned char* rings, Barrier* full, int slots)
      : products_(products), slots_(slots) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    ring_ = rings + warp * slots * SLOT_BYTES, full_ = full + warp * slots;
    if (lane < slots) full_[lane].init(1);
    fence_barriers();
    __syncwarp();
    begin_product();
  }

  __device__ void fill() {
#pragma unroll 1
    for (int i = 0; i < slots_ - 1; ++i) fetch(i);
  }

  // The weight row, of eight, that a lane has as row g. Boxes lie as the copy engine swizzles them: eight
  // lanes that read together touch all banks where their two rows are four apart.
  static __device__ int row(int g) { return g / 2 + g % 2 * 4; }

  // The next unit's chunks, once they are there; and one more unit is under way.
  __device__ Chunks next() {
    full_[slot_].wait(phase_);
    __syncwarp();  // everybody has read the slot before
    fetch(slot_ ? slot_ - 1 : slots_ - 1);
    const int r = row(threadIdx.x % 32 / 4), t = threadIdx.x % 4;
    const unsigned char* slot = ring_ + slot_ * SLOT_BYTES + r * UNIT_BYTES;
    Chunks found;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const unsigned char* chunk = slot + ((t + 4 * c) ^ r) * 16;
      found.low[c] = *reinterpret_cast<const uint4*>(chunk);
      found.high[c] = *reinterpret_cast<const uint4*>(chunk + 8 * UNIT_BYTES);
    }
    if (++slot_ == slots_) slot_ = 0, phase_ ^= 1;
    return found;
  }

 private:
  static __device__ int first() { return threadIdx.x / 32 * UNIT<W>; }
  __device__ const Weights& now() const { return products_.weights[now_]; }

  // The next product that this warp has a share of.
  __device__ void begin_product() {
    live_ = false;
#pragma unroll 1
    while (now_ + 1 < products_.count && !live_) {
      ++now_;
      const Part part(now(), blockIdx.x, gridDim.x);
      begin_ = part.begin, features_ = part.end - part.begin;
      tile_ = part.tile, tile_step_ = part.tile_step;
      at_ = first();
      live_ = tile_ < now().tiles && at_ < features_;
    }
  }

  // Start copying the unit that is next in turn; nothing after the last.
  __device__ void fetch(int slot) {
    if (!live_) return;
    if (threadIdx.x % 32 == 0) {
      full_[slot].arrive_and_expect(SLOT_BYTES);
      copy_box(ring_ + slot * SLOT_BYTES, products_.maps + now_,
               {begin_ + at_, tile_ * (now().gated ? TILE / 2 : TILE), 0}, full_ + slot);
    }
    at_ += WARPS * UNIT<W>;
    if (at_ >= features_) next_tile();
  }

  __device__ void next_tile() {
    at_ = first(), tile_ += tile_step_;
    if (tile_ >= now().tiles) begin_product();
  }

  const Products products_;
  unsigned char* ring_;
  Barrier* full_;
  int slots_, begin_, features_, tile_, tile_step_;
  int now_ = -1;  // the product whose weights are fetched
  int at_;        // of the part's features, the next unit's first
  int slot_ = 0, phase_ = 0;
  bool live_;
};

}  // namespace lmi
