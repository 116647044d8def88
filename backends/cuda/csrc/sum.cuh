// Sums over the GPUs of one host inside a step.
//
// A product whose results are summed sends them to every rank's inbox, its own as well (meeting.cuh).
// The phase behind it takes a word of every rank for each result and adds them up, in the order of
// ranks, in float32, with bias and residual, and rounds once: the same bits everywhere. Words say when
// they are there, so no barrier lies between the two phases, and a sum costs one way across the link
// more than a product does on one GPU. With few rows there is no such phase: see take.cuh.
#pragma once

#include "meeting.cuh"
#include "multiply.cuh"

namespace lmi {

// What becomes of a thread's two results for row m of x where there are sums. They are stored, or,
// with a residual if there is one, sent to all ranks.
template <typename X>
static __device__ __noinline__ void put_or_send(const Meeting& peers, const Phase& phase, int tile,
                                                int g, int m, Terms terms, float2 product) {
  const LinearParams& p = phase.linear;
  if (!phase.sum) return put<X>(p, tile, g, m, terms, product);
  const int set = peers.set(phase.sum), first = m * p.weights.outputs;
  const int n[2] = {output(p.weights, tile, g, 0), output(p.weights, tile, g, 1)};
  const bool sent[2] = {in_range(p, tile, g, m, n[0]), in_range(p, tile, g, m, n[1])};
  const float values[2] = {
      product.x * terms.scale[0] + widen_term<X>(terms.residual[0], p.residual),
      product.y * terms.scale[1] + widen_term<X>(terms.residual[1], p.residual)};
#pragma unroll 1
  for (int i = 1; i <= peers.ranks; ++i) {  // its own inbox is the last one
    unsigned* words = peers.inboxes[(peers.rank + i) % peers.ranks]->words[set][peers.rank] + first;
    if (sent[0]) send_part(words + n[0], values[0]);
    if (sent[1]) send_part(words + n[1], values[1]);
  }
}

template <typename X>
struct PutOrSend {
  const Meeting& peers;
  const Phase& phase;

  __device__ void operator()(const LinearParams&, int tile, int g, int m, Terms terms,
                             float2 product) const {
    put_or_send<X>(peers, phase, tile, g, m, terms, product);
  }
};

// The block's share of a sum. A warp's lanes each have a word: of as many results as there are lanes for
// every rank; a result's first lane adds up and finishes it.
static __device__ __noinline__ void add_up(const Phase& phase, const Meeting& peers) {
  const SumParams& p = phase.sum_params;
  const int set = peers.set(phase.sum), lane = threadIdx.x % 32;
  int each = 32;
  while (32 / each < peers.ranks) each /= 2;
  const int from = lane / each;
  // Blocks have their words in turns: with few rows each has some.
  int first = (threadIdx.x / 32 * gridDim.x + blockIdx.x) * each;
#pragma unroll 1
  for (; first < p.words; first += gridDim.x * (blockDim.x / 32) * each) {
    const int at = first + lane % each;
    const bool mine = from == 0 && at < p.words;
    uint32_t residual = 0, bias = 0;
    if (mine) {
      residual = read(p.residual, at);
      if (p.bias.data) bias = read(p.bias, at % p.features);
    }
    float own = 0, sum = 0;
    if (from < peers.ranks && at < p.words) own = receive(peers, &peers.own->words[set][from][at]);
#pragma unroll 1
    for (int r = 0; r < peers.ranks; ++r) {
      sum += __shfl_sync(~0u, own, r * each + lane % each);
    }
    if (mine) {
      store(p.out, p.out_type, at,
            widen(residual, p.residual.type) + (sum + widen(bias, p.bias.type)));
    }
  }
}

}  // namespace lmi
