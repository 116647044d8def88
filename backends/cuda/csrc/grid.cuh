// A barrier of all blocks of a kernel that was launched with all of them at once.
#pragma once

#include "common.cuh"

namespace lmi {

constexpr long long BARRIER_PATIENCE = 40'000'000'000;  // cycles: some 20 seconds

// It arrives and waits apart, so that what needs nobody else can be done in between. One word serves
// for ever: its highest bit turns each time the last block arrives, and the rest is then zero again.
// It cannot turn before this block arrives, so how it stands need only be read once.
// What any block wrote before it arrived is visible to all threads that have waited.
class GridBarrier {
 public:
  __device__ explicit GridBarrier(unsigned* word, long long patience = BARRIER_PATIENCE)
      : word_(word), patience_(patience) {
    if (threadIdx.x == 0) before_ = read();
  }

  // One that goes on where another one stands, which goes on where this one stands.
  __device__ GridBarrier(unsigned* word, long long patience, unsigned stands)
      : word_(word), patience_(patience), before_(stands) {}
  __device__ unsigned stands() const { return before_; }
  __device__ void go_on(unsigned stands) { before_ = stands; }

  // By all threads, behind a barrier of the block.
  __device__ void arrive() const {
    if (threadIdx.x > 0) return;
    const unsigned own = blockIdx.x == 0 ? TURN - (gridDim.x - 1) : 1;
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(word_), "r"(own) : "memory");
  }

  __device__ void wait() {
    if (threadIdx.x == 0) {
      const long long begun = clock64();
      while (!((before_ ^ read()) & TURN)) {
        // A block that is gone would be waited for for ever, and nobody told.
        if (clock64() - begun > patience_) __trap();
      }
      before_ ^= TURN;
    }
    __syncthreads();
  }

 private:
  static constexpr unsigned TURN = 0x80000000u;

  __device__ unsigned read() const {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word_) : "memory");
    return value;
  }

  unsigned* word_;
  long long patience_;
  unsigned before_ = 0;
};

}  // namespace lmi
