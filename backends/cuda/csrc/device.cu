// What a GPU is, as far as the kernels ask.
#include <map>
#include <mutex>
#include <utility>

#include "common.cuh"

namespace lmi {
namespace {

__global__ void any_kernel() {}

int attribute(cudaDeviceAttr name, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, index), "device");
  return value;
}

}  // namespace

Device device(int index) {
  // Code made for an older architecture does not wait for the kernel before it, and has no step
  // kernel: it must be started as on a GPU of that architecture.
  cudaFuncAttributes code{};
  check(cudaFuncGetAttributes(&code, any_kernel), "code");
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, index);
  return {std::min(major, code.ptxVersion / 10),
          attribute(cudaDevAttrMultiProcessorCount, index),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
          major == 9 && code.ptxVersion == 90};
}

void allow_shared(const void* kernel, int bytes) {
  static std::mutex mutex;
  // Never destroyed: threads may launch kernels while the process ends.
  static auto& allowed = *new std::map<std::pair<int, const void*>, int>;
  int device = 0;
  check(cudaGetDevice(&device), "device");
  std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{device, kernel}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "shared memory");
  most = bytes;
}

}  // namespace lmi
