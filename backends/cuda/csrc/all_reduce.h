#pragma once

#include "common.cuh"

namespace lmi {

constexpr int MOST_PEERS = 8;
constexpr int SUM_THREADS = 512;
constexpr int MOST_SUM_BLOCKS = 128;
constexpr int MOST_WORDS = SUM_THREADS * MOST_SUM_BLOCKS;  // of 32 bits: 256 KiB

// What a rank's peers write to: memory of its own, zero at first.
struct Inbox {
  // Words of a message with their marks, by turn, sender and place.
  unsigned long long words[2][MOST_PEERS][MOST_WORDS];
  unsigned marks[MOST_SUM_BLOCKS];  // each block's last one
  unsigned broken;                  // a peer was waited for in vain
};

// Words of x become those of the sum; or, if there is a residual, that becomes residual + (sum + bias).
struct AllReduceParams {
  void* x;
  Type type;
  void* residual;  // as many elements as x has
  Type residual_type;
  Operand bias;  // [features]: every row's
  int features, words, rank, ranks;
  unsigned long long patience;  // nanoseconds to wait for a peer
  int* failed;                  // in host memory: what `broken` says
  Inbox* own;
  Inbox* inboxes[MOST_PEERS];  // of every rank, as this GPU sees them
};

void all_reduce(const AllReduceParams& p, const Device& gpu, cudaStream_t stream);

}  // namespace lmi
