// What a rank's peers write to.
#pragma once

namespace lmi {

constexpr int MOST_PEERS = 8;
constexpr int SUM_THREADS = 512;
constexpr int MOST_SUM_BLOCKS = 128;
constexpr int MOST_WORDS = SUM_THREADS * MOST_SUM_BLOCKS;  // of 32 bits: 256 KiB
constexpr int MOST_STEP_WORDS = 1 << 17;  // a step's results: 8 rows of 16,384
constexpr int STEP_SETS = 3;
constexpr int MOST_CHOSEN_ROWS = 1 << 11;  // rows whose token ranks choose together
constexpr int MOST_HANDED = 1 << 13;  // attention's results that are handed over

// Words lie by turn, sender and place.

// The step kernel's: see meeting.cuh.
struct alignas(16) StepInbox {
  unsigned words[STEP_SETS][MOST_PEERS][MOST_STEP_WORDS];  // each a float32's bits, or 0: none
  unsigned handed[2][MOST_HANDED];  // likewise; the GPU's own: see hand.cuh
  int turn;         // the last sum's set
  int last;         // its words of each rank
  unsigned broken;  // a peer was waited for in vain
};

// Memory of a rank's own, zero at first.
struct Inbox {
  unsigned long long words[2][MOST_PEERS][MOST_WORDS];  // all_reduce.cu's, with marks (words.cuh)
  unsigned marks[MOST_SUM_BLOCKS];                      // each block's last one
  // greedy.cu's, of each row: a logit's key and its id.
  unsigned long long best[2][MOST_PEERS][MOST_CHOSEN_ROWS][2];
  unsigned best_marks[MOST_CHOSEN_ROWS];
  unsigned broken;
  StepInbox step;
};

// Who takes part in an exchange outside of steps.
struct Peers {
  int rank, ranks;              // 0 ranks: there is nobody else
  unsigned long long patience;  // nanoseconds to wait for a peer
  int* failed;                  // in host memory: what `broken` says
  Inbox* own;
  Inbox* inboxes[MOST_PEERS];  // of every rank, as this GPU sees them
};

}  // namespace lmi
