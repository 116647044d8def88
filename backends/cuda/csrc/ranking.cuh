// The largest of many numbers, with where each was, kept by a warp.
#pragma once

#include "common.cuh"

namespace lmi {

// Larger numbers have larger keys, NaN the largest; none is 0. Keys of one float order as integers
// do once negative ones are turned over.
__device__ inline uint32_t key_of(float x) {
  if (x != x) return ~0u;
  const uint32_t bits = __float_as_uint(x == 0 ? 0.0f : x);  // -0 ties with 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// -inf for 0, which is no number's key.
__device__ inline float number_of(uint32_t key) {
  if (key == 0) return -INFINITY;
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

__device__ inline bool is_usable(uint32_t key) {
  return key < key_of(INFINITY) && key > key_of(-INFINITY);
}

// A number and its id in one: the larger number is the larger entry, of equal ones the lower id. 0 is
// nothing at all.
using Entry = unsigned long long;

__device__ inline Entry entry_of(uint32_t key, uint32_t id) {
  return static_cast<Entry>(key) << 32 | ~id;
}

__device__ inline uint32_t key_in(Entry entry) { return static_cast<uint32_t>(entry >> 32); }
__device__ inline uint32_t id_in(Entry entry) { return ~static_cast<uint32_t>(entry); }

// The largest of a warp's entries, one a lane.
__device__ inline Entry largest_of_warp(Entry own) {
  const uint32_t key = key_in(own), most = __reduce_max_sync(~0u, key);
  const uint32_t rest = __reduce_max_sync(~0u, key == most ? static_cast<uint32_t>(own) : 0u);
  return static_cast<Entry>(most) << 32 | rest;
}

// The `keep` <= 32 largest entries that a warp has seen, falling, one a lane; those behind them are
// of no use. All lanes call what is here.
struct Ranking {
  Entry own = 0;

  // Whether an entry, the same in all lanes, is one of them.
  __device__ bool wants(Entry entry, int keep) const {
    return entry > __shfl_sync(~0u, own, keep - 1);
  }

  __device__ void insert(Entry entry) {
    const int lane = threadIdx.x % 32, place = __popc(__ballot_sync(~0u, own > entry));
    const Entry before = __shfl_up_sync(~0u, own, 1);
    if (lane > place) own = before;
    if (lane == place) own = entry;
  }

  // Take in one entry a lane; 0 where it has none.
  __device__ void take(Entry entry, int keep) {
    for (;;) {
      const Entry next = largest_of_warp(entry);
      if (!wants(next, keep)) return;
      insert(next);
      if (entry == next) entry = 0;
    }
  }

  // Take in N numbers a lane, by their keys, of which the lane's have the ids from `first` on.
  template <int N>
  __device__ void take(uint32_t (&keys)[N], uint32_t first, int keep) {
    Entry entry = largest(keys, first);
    for (;;) {
      const Entry next = largest_of_warp(entry);
      if (!wants(next, keep)) return;
      insert(next);
      if (entry != next) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (first + i == id_in(entry)) keys[i] = 0;
      }
      entry = largest(keys, first);
    }
  }

 private:
  template <int N>
  static __device__ Entry largest(const uint32_t (&keys)[N], uint32_t first) {
    uint32_t key = keys[0], id = first;
#pragma unroll
    for (int i = 1; i < N; ++i) {
      if (keys[i] > key) key = keys[i], id = first + i;
    }
    return key ? entry_of(key, id) : 0;
  }
};

}  // namespace lmi
