// gather_tokens on CUDA: argument checks and registration; cuda/token_copy.cu copies.
// pruneops/reference/gather_tokens.py is the specification.
// Documentation: docs/kernels/token_copy.md

#include "cuda/host.cuh"
#include "cuda/token_copy.cuh"

namespace pruneops {
namespace {

using Tensors = std::vector<Tensor>;

Tensors gather_tokens(Tensors tensors, Tensor keep, std::vector<int64_t> dims) {
  Tensors results;
  launch_plan(plan_gather(tensors, keep, dims, results), keep);
  return results;
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CUDA, m) { m.impl("gather_tokens", TORCH_BOX(&pruneops::gather_tokens)); }
