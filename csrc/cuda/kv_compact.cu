// Keeping some of the tokens of caches on CUDA, in new tensors or in place; cuda/token_copy.cuh says how and what it costs.
// pruneops/reference/kv_compact.py is the specification.

#include "cuda/token_copy_launch.cuh"

namespace pruneops {

void run(const Plan& plan, const Tensor& keep) {
  if (plan.jobs.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(keep.get_device_index());
  const cudaStream_t stream = current_stream(keep);
  each_launch(plan, kEnoughBlocks, [&](const Moves& moves, int64_t blocks) {
    const size_t shared_bytes = plan.in_place ? kPlaceTiles * sizeof(Places) : 0;
    launch(plan.in_place ? move_tokens<true> : move_tokens<false>, {blocks, kMoveThreads, shared_bytes}, stream, moves);
  });
}

namespace {

Tensors kv_compact(Tensors caches, Tensor keep, std::optional<Tensor> lengths) {
  expect_caches(caches, keep, false);
  Tensors results = token_copy::new_caches(caches, keep.size(keep.dim() - 1));
  run(plan_compact(caches, results, keep, lengths, false), keep);
  return results;
}

void kv_compact_(Tensors caches, Tensor keep, std::optional<Tensor> lengths) {
  expect_caches(caches, keep, true);
  run(plan_compact(caches, caches, keep, lengths, true), keep);
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CUDA, m) {
  m.impl("kv_compact", TORCH_BOX(&pruneops::kv_compact));
  m.impl("kv_compact_", TORCH_BOX(&pruneops::kv_compact_));
}
