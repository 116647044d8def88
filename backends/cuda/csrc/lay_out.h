// Where the tokens of packed rows are, by what the host knows of the rows.
#pragma once

#include "common.cuh"

namespace lmi {

struct LayOutParams {
  const int* starts;   // [rows + 1]: where a row's tokens begin
  const int* lengths;  // [rows]: its tokens with those before, of which its tokens are the last
  const int* reached;  // [rows]
  const int* table;    // [rows, width]: its blocks; negative: none
  // [tokens]: each one's place in its row; `reached` of that; and its slot in the cache, block *
  // block_size + offset, -1 for none. Of tokens that no row has 0, 0 and -1.
  int *positions, *reach, *slots;
  int tokens, rows, width, block_size;
};

void lay_out(const LayOutParams& p, cudaStream_t stream);

}  // namespace lmi
