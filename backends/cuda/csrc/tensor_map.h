// Descriptions of tensors for Hopper's copy engine.
#pragma once

#include <cuda.h>

#include <initializer_list>

#include "common.cuh"

namespace lmi {

constexpr int BOX_BYTES = 128;  // of a row of a box, which the copy engine swizzles

// How the copy engine finds boxes of a tensor; beyond its ends it reads zeros. Sizes, and the box's, are
// those of the innermost dimension first; strides, in elements, those of all but that.
CUtensorMap tensor_map(const void* data, Type type, std::initializer_list<int64_t> sizes,
                       std::initializer_list<int64_t> strides, std::initializer_list<int> box);

// The same for boxes of `box_rows` rows of a matrix [rows, features].
CUtensorMap tensor_map(const void* data, Type type, int rows, int features, int box_rows);

}  // namespace lmi
