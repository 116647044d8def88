// What kernels want to know of torch's tensors, on torch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <mutex>
#include <optional>

#include "common.cuh"

namespace lmi {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

inline std::optional<Type> type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::Half: return Type::float16;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Char: return Type::int8;
    case ScalarType::Float8_e4m3fn: return Type::float8;
    default: return std::nullopt;
  }
}

inline bool is_quantized(Type type) { return type == Type::int8 || type == Type::float8; }

inline bool is_float(const Tensor& tensor) {
  const auto type = type_of(tensor);
  return type && !is_quantized(*type);
}

inline bool is_of(const Tensor& tensor, Type type) { return type_of(tensor) == type; }

// Whether it can be read 16 bytes at a time from its start on.
inline bool is_dense(const Tensor& tensor) {
  return tensor.is_cuda() && tensor.is_contiguous() &&
         reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
}

inline bool is_vector(const Maybe& tensor, int64_t size) {
  return !tensor || (is_float(*tensor) && is_dense(*tensor) && tensor->numel() == size);
}

inline bool is_float32(const Maybe& tensor) {
  return !tensor || (tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous());
}

inline Operand operand(const Maybe& tensor) {
  if (!tensor) return {};
  return {tensor->data_ptr(), *type_of(*tensor)};
}

template <typename T>
T* pointer(const Maybe& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

inline const Device& device_of(const Tensor& tensor) {
  static std::array<Device, 64> devices;
  static std::array<std::once_flag, 64> known;
  const auto index = static_cast<size_t>(tensor.get_device_index());
  std::call_once(known.at(index), [&] { devices[index] = device(static_cast<int>(index)); });
  return devices[index];
}

inline cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream)) {
    throw std::runtime_error("torch has no current stream");
  }
  return static_cast<cudaStream_t>(stream);
}

inline bool is_row(const Tensor& tensor, ScalarType type, int64_t size) {
  return tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == size;
}

}  // namespace lmi
