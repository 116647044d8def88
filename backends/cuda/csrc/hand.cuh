// Attention's results on their way to the product behind it, without a barrier, where a program has
// peers to wait for anyway.
//
// They go as words (meeting.cuh) to a place of the GPU's own, and every block of the product takes them all
// while it stages x. There are two sets, used in turns. Words of hand-over h are read in product P(h),
// and in P(h + 1) taken away: in front of its attention is a barrier, so all blocks have read them. They
// are written anew in hand-over h + 2, whose attention is behind a barrier that follows P(h + 1). The
// last ones of a launch are taken away at its end: a barrier has followed them (plan_program sees to it).
#pragma once

#include "take.cuh"

namespace lmi {

// What becomes of attention's results.
struct StoreOrHand {
  const Meeting& peers;
  const Phase& phase;

  template <typename T>
  __device__ void operator()(T* to, float value) const {
    const T rounded = narrow<T>(value);
    if (!phase.hand || !peers.ranks) {
      *to = rounded;
      return;
    }
    unsigned* words = peers.own->handed[phase.hand % 2];
    send_part(words + (to - static_cast<T*>(phase.attention.out)), widen(rounded));
  }
};

__device__ inline void forget_handed(const Meeting& peers, int hand, int words) {
  if (hand && peers.ranks) forget(peers.own->handed[hand % 2], words);
}

// x = what attention hands over.
template <typename X, typename W>
static __device__ __noinline__ void take_handed(const Phase& phase, const Meeting& peers, X* to) {
  const LinearParams& p = phase.linear;
  const RowShare<STEP_WARPS> share(p.rows);
  if (share.index >= p.rows) return;
  const int features = p.weights.inputs, step = share.width * 4;
  const int stride = row_stride<X>(features), padded = stride - 64 / static_cast<int>(sizeof(X));
  const unsigned* from = peers.own->handed[phase.hand % 2] + share.index * features;
  to += share.index * stride;
#pragma unroll 1
  for (int at = share.own / 2; at < padded; at += 2 * step) {
    const Fours fours{{at, at + step}, features};
    float x[8] = {};
    receive_fours(peers, from, min(peers.ranks, 1), fours, x);
    Raw<X> made;
    made.pack(x);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (fours.at[i] < padded) *staged_four<X, W>(to, fours.at[i]) = four_of(made, i);
    }
  }
}

}  // namespace lmi
