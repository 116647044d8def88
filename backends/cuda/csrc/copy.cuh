// Asynchronous copies from memory to shared memory, 16 bytes at a time, in groups.
#pragma once

#include <cstdint>

namespace lmi {

// Zeros, and nothing read, if the 16 bytes are not `present`.
__device__ inline void copy16(uint32_t to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(present ? 16 : 0)
               : "memory");
}

template <int PENDING>
__device__ inline void await() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// The copies since the last call are a group.
__device__ inline void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

}  // namespace lmi
