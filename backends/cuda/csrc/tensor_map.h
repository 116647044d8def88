// Matrices as the copy engine knows them.
#pragma once

#include <cuda.h>

#include "common.cuh"

namespace lmi {

constexpr int BOX_BYTES = 128;  // of a box's row, swizzled

// Matrices [rows, features] one behind the other.
struct Matrices {
  int rows, features, count = 1;
};

// How the copy engine finds boxes of so many rows of every matrix; beyond their ends it reads zeros. Rows
// must be multiples of 16 bytes. A single matrix may be described in two dimensions or in three.
CUtensorMap tensor_map(const void* data, Type type, const Matrices& matrices, int box_rows,
                       int dimensions = 2);

}  // namespace lmi
