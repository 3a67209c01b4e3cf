// Some of the tokens of tensors of any shape; see cpu/token_copy.cpp.

#include <torch/csrc/stable/library.h>

#include "cpu/token_copy.h"

namespace pruneops {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

Tensors gather_tokens(Tensors tensors, Tensor keep, std::vector<int64_t> dims) {
  Tensors results;
  const Plan plan = plan_gather(tensors, keep, dims, results);
  int64_t fewest = tensors[0].size(dims[0]);
  for (size_t i = 0; i < tensors.size(); ++i) fewest = std::min(fewest, tensors[i].size(dims[i]));
  expect_values(plan, keep, fewest);
  run(plan);
  return results;
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CPU, m) { m.impl("gather_tokens", TORCH_BOX(&pruneops::gather_tokens)); }
