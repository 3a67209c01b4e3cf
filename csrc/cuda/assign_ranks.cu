// Rank assignment on CUDA: each rank in turn takes the most probable token of its column that is still free.
// Probabilities are compared by their float32 logarithms, with the full-precision exponential and logarithm.
//
// Cost per batch row: one block; N (J + 1) logits read once, as many exponentials. If the logits exceed shared memory,
// 4 N (j + 1) bytes of workspace, and a column of 4 N bytes is read per rank and round.
// All ranks choose at once, by deferred acceptance: each proposes to its best token, a token keeps the best rank that
// proposes, a rejected rank proposes to its next best. One round if all ranks propose to different tokens, at worst j.
// docs/kernels/assign_ranks.md: algorithm, cycle counts.

#include "cuda/assign_ranks.cuh"
#include "cuda/host.cuh"

namespace pruneops {
namespace {

Tensor assign_ranks(const Tensor& logits, int64_t j) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const int64_t batch = logits.size(0), tokens = logits.size(1), classes = logits.size(2);
  STD_TORCH_CHECK(logits.stride(2) == 1, "pruneops: the last dimension of logits must be contiguous");
  STD_TORCH_CHECK(1 <= j && j < classes && j <= tokens && classes <= kMaxRanks + 1 && tokens <= kMaxTokens,
                  "pruneops: ", j, " ranks of ", classes, " classes for ", tokens, " tokens");
  const Tensor out = torch::stable::new_empty(logits, {batch, j}, ScalarType::Long);
  if (batch == 0) return out;
  dispatch_dtype(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    AssignRanksParams<T> p{static_cast<const T*>(logits.data_ptr()), {logits.stride(0), logits.stride(1)}};
    p.tokens = static_cast<int>(tokens);
    p.classes = static_cast<int>(classes);
    p.ranks = static_cast<int>(j);
    p.out = static_cast<int64_t*>(out.data_ptr());
    plan(p, max_shared_memory());
    const Tensor memory = workspace(logits, p.tile < tokens ? batch * (j + 1) * tokens : 0);
    if (p.tile < tokens) {
      p.scores = static_cast<float*>(memory.data_ptr());
      p.owner = reinterpret_cast<unsigned*>(p.scores + batch * j * tokens);
    }
    launch(assign_ranks_select<T>, {batch, kRankThreads, shared_bytes(p)}, current_stream(logits), p);
  });
  return out;
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CUDA, m) { m.impl("assign_ranks", TORCH_BOX(&pruneops::assign_ranks)); }
