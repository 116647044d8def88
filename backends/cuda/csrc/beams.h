#pragma once

#include "common.cuh"

namespace lmi {

constexpr int BEAM_PARTS = 8;    // blocks a row
constexpr int BEAM_LISTS = 64;   // warps a row, each with a list of what is best in its share
constexpr int MOST_BEAMS = 32;   // of a search
constexpr int MOST_KEPT = 32;    // continuations of a search
constexpr int MOST_STOPS = 8;    // tokens that end a beam

// Searches of `width` consecutive rows each. What a step leaves for the host, for each search int32
// [record]: of the best continuations, falling, scores (as float's bits; -inf: there are no more),
// beams and tokens, `keep` each; 1 if the logits of all its rows were usable; and of the beams that
// go on, by rows, the rows that they continue, tokens, scores, blocks that they write to, and blocks
// that are to be copied to these before (-1: none), `width` each.
struct BeamParams {
  Operand logits;  // [searches * width, vocab], of which rows are `stride` apart
  int* found;      // [2, found_stride]: host memory
  float* scores;   // [rows]: of each beam so far
  int64_t* ids;    // [rows]: each beam's token for the next step
  int* lengths;    // [rows], which grow by `live` [rows]
  int* turns;      // [rows]: in which half of `found`; they go on by `live` too
  int* table;      // [rows, table_width]: blocks of each beam
  int* copies;     // [rows, 2]: which block to copy to which before the next step; -1: none
  const int* live;
  const int* own;    // [rows, table_width]: blocks that the beams of a search may take
  const int* stops;  // [rows, MOST_STOPS], a search's in its first row; -1: none
  unsigned long long* work;  // [rows, BEAM_LISTS, keep], then float [rows, BEAM_LISTS]
  int* counters;             // [searches], zero
  int64_t stride, found_stride;
  int searches, width, keep, vocab, table_width, block_size;

  __host__ __device__ int rows() const { return searches * width; }
  __host__ __device__ int record() const { return 3 * keep + 1 + 5 * width; }
};

void beams(const BeamParams& p, const Device& gpu, cudaStream_t stream);

// Blocks of a cache of `pools`, each of `blocks` of `bytes` (a multiple of 16) bytes.
struct CopyBlocksParams {
  char* cache;
  const int* pairs;  // [count, 2]: from, to; where either is negative nothing is copied
  int64_t bytes, blocks;
  int pools, count;
};

void copy_blocks(const CopyBlocksParams& p, const Device& gpu, cudaStream_t stream);

}  // namespace lmi
