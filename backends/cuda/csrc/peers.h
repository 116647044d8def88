// Ranks that reach each other's memory, as torch names them.
#pragma once

#include "inbox.h"
#include "tensors.h"

namespace lmi {

// `inboxes`: int64 on the CPU, the addresses by rank. `failed`: int32 [1] in pinned memory. Nothing where
// these are something else.
inline std::optional<Peers> peers_of(const Tensor& inboxes, int64_t rank, int64_t patience,
                                     const Tensor& failed) {
  const int64_t ranks = inboxes.numel();
  if (!inboxes.is_cpu() || !is_row(inboxes, ScalarType::Long, ranks) || ranks < 2 ||
      ranks > MOST_PEERS || rank < 0 || rank >= ranks || !is_row(failed, ScalarType::Int, 1)) {
    return std::nullopt;
  }
  Peers found{.rank = static_cast<int>(rank),
              .ranks = static_cast<int>(ranks),
              .patience = static_cast<unsigned long long>(patience),
              .failed = static_cast<int*>(failed.data_ptr()),
              .own = nullptr,
              .inboxes = {}};
  const auto* addresses = static_cast<const int64_t*>(inboxes.data_ptr());
  for (int64_t r = 0; r < ranks; ++r) {
    found.inboxes[r] = reinterpret_cast<Inbox*>(static_cast<uintptr_t>(addresses[r]));
  }
  found.own = found.inboxes[rank];
  return found;
}

}  // namespace lmi
