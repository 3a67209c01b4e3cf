// gather_tokens on the CPU: argument checks and registration; cpu/token_copy.cpp copies.
// Documentation: docs/kernels/token_copy.md

#include <torch/csrc/stable/library.h>

#include "cpu/token_copy.h"

namespace pruneops {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

Tensors gather_tokens(Tensors tensors, Tensor keep, std::vector<int64_t> dims) {
  Tensors results;
  const Plan plan = plan_gather(tensors, keep, dims, results);
  int64_t min_positions = tensors[0].size(dims[0]);
  for (size_t i = 0; i < tensors.size(); ++i) min_positions = std::min(min_positions, tensors[i].size(dims[i]));
  check_values(plan, keep, min_positions);
  run_plan(plan);
  return results;
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CPU, m) { m.impl("gather_tokens", TORCH_BOX(&pruneops::gather_tokens)); }
