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

// Eight neighbouring results from place `at` on: what all ranks have sent, added up in the order of
// ranks. Two ranks' words are asked for at once.
__device__ inline void receive8(const Meeting& peers, int sum, int at, float (&to)[8]) {
  const unsigned* from = peers.own->words[peers.set(sum)][0] + at;
#pragma unroll 1
  for (int r = 0; r < peers.ranks; r += 2, from += 2 * MOST_STEP_WORDS) {
    uint4 found[4] = {};
    const int fours = min(peers.ranks - r, 2) * 2;
    Late late;
    bool complete;
    do {
      complete = true;
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // those that are missing
        if (i < fours && !are_there(found[i])) {
          found[i] = peek_parts(from + i / 2 * MOST_STEP_WORDS + i % 2 * 4);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) complete &= i >= fours || are_there(found[i]);
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
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
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
  static_assert(MOST_STEP_ROWS <= STEP_WARPS);  // all rows at once
  const ProductParams& p = phase.linear;
  const SumParams& s = p.added;
  const RowShare<STEP_WARPS> share(p.rows);
  const int stride = row_stride<X>(s.features), step = share.width * 8;
  const bool present = share.index < p.rows;
  const int features = present ? s.features : 0;
  const int padded = present ? stride - 64 / static_cast<int>(sizeof(X)) : 0;
  const int row = share.index * s.features;
  // A power of two of the blocks that come here.
  const int writers = 1 << (31 - __clz(min(p.weights.tiles, static_cast<int>(gridDim.x))));
  const auto* weights = static_cast<const X*>(p.norm_weight.data);
  const auto* biases = static_cast<const X*>(p.norm_bias.data);
  Raw<X> weight, bias;  // of the norm, the thread's first: read while words are awaited
  if (share.own < features) {
    weight.read(weights + share.own);
    if (biases) bias.read(biases + share.own);
  }
  to += share.index * stride;
  float total = 0, squares = 0;
#pragma unroll 1
  for (int at = share.own; at < padded; at += step) {
    float x[8] = {};
    Raw<X> made;
    if (at < features) {
      Raw<X> residual, added;
      residual.read(static_cast<const X*>(s.residual.data) + row + at);
      if (s.bias.data) added.read(static_cast<const X*>(s.bias.data) + at);
      receive8(peers, phase.taken, row + at, x);
      float more[8];
      added.unpack(more);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += more[i];
      residual.unpack(more);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += more[i];
      made.pack(x);
      if (((row + at) / 8 & (writers - 1)) == static_cast<int>(blockIdx.x)) {
        made.write(static_cast<X*>(s.out) + row + at);
      }
    }
    made.write(to + place<X, W>(at));
    made.unpack(x);
#pragma unroll
    for (int i = 0; i < 8; ++i) total += x[i];
  }
  Normal by;
  if (biases) by.shift = __fdividef(quick_row_sum(total, share.width, scratch), s.features);
#pragma unroll 1
  for (int at = share.own; at < features; at += step) {
    float x[8];
    load8(to + place<X, W>(at), x);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += (x[i] - by.shift) * (x[i] - by.shift);
  }
  squares = quick_row_sum(squares, share.width, scratch + STEP_WARPS);
  by.factor = rsqrtf(__fdividef(squares, s.features) + p.eps);
#pragma unroll 1
  for (int at = share.own; at < features; at += step) {
    if (at > share.own) {
      weight.read(weights + at);
      if (biases) bias.read(biases + at);
    }
    float x[8];
    load8(to + place<X, W>(at), x);
    apply(by, weight, bias, x);
    store8(to + place<X, W>(at), x);
  }
}

}  // namespace lmi
