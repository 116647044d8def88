// Sums over the GPUs of one host inside a step.
//
// A product whose results are summed sends them to every rank's inbox, its own as well, as words with
// marks (words.cuh). The phase behind it takes a word of every rank for each result and adds them up, in
// the order of ranks, in float32, with bias and residual, and rounds once: the same bits everywhere.
// Marks say when words are there, so no barrier lies between the two phases, and a sum costs one way
// across the link more than a product does on one GPU.
//
// Words have two sets, used in turns by the parity of marks. Nobody overwrites what is still to be read:
// - A block sends words of sum s behind a barrier of its GPU that follows sum s - 1 (plan_program sees to
//   it; between launches the kernel's end is that barrier). So its GPU has received all words of s - 1.
// - Every peer has sent some of those, and has done so behind a barrier that follows its sum s - 2: it
//   has read all its words of s - 2, in whose places those of s go.
// This holds for any two sums that follow each other, whichever programs they are of and however many
// rows these have. Words that were read are taken away, so no mark of long ago is left where a program of
// fewer rows does not write.
//
// Marks go on from launch to launch. Every block reads the last one when it starts; the first block sets
// it anew at its end, when it has waited at a barrier where all blocks had arrived since.
#pragma once

#include "multiply.cuh"
#include "step.h"
#include "words.cuh"

namespace lmi {

// What blocks keep of their peers in shared memory.
struct Meeting : StepPeers {
  unsigned last;  // the mark that the launch began with

  // By one thread, before the block arrives at any barrier.
  __device__ void begin(const StepPeers& given) {
    static_cast<StepPeers&>(*this) = given;
    last = ranks ? *static_cast<const volatile unsigned*>(&own->mark) : 0;
  }

  // By one thread of all blocks, behind a barrier of the launch.
  __device__ void end(int sums) const {
    if (ranks) own->mark = after(last, sums);
  }

  __device__ unsigned mark(int sum) const { return after(last, sum); }
};

// What becomes of a thread's two results for row m of x where there are sums. They are stored, or,
// with a residual if there is one, sent to all ranks.
static __device__ __noinline__ void put_or_send(const Meeting& peers, const Phase& phase, int tile,
                                                int g, int m, Terms terms, float2 product) {
  const LinearParams& p = phase.linear;
  if (!phase.sum) return put(p, tile, g, m, terms, product);
  const unsigned mark = peers.mark(phase.sum);
#pragma unroll 1
  for (int i = 1; i <= peers.ranks; ++i) {  // its own inbox is the last one
    const int to = (peers.rank + i) % peers.ranks;
    auto* words = peers.inboxes[to]->words[mark & 1][peers.rank];
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const int n = output(p.weights, tile, g, upper);
      const float value = (upper ? product.y : product.x) * terms.scale[upper] +
                          widen(terms.residual[upper], p.residual.type);
      if (in_range(p, tile, g, m, n)) {
        send(words + m * p.weights.outputs + n, __float_as_uint(value), mark);
      }
    }
  }
}

struct PutOrSend {
  const Meeting& peers;
  const Phase& phase;

  __device__ void operator()(const LinearParams&, int tile, int g, int m, Terms terms,
                             float2 product) const {
    put_or_send(peers, phase, tile, g, m, terms, product);
  }
};

// Whether a word has been waited for too long. The clock and `broken` are looked at only once words
// are later than they are in any good step: a look takes as long as a word does.
struct Late {
  static constexpr int PROMPT = 1000;  // looks at what is missing: some 700 microseconds
  int looks = 0;
  unsigned long long begun = 0;

  __device__ bool operator()(const Meeting& peers) {
    if (++looks < PROMPT) return false;
    if (!begun) begun = now();
    // After one that did not come, not to wait as long in all that follows.
    return *static_cast<const volatile unsigned*>(&peers.own->broken) ||
           now() - begun > peers.patience;
  }
};

// Take the word with this mark. If it does not come, that is told, and nothing taken.
__device__ inline float receive(const Meeting& peers, unsigned long long* from, unsigned mark) {
  Late late;
  while (true) {
    const unsigned long long word = peek(from);
    if (mark_of(word) == mark) {
      send(from, 0, 0);
      return __uint_as_float(static_cast<unsigned>(word));
    }
    if (late(peers)) break;
  }
  peers.own->broken = 1;
  *static_cast<volatile int*>(peers.failed) = 1;
  return 0;
}

// The block's share of a sum. A warp's lanes each have a word: of as many results as there are lanes for
// every rank; a result's first lane adds up and finishes it.
static __device__ __noinline__ void add_up(const Phase& phase, const Meeting& peers) {
  const SumParams& p = phase.sum_params;
  const unsigned mark = peers.mark(phase.sum);
  const int lane = threadIdx.x % 32;
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
    if (from < peers.ranks && at < p.words) {
      own = receive(peers, &peers.own->words[mark & 1][from][at], mark);
    }
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
