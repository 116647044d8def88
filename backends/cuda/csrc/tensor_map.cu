// Descriptions of matrices for the copy engine.
#include "tensor_map.h"

#include <algorithm>

namespace lmi {
namespace {

constexpr int MOST_DIMS = 3;

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking to the driver: there may be none where this is built.
Encode encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                         &result),
        "tensor map");
  if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("tensor map: no such driver");
  return reinterpret_cast<Encode>(found);
}

}  // namespace

CUtensorMap tensor_map(const void* data, Type type, std::initializer_list<int64_t> sizes,
                       std::initializer_list<int64_t> strides, std::initializer_list<int> box) {
  static const Encode encode_tiled = encode();
  const auto element = type == Type::float16    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                       : type == Type::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const int64_t bytes = element == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  cuuint64_t dims[MOST_DIMS]{}, pitches[MOST_DIMS]{};
  cuuint32_t boxes[MOST_DIMS]{}, every[MOST_DIMS]{};
  std::copy(sizes.begin(), sizes.end(), dims);
  std::transform(strides.begin(), strides.end(), pitches, [&](int64_t own) { return own * bytes; });
  std::copy(box.begin(), box.end(), boxes);
  std::fill_n(every, MOST_DIMS, 1);
  CUtensorMap map{};
  const CUresult done = encode_tiled(
      &map, element, static_cast<cuuint32_t>(sizes.size()), const_cast<void*>(data), dims, pitches,
      boxes, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (done != CUDA_SUCCESS) {
    throw std::runtime_error("tensor map: the driver's error " + std::to_string(done));
  }
  return map;
}

CUtensorMap tensor_map(const void* data, Type type, int rows, int features, int box_rows) {
  const bool half = type == Type::float16 || type == Type::bfloat16;
  return tensor_map(data, type, {features, rows}, {features}, {BOX_BYTES / (half ? 2 : 1), box_rows});
}

}  // namespace lmi
