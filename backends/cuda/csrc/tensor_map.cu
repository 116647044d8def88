// Descriptions of matrices for the copy engine.
#include "gemm.h"

namespace lmi {
namespace {

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

CUtensorMap tensor_map(const void* data, Type type, int rows, int features, int box_rows) {
  static const Encode encode_tiled = encode();
  const auto element = type == Type::float16    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                       : type == Type::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const cuuint64_t bytes = element == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(features), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {bytes * sizes[0]};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(BOX_BYTES / bytes),
                            static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t every[] = {1, 1};
  CUtensorMap map{};
  const CUresult done = encode_tiled(
      &map, element, 2, const_cast<void*>(data), sizes, strides, box, every,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (done != CUDA_SUCCESS) {
    throw std::runtime_error("tensor map: the driver's error " + std::to_string(done));
  }
  return map;
}

}  // namespace lmi
