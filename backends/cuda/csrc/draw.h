#pragma once

#include "common.cuh"

namespace lmi {

constexpr int MOST_DRAWN_VOCAB = 1 << 18;  // and what shared memory of the GPU's blocks has room for
constexpr int MOST_DRAW_TEAMS = 64;
constexpr int DRAW_TEAM_BYTES = 75808;
constexpr int MOST_LOGPROBS = 20;

// How a row draws, as lmi_multi/ops/sampling.py has it, and where in `lists` its ids are. numpy makes
// them: backends/cuda/fused_draws.py.
struct DrawOptions {
  double presence, frequency;
  float temperature;  // 0: the likeliest token
  float top_p, min_p, typical_p;
  float repetition, prompt;  // what divides positive logits of earlier tokens, and of the prompt's
  int top_k;                 // 0: off
  int given;                 // tokens of its history that were not drawn
  int ngram;                 // 0: off
  int logprobs;              // of so many likeliest tokens beside the drawn one's; -1: of none
  int bias, biases;          // pairs of an id and a float's bits
  int banned, bans;          // ids
  int forced, forces;        // ids
  int words, word_count;     // where each begins behind `words`, and the last ends; then their ids
};

// What is known of earlier tokens: in blocks, as keys and values are.
struct DrawHistory {
  int* tokens;              // [blocks, block_size]
  const int* table;         // [rows, width] blocks of each row
  const int* cross_table;   // [rows, cross_width] those of its encoded prompt
  const int* cross_lengths;  // [rows]
  int block_size, width, cross_width;
};

struct DrawParams {
  Operand logits;  // [rows, vocab], of which rows are `stride` apart
  const DrawOptions* options;  // [rows]
  const float* uniform;        // [rows]
  const int* lists;
  DrawHistory history;
  int64_t* drawn;  // [2, drawn_stride]: the token, or -1 if the logits are unusable; host memory
  int* logprobs;   // [2, drawn_stride, 1 + 2 * MOST_LOGPROBS]: of the token, ids, theirs; host memory
  int64_t* ids;    // [rows]: the token, or 0: what the next step is fed
  int* lengths;    // [rows]: tokens of context with the one in `ids`, which grow by `live` [rows]
  int* turns;      // [rows]: in which half of `drawn`; they go on by `live` too
  const int* live;
  void* teams;  // [MOST_DRAW_TEAMS], DRAW_TEAM_BYTES each, zero at first
  int64_t stride, drawn_stride;
  int rows, vocab;
  int chunk = 0;  // of the vocabulary, a block's: `draw` sets it
};

// False where the GPU has no room for enough blocks at a time.
bool draw(DrawParams p, const Device& gpu, cudaStream_t stream);

}  // namespace lmi
