// Words that GPUs write into each other's memory.
//
// No flags are apart from the data. A word of 64 bits, which no GPU writes by halves, carries 32 bits of
// the message and a mark; the reader waits for its mark, and then takes the word away (sends itself
// one with mark 0). NCCL's LL protocol does the same.
#pragma once

#include <cstdint>

namespace lmi {

// Marks count turns: never 0, which is no word's, and odd after even, as they say whose turn it is.
__device__ inline unsigned after(unsigned mark) { return mark + 1 ? mark + 1 : 2; }

__device__ inline void send(unsigned long long* to, unsigned bits, unsigned mark) {
  const unsigned long long word = static_cast<unsigned long long>(mark) << 32 | bits;
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

__device__ inline unsigned long long peek(const unsigned long long* from) {
  unsigned long long word;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
  return word;
}

__device__ inline unsigned mark_of(unsigned long long word) {
  return static_cast<unsigned>(word >> 32);
}

__device__ inline unsigned long long now() {
  unsigned long long nanoseconds;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds)::"memory");
  return nanoseconds;
}

}  // namespace lmi
