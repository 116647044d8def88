// What GPUs of one host send each other inside a step, and how they know that it has come.
//
// A word is a float32, and 0 is none: whoever waits for it looks until it is something else. No flag
// is apart from it and no mark beside it, so words may be read four at a time, of which any may be
// there; and as 0 is sent as -0, to which anything can be added, every value has a word.
// TensorRT-LLM's one-shot all-reduce marks its words likewise.
//
// So a word's place has to be none again before it has its next one. Words have three sets, used in
// turns: those of sum s are read in phase R(s), and in R(s + 1) taken away. Nobody overwrites what is
// still to be read, and nobody takes away what has not been:
// - A block sends words of sum s behind a barrier of its GPU that follows R(s - 1) (plan_program sees to
//   it; between launches the kernel's end is that barrier). So its GPU has received all words of s - 1.
// - Every peer has sent some of those, and has done so behind a barrier that follows its R(s - 2), in
//   which it has taken away the words of s - 3, in whose places those of s go.
// - In R(s) a block is behind the barrier in front of the sending of s: all blocks have read s - 1.
// This holds for any sums that follow each other, whichever programs they are of and however many rows
// these have.
//
// Turns go on from launch to launch. Every block reads the last one when it starts; the first block
// sets it anew at its end, when it has waited at a barrier where all blocks had arrived since.
#pragma once

#include <cstdint>

#include "step.h"
#include "words.cuh"

namespace lmi {

// What blocks keep of their peers in shared memory.
struct Meeting : StepPeers {
  int turn, last;  // the set of the last sum before the launch, and its words of each rank

  // By one thread, before the block arrives at any barrier.
  __device__ void begin(const StepPeers& given) {
    static_cast<StepPeers&>(*this) = given;
    turn = ranks ? *static_cast<const volatile int*>(&own->turn) : 0;
    last = ranks ? *static_cast<const volatile int*>(&own->last) : 0;
  }

  // By one thread of all blocks, behind a barrier of the launch: it has had so many sums, of so many
  // words each.
  __device__ void end(int sums, int words) const {
    if (ranks) own->turn = set(sums), own->last = words;
  }

  // Of the launch's sums, which count from 1.
  __device__ int set(int sum) const { return (turn + sum) % STEP_SETS; }
};

__device__ inline void send_part(unsigned* to, float value) {
  const unsigned bits = value == 0 ? __float_as_uint(-0.0f) : __float_as_uint(value);
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(to), "r"(bits) : "memory");
}

__device__ inline unsigned peek_part(const unsigned* from) {
  unsigned word;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
  return word;
}

// Four neighbours, each of which is there or not.
__device__ inline uint4 peek_parts(const unsigned* from) {
  uint4 words;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from)
               : "memory");
  return words;
}

__device__ inline bool are_there(const uint4& words) {
  return words.x && words.y && words.z && words.w;
}

// Whether words have been waited for too long. The clock and `broken` are looked at only once they
// are later than they are in any good step: a look takes as long as a word does.
struct Late {
  static constexpr int PROMPT = 1000;  // looks at what is missing: some 700 microseconds
  int looks = 0;
  unsigned long long begun = 0;

  // If so, that is told.
  __device__ bool operator()(const Meeting& peers) {
    if (++looks < PROMPT) return false;
    // After one that did not come, not to wait as long in all that follows.
    if (*static_cast<const volatile unsigned*>(&peers.own->broken)) return true;
    if (!begun) begun = now();
    if (now() - begun <= peers.patience) return false;
    peers.own->broken = 1;
    *static_cast<volatile int*>(peers.failed) = 1;
    return true;
  }
};

// The word, or 0 if it does not come.
__device__ inline float receive(const Meeting& peers, const unsigned* from) {
  Late late;
  unsigned word = peek_part(from);
  while (!word && !late(peers)) word = peek_part(from);
  return __uint_as_float(word);
}

// Take away so many words: the block's share. Their places are free behind a barrier.
static __device__ __noinline__ void forget(unsigned* from, int words) {
#pragma unroll 1
  for (int at = (blockIdx.x * blockDim.x + threadIdx.x) * 4; at < words;
       at += gridDim.x * blockDim.x * 4) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %1, %1, %1};" ::"l"(from + at), "r"(0)
                 : "memory");
  }
}

// Those of the sum before the launch's sum number `sum`, where the program's sums have so many words of
// each rank.
__device__ inline void forget_sum(const Meeting& peers, int sum, int words) {
#pragma unroll 1
  for (int r = 0; r < peers.ranks; ++r) {
    forget(peers.own->words[peers.set(sum - 1)][r], sum > 1 ? words : peers.last);
  }
}

}  // namespace lmi
