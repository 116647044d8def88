// Rows of x that a sum over GPUs makes, on their way into shared memory, normalized, in front of a
// product: the sum's phase and the product's staging in one.
//
// Every block takes all words of the sum itself, and has x as soon as they are there. Where the sum has
// a phase of its own, x is written, a barrier waited for and x read before the next product begins. A
// block reads 4 bytes for each result and rank in place of x's 2, so this is for few rows. Blocks compute
// the same bits; for what follows later, each writes a share of x.
#pragma once

#include "meeting.cuh"
#include "normal.cuh"
#include "stage.cuh"

namespace lmi {

// What a thread has of a row at a time: two fours, whose neighbours its neighbours have, so that a
// warp's reads of words have no gaps.
struct Fours {
  int at[2], features;

  __device__ bool has(int i) const { return at[i] < features; }
};

// Eight elements of a half type as two fours that lie apart.
template <typename X>
__device__ inline Raw<X> read_fours(const X* row, const Fours& fours) {
  static_assert(sizeof(X) == 2);
  uint2 found[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (fours.has(i)) found[i] = *reinterpret_cast<const uint2*>(row + fours.at[i]);
  }
  return {{make_uint4(found[0].x, found[0].y, found[1].x, found[1].y)}};
}

template <typename X>
__device__ inline uint2 four_of(const Raw<X>& raw, int i) {
  return i ? make_uint2(raw.bits[0].z, raw.bits[0].w) : make_uint2(raw.bits[0].x, raw.bits[0].y);
}

// Where a four lies in shared memory: see `place`.
template <typename X, typename W>
__device__ inline uint2* staged_four(X* row, int at) {
  return reinterpret_cast<uint2*>(row + place<X, W>(at & ~7) + (at & 4));
}

template <typename X, typename W>
__device__ inline Raw<X> staged_fours(X* row, const Fours& fours) {
  uint2 found[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (fours.has(i)) found[i] = *staged_four<X, W>(row, fours.at[i]);
  }
  return {{make_uint4(found[0].x, found[0].y, found[1].x, found[1].y)}};
}

// What so many ranks have sent of a row's two fours, added up in the order of ranks. Two ranks' words
// are asked for at once. `from`: where the row of the first one begins.
__device__ inline void receive_fours(const Meeting& peers, const unsigned* from, int ranks,
                                     const Fours& fours, float (&to)[8]) {
#pragma unroll 1
  for (int r = 0; r < ranks; r += 2, from += 2 * MOST_STEP_WORDS) {
    uint4 found[4] = {};
    bool complete, wanted[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) wanted[i] = r + i / 2 < ranks && fours.has(i % 2);
    Late late;
    do {
      complete = true;
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // those that are missing
        if (wanted[i] && !are_there(found[i])) {
          found[i] = peek_parts(from + i / 2 * MOST_STEP_WORDS + fours.at[i % 2]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) complete &= !wanted[i] || are_there(found[i]);
    } while (!complete && !late(peers));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* four = to + i % 2 * 4;
      four[0] += __uint_as_float(found[i].x), four[1] += __uint_as_float(found[i].y);
      four[2] += __uint_as_float(found[i].z), four[3] += __uint_as_float(found[i].w);
    }
  }
}

// As `row_sum`, of a power of two of warps, with one barrier. Nobody uses `scratch` before it.
__device__ inline float quick_row_sum(float value, int width, float* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = width / 32;
  value = warp_sum(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  value = scratch[(warp & -warps) + (lane & (warps - 1))];
#pragma unroll 1
  for (int offset = warps / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(~0u, value, offset);
  }
  return value;
}

// x = `phase.linear.added`, of which the product takes the norm. `scratch`: two floats a warp.
template <typename X, typename W>
static __device__ __noinline__ void take(const Phase& phase, const Meeting& peers, X* to,
                                         float* scratch) {
  static_assert(MOST_STAGED_ROWS <= STEP_WARPS);  // all rows at once
  const ProductParams& p = phase.linear;
  const SumParams& s = p.added;
  const RowShare<STEP_WARPS> share(p.rows);
  const int stride = row_stride<X>(s.features), step = share.width * 4;
  const bool present = share.index < p.rows;
  const int features = present ? s.features : 0;
  const int padded = present ? stride - 64 / static_cast<int>(sizeof(X)) : 0;
  const int row = share.index * s.features, own = share.own / 2;
  // Of blocks that come here, a power of two; each writes whole sectors.
  const int writers = 1 << (31 - __clz(min(p.weights.tiles, static_cast<int>(gridDim.x))));
  const auto* weights = static_cast<const X*>(p.norm_weight.data);
  const auto* biases = static_cast<const X*>(p.norm_bias.data);
  const auto fours_at = [=](int at) { return Fours{{at, at + step}, features}; };
  // Of the norm, the thread's first: read while words are awaited.
  Raw<X> weight = read_fours(weights, fours_at(own)), bias;
  if (biases) bias = read_fours(biases, fours_at(own));
  to += share.index * stride;
  float total = 0, squares = 0;
#pragma unroll 1
  for (int at = own; at < padded; at += 2 * step) {
    const Fours fours = fours_at(at);
    const Raw<X> residual = read_fours(static_cast<const X*>(s.residual.data) + row, fours);
    Raw<X> added, made;
    if (s.bias.data) added = read_fours(static_cast<const X*>(s.bias.data), fours);
    float x[8] = {}, more[8];
    receive_fours(peers, peers.own->words[peers.set(phase.taken)][0] + row, peers.ranks, fours, x);
    added.unpack(more);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] += more[i];
    residual.unpack(more);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] += more[i];
    made.pack(x);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint2 four = four_of(made, i);
      if (fours.at[i] < padded) *staged_four<X, W>(to, fours.at[i]) = four;
      const int place = row + fours.at[i];
      if (fours.has(i) && (place / 16 & (writers - 1)) == static_cast<int>(blockIdx.x)) {
        *reinterpret_cast<uint2*>(static_cast<X*>(s.out) + place) = four;
      }
    }
    made.unpack(x);
#pragma unroll
    for (int i = 0; i < 8; ++i) total += x[i], squares += x[i] * x[i];
  }
  Normal by;
  if (biases) {  // a LayerNorm, whose squares are of what the mean is taken from
    by.shift = __fdividef(quick_row_sum(total, share.width, scratch), s.features);
    squares = 0;
  }
#pragma unroll 1
  for (int at = biases ? own : features; at < features; at += 2 * step) {
    float x[8];
    const Fours fours = fours_at(at);
    staged_fours<X, W>(to, fours).unpack(x);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (fours.has(i / 4)) squares += (x[i] - by.shift) * (x[i] - by.shift);
    }
  }
  squares = quick_row_sum(squares, share.width, scratch + STEP_WARPS);
  by.factor = rsqrtf(__fdividef(squares, s.features) + p.eps);
#pragma unroll 1
  for (int at = own; at < features; at += 2 * step) {
    const Fours fours = fours_at(at);
    if (at > own) {
      weight = read_fours(weights, fours);
      if (biases) bias = read_fours(biases, fours);
    }
    float x[8];
    staged_fours<X, W>(to, fours).unpack(x);
    apply(by, weight, bias, x);
    Raw<X> made;
    made.pack(x);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (fours.has(i)) *staged_four<X, W>(to, fours.at[i]) = four_of(made, i);
    }
  }
}

}  // namespace lmi
