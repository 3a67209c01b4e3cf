// Some of the tokens of tensors of any shape on CUDA; cuda/token_copy.cuh says how and what it costs.
// pruneops/reference/gather_tokens.py is the specification.

#include "cuda/token_copy_launch.cuh"

namespace pruneops {
namespace {

Tensors gather_tokens(Tensors tensors, Tensor keep, std::vector<int64_t> dims) {
  Tensors results;
  run(plan_gather(tensors, keep, dims, results), keep);
  return results;
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CUDA, m) { m.impl("gather_tokens", TORCH_BOX(&pruneops::gather_tokens)); }
