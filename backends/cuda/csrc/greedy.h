#pragma once

#include "common.cuh"
#include "inbox.h"

namespace lmi {

constexpr int GREEDY_PARTS = 16;  // blocks a row

struct GreedyParams {
  Operand logits;     // [rows, vocab], of which rows are `stride` apart
  int64_t* drawn;     // [2, drawn_stride]: the token, or -1 if the logits are unusable; host memory
  int64_t* ids;       // [rows]: the token, or 0: what the next step is fed
  int* lengths;       // [rows], which grow by `live` [rows]
  int* turns;         // [rows]: in which half of `drawn`; they go on by `live` too
  const int* live;
  unsigned long long* work;  // [rows, GREEDY_PARTS]
  int* counters;             // [rows], zero
  int64_t stride, drawn_stride;
  int rows, vocab;
  int first;    // id of the first logit: ranks may have parts of the vocabulary
  Peers peers;  // which choose among what each has found
};

void greedy(const GreedyParams& p, const Device& gpu, cudaStream_t stream);

}  // namespace lmi
