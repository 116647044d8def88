// Rows of a file brought to a GPU through pinned memory: a piece of it is filled while others are sent.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "tensors.h"

namespace lmi {
namespace {

constexpr int64_t TOO_SHORT = -1;

// When what was sent before is there.
class Sent {
 public:
  Sent() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "event"); }
  Sent(const Sent&) = delete;
  Sent& operator=(const Sent&) = delete;
  ~Sent() { cudaEventDestroy(event_); }
  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "event"); }
  void wait() { check(cudaEventSynchronize(event_), "copy to the GPU"); }

 private:
  cudaEvent_t event_{};
};

// 0 if `count` bytes from `start` on came, TOO_SHORT where the file ends before, else what went wrong.
int64_t fill(int file, char* to, int64_t count, int64_t start) {
  while (count) {
    const ssize_t got = pread(file, to, count, start);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return got ? errno : TOO_SHORT;
    to += got, count -= got, start += got;
  }
  return 0;
}

// `target`: uint8 [rows, bytes] on the device, whose rows lie `pitch` bytes apart in the file, from
// `start` on; `pinned`: uint8 [pieces, bytes] in pinned memory, for this call alone. Returns as `fill`
// does, when all is there, or nothing more is written.
int64_t run_read_rows(int64_t file, int64_t start, int64_t pitch, Tensor target, Tensor pinned) {
  const torch::stable::accelerator::DeviceGuard guard(target.get_device_index());
  const cudaStream_t stream = stream_of(target);
  const int64_t rows = target.size(0), width = target.size(1), stride = target.stride(0);
  const int64_t pieces = pinned.size(0), room = pinned.size(1);
  const int64_t part = std::min(width, room), most = std::max<int64_t>(room / width, 1);
  char* const to = static_cast<char*>(target.data_ptr());
  std::vector<Sent> sent(pieces);
  int64_t turn = 0, fault = 0;
  const auto bring = [&](int64_t row, int64_t count, int64_t at, int64_t size) {
    const int64_t piece = turn++ % pieces;
    char* const from = static_cast<char*>(pinned.data_ptr()) + piece * room;
    if (turn > pieces) sent[piece].wait();
    for (int64_t i = 0; i < count && !fault; ++i) {
      fault = fill(static_cast<int>(file), from + i * size, size, start + (row + i) * pitch + at);
    }
    if (fault) return;
    // A pitch has to fit 31 bits: that of one row, which may be a whole tensor, means nothing.
    check(cudaMemcpy2DAsync(to + row * stride + at, count > 1 ? stride : size, from, size, size,
                            count, cudaMemcpyHostToDevice, stream), "copy to the GPU");
    sent[piece].record(stream);
  };
  try {
    for (int64_t row = 0; row < rows; row += most) {
      for (int64_t at = 0; at < width && !fault; at += part) {
        bring(row, std::min(most, rows - row), at, std::min(part, width - at));
      }
    }
  } catch (...) {
    cudaStreamSynchronize(stream);  // `pinned` is another's when this returns
    throw;
  }
  check(cudaStreamSynchronize(stream), "copy to the GPU");
  return fault;
}

}  // namespace
}  // namespace lmi

STABLE_TORCH_LIBRARY_FRAGMENT(lmi_multi, m) {
  m.def("read_rows(int file, int start, int pitch, Tensor(a!) target, Tensor(b!) pinned) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(lmi_multi, CUDA, m) { m.impl("read_rows", TORCH_BOX(&lmi::run_read_rows)); }
