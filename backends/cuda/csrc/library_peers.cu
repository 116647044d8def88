// Sums over the GPUs of one host, as torch sees them, and the memory that they share for it.
#include <cstring>

#include "all_reduce.h"
#include "peers.h"
#include "tensors.h"

namespace lmi {
namespace {

using torch::stable::accelerator::DeviceGuard;

bool is_handle(const Tensor& handle) {
  return handle.is_cpu() && handle.scalar_type() == ScalarType::Byte && handle.is_contiguous() &&
         handle.numel() == sizeof(cudaIpcMemHandle_t);
}

// A new inbox on a GPU: its address here, and in `handle` what other processes open it by. It stays
// until the process ends, as others may write to it until they have ended.
int64_t make_inbox(Tensor handle, int64_t device) {
  if (!is_handle(handle)) throw std::runtime_error("handle: uint8 [64] on the CPU is wanted");
  const DeviceGuard guard(static_cast<int32_t>(device));
  void* made = nullptr;
  check(cudaMalloc(&made, sizeof(Inbox)), "inbox");
  check(cudaMemset(made, 0, sizeof(Inbox)), "inbox");
  check(cudaDeviceSynchronize(), "inbox");
  cudaIpcMemHandle_t found;
  check(cudaIpcGetMemHandle(&found, made), "handle of an inbox");
  std::memcpy(handle.data_ptr(), &found, sizeof(found));
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(made));
}

// The address on a GPU of another process's inbox.
int64_t open_inbox(Tensor handle, int64_t device) {
  if (!is_handle(handle)) throw std::runtime_error("handle: uint8 [64] on the CPU is wanted");
  const DeviceGuard guard(static_cast<int32_t>(device));
  cudaIpcMemHandle_t given;
  std::memcpy(&given, handle.data_ptr(), sizeof(given));
  void* opened = nullptr;
  check(cudaIpcOpenMemHandle(&opened, given, cudaIpcMemLazyEnablePeerAccess), "peer's inbox");
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(opened));
}

bool is_whole(const Tensor& tensor) {
  return is_float(tensor) && tensor.is_cuda() && tensor.is_contiguous() &&
         reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 4 == 0;
}

// See peers.h.
bool run_all_reduce(Tensor x, Maybe residual, Maybe bias, Tensor inboxes, int64_t rank,
                    int64_t patience, Tensor failed) {
  const auto peers = peers_of(inboxes, rank, patience, failed);
  if (!peers || !is_whole(x) || !x.numel()) return false;
  const int64_t of_word = is_of(x, Type::float32) ? 1 : 2, features = bias ? bias->numel() : of_word;
  if (x.numel() % of_word || x.numel() / of_word > MOST_WORDS ||
      (residual && (!is_whole(*residual) || residual->numel() != x.numel())) ||
      (bias && (!residual || !is_whole(*bias) || !features || features % of_word ||
                x.numel() % features))) {
    return false;
  }
  const AllReduceParams p{.x = x.data_ptr(),
                          .type = *type_of(x),
                          .residual = residual ? residual->data_ptr() : nullptr,
                          .residual_type = residual ? *type_of(*residual) : *type_of(x),
                          .bias = operand(bias),
                          .features = static_cast<int>(features),
                          .words = static_cast<int>(x.numel() / of_word),
                          .peers = *peers};
  const DeviceGuard guard(x.get_device_index());
  all_reduce(p, device_of(x), stream_of(x));
  return true;
}

}  // namespace
}  // namespace lmi

STABLE_TORCH_LIBRARY_FRAGMENT(lmi_multi, m) {
  m.def("make_inbox(Tensor(a!) handle, int device) -> int");
  m.def("open_inbox(Tensor handle, int device) -> int");
  m.def(
      "all_reduce(Tensor(a!) x, Tensor(b!)? residual, Tensor? bias, Tensor inboxes, int rank, "
      "int patience, Tensor(c!) failed) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lmi_multi, CPU, m) {
  m.impl("make_inbox", TORCH_BOX(&lmi::make_inbox));
  m.impl("open_inbox", TORCH_BOX(&lmi::open_inbox));
}

STABLE_TORCH_LIBRARY_IMPL(lmi_multi, CUDA, m) {
  m.impl("all_reduce", TORCH_BOX(&lmi::run_all_reduce));
}
