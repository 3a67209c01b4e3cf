// Work that threads take piece by piece.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace pruneops {

// body(i) for i from 0 to count, each on whichever thread is free; `work`, in multiplications, says how many are woken.
template <class Body>
void each(int64_t count, int64_t work, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>({count, torch::stable::get_num_threads(), 1 + (work >> 18)});
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) body(i);
  });
}

}  // namespace pruneops
