// Keeping some of the tokens of paged caches on CUDA, in place; cuda/token_copy.cuh says how and what it costs.
// pruneops/reference/paged_kv_compact.py is the specification.

#include "cuda/token_copy_launch.cuh"

namespace pruneops {
namespace {

void paged_kv_compact_(Tensors pages, Tensor block_table, Tensor keep, Tensor lengths, bool nhd) {
  const Plan plan = plan_paged(pages, block_table, keep, lengths, nhd);
  token_copy::expect(block_table.size(1) <= UINT32_MAX / plan.positions.page, "too many positions");
  run(plan, keep);
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CUDA, m) {
  m.impl("paged_kv_compact_", TORCH_BOX(&pruneops::paged_kv_compact_));
}
