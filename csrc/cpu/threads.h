// Dynamically scheduled parallel loop.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace pruneops {

// Calls body(i) for i in [0, count); idle threads take the next i from an atomic counter. `work` is the total number of
// multiplications; one thread more for every 2^18 of them.
template <class Body>
void dynamic_parallel_for(int64_t count, int64_t work, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>({count, torch::stable::get_num_threads(), 1 + (work >> 18)});
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) body(i);
  });
}

}  // namespace pruneops
