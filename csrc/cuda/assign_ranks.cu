// Rank assignment on CUDA: rank after rank takes the most likely token of its column among those not taken.
// pruneops/reference/assign_ranks.py is the specification; probabilities are compared by their logarithms, float32,
// with the full-precision exponential and logarithm.
//
// Right on an H100 in the tests, not timed there: all times below are expectations from counted instructions and bytes.
//
// One launch, a block per batch entry, logits in shared memory: all of them if they fit (N 576, J 64 in 227 KB, J 32 in
// 99 KB), else tile by tile, scores [B, j, N] and owners [B, N] in scratch memory. The ranks then choose all at once
// instead of one after the other: each, a warp, asks for its best token; a token stays with the best rank that asks; a
// rank turned down asks for its next. That ends as if they had chosen in turn: after 1 round if they want different
// tokens, about 10 if J 32 columns drift from token to token, j at worst.
//
// N 576, J 32, float32 on an H200, in cycles:
//   copy    76 KB at 64 bytes a cycle 1200, latency 700
//   scores  840 instructions a warp of tokens (33 exponentials a token), 18 warps on 4 schedulers 3800
//   rounds  the first 300 instructions a warp, 32 warps 2400; each after it 700
// 8000 cycles, 4.2 us at 1.9 GHz, with 1 round; 8 us with 10; 16 us with 32. N 65536, J 64: 17 MB in and 17 MB out by
// one multiprocessor, then a column of 256 KB a warp and round: about 1 ms.

#include "cuda/assign_ranks.cuh"
#include "cuda/host.cuh"

namespace pruneops {
namespace {

Tensor assign_ranks(const Tensor& logits, int64_t j) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const int64_t batch = logits.size(0), tokens = logits.size(1), classes = logits.size(2);
  STD_TORCH_CHECK(logits.stride(2) == 1, "pruneops: logits of a token must lie next to each other");
  STD_TORCH_CHECK(1 <= j && j < classes && j <= tokens && classes <= kMostRanks + 1 && tokens <= kMostTokens,
                  "pruneops: ", j, " ranks of ", classes, " classes for ", tokens, " tokens");
  const Tensor out = torch::stable::new_empty(logits, {batch, j}, ScalarType::Long);
  if (batch == 0) return out;
  by_element(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    AssignRanks<T> p{static_cast<const T*>(logits.data_ptr()), {logits.stride(0), logits.stride(1)}};
    p.tokens = static_cast<int>(tokens);
    p.classes = static_cast<int>(classes);
    p.ranks = static_cast<int>(j);
    p.out = static_cast<int64_t*>(out.data_ptr());
    plan(p, shared_memory());
    const Tensor memory = scratch(logits, p.tile < tokens ? batch * (j + 1) * tokens : 0);
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
