// kv_compact and kv_compact_ on CUDA: argument checks and registration; cuda/token_copy.cu copies.
// pruneops/reference/kv_compact.py is the specification.
// Documentation: docs/kernels/token_copy.md

#include "cuda/host.cuh"
#include "cuda/token_copy.cuh"

namespace pruneops {
namespace {

using Tensors = std::vector<Tensor>;

Tensors kv_compact(Tensors caches, Tensor keep, std::optional<Tensor> lengths) {
  check_caches(caches, keep, false);
  Tensors results = token_copy::new_caches(caches, keep.size(keep.dim() - 1));
  launch_plan(plan_compact(caches, results, keep, lengths, false), keep);
  return results;
}

void kv_compact_(Tensors caches, Tensor keep, std::optional<Tensor> lengths) {
  check_caches(caches, keep, true);
  launch_plan(plan_compact(caches, caches, keep, lengths, true), keep);
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CUDA, m) {
  m.impl("kv_compact", TORCH_BOX(&pruneops::kv_compact));
  m.impl("kv_compact_", TORCH_BOX(&pruneops::kv_compact_));
}
