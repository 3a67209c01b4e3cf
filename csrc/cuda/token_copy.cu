// Launches the kernel of cuda/token_copy.cuh for kv_compact, kv_compact_, paged_kv_compact_ and gather_tokens.
// Documentation: docs/kernels/token_copy.md

#include "cuda/token_copy.cuh"

#include "cuda/host.cuh"

namespace pruneops {

void launch_plan(const Plan& plan, const Tensor& keep) {
  if (plan.copies.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(keep.get_device_index());
  const cudaStream_t stream = current_stream(keep);
  for_each_launch(plan, kMinInPlaceBlocks, [&](const CopyParams& params, int64_t blocks) {
    const size_t shared_bytes = plan.in_place ? kOffsetStages * sizeof(TileOffsets) : 0;
    launch(plan.in_place ? copy_tokens<true> : copy_tokens<false>, {blocks, kCopyThreads, shared_bytes}, stream,
           params);
  });
}

}  // namespace pruneops
