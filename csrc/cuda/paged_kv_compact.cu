// paged_kv_compact_ on CUDA: argument checks and registration; cuda/token_copy.cu copies.
// pruneops/reference/paged_kv_compact.py is the specification.
// Documentation: docs/kernels/token_copy.md

#include "cuda/host.cuh"
#include "cuda/token_copy.cuh"

namespace pruneops {
namespace {

using Tensors = std::vector<Tensor>;

void paged_kv_compact_(Tensors pages, Tensor block_table, Tensor keep, Tensor lengths, bool nhd) {
  const Plan plan = plan_paged(pages, block_table, keep, lengths, nhd);
  token_copy::check(block_table.size(1) <= UINT32_MAX / plan.positions.page_size, "too many positions");
  launch_plan(plan, keep);
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CUDA, m) {
  m.impl("paged_kv_compact_", TORCH_BOX(&pruneops::paged_kv_compact_));
}
