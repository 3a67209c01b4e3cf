// (header to come)

#include <algorithm>
#include <bit>
#include <optional>
#include <vector>

#include "cuda/exclusive_bottomk.cuh"
#include "cuda/host.cuh"

namespace pruneops {

Tensor pivot_cosine(const Tensor& x, const std::optional<Tensor>& cu_seqlens, const Tensor& pivots,
                    const std::optional<Tensor>& mask, int64_t reduce);  // in pivot_cosine.cu

namespace {

// Among the tokens whose flag is not `taken`.
Tensor select(const Tensor& scores, const std::vector<int64_t>& quotas, const std::optional<Tensor>& flags,
              bool taken) {
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  const int64_t batch = scores.size(0), rows = scores.size(1), tokens = scores.size(2);
  STD_TORCH_CHECK(rows <= kMostTakers && rows == static_cast<int64_t>(quotas.size()), "pruneops: ", quotas.size(),
                  " quotas for ", rows, " rows of scores");
  STD_TORCH_CHECK(tokens <= kMostTokens, "pruneops: scores of ", tokens, " tokens");
  STD_TORCH_CHECK(scores.stride(2) == 1 || tokens == 1, "pruneops: scores of a row must lie next to each other");
  int64_t total = 0;
  for (const int64_t quota : quotas) total += quota;
  const Tensor out = torch::stable::new_empty(scores, {batch, total}, ScalarType::Long);
  if (batch == 0 || total == 0) return out;
  by_element(scores.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Bottomk<T> p{static_cast<const T*>(scores.data_ptr()), {scores.stride(0), scores.stride(1)}, flags_of(flags), taken};
    p.tokens = static_cast<int>(tokens);
    p.rows = static_cast<int>(rows);
    p.out = static_cast<int64_t*>(out.data_ptr());
    const bool listed = plan(p, quotas.data());
    const Tensor memory = scratch(scores, batch * (listed ? p.list[rows] : (tokens + 31) / 32));
    p.lists = static_cast<int*>(memory.data_ptr());
    p.used = static_cast<unsigned*>(memory.data_ptr());
    p.blocks = listed && has_clusters() ? std::bit_floor(std::min<unsigned>(kMostBlocks, rows)) : 1;
    launch(listed ? exclusive_bottomk_select<T, true> : exclusive_bottomk_select<T, false>,
           {batch * p.blocks, kSelectThreads, sizeof(BottomkShared), p.blocks}, current_stream(scores), p);
  });
  return out;
}

Tensor exclusive_bottomk(const Tensor& scores, std::vector<int64_t> quotas, const std::optional<Tensor>& taken) {
  return select(scores, quotas, taken, true);
}

Tensor pivot_bottomk(const Tensor& x, const Tensor& pivots, std::vector<int64_t> quotas,
                     const std::optional<Tensor>& mask) {
  return select(pivot_cosine(x, std::nullopt, pivots, std::nullopt, 0), quotas, mask, false);
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CUDA, m) {
  m.impl("exclusive_bottomk", TORCH_BOX(&pruneops::exclusive_bottomk));
  m.impl("pivot_bottomk", TORCH_BOX(&pruneops::pivot_bottomk));
}
