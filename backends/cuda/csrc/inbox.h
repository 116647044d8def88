// What a rank's peers write to.
#pragma once

namespace lmi {

constexpr int MOST_PEERS = 8;
constexpr int SUM_THREADS = 512;
constexpr int MOST_SUM_BLOCKS = 128;
constexpr int MOST_WORDS = SUM_THREADS * MOST_SUM_BLOCKS;  // of 32 bits: 256 KiB
constexpr int MOST_STEP_WORDS = 1 << 17;  // a step's results: 8 rows of 16,384

// Words have marks with them (words.cuh), and lie by turn, sender and place.

// The step kernel's: see sum.cuh.
struct StepInbox {
  unsigned long long words[2][MOST_PEERS][MOST_STEP_WORDS];  // each a float32
  unsigned mark;    // the last one
  unsigned broken;  // a peer was waited for in vain
};

// Memory of a rank's own, zero at first.
struct Inbox {
  unsigned long long words[2][MOST_PEERS][MOST_WORDS];  // all_reduce.cu's
  unsigned marks[MOST_SUM_BLOCKS];                      // each block's last one
  unsigned broken;
  StepInbox step;
};

}  // namespace lmi
