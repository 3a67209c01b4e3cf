// Keeping some of the tokens of caches, in new tensors or in place; see cpu/token_copy.cpp.

#include <torch/csrc/stable/library.h>

#include "cpu/token_copy.h"

namespace pruneops {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

int64_t fewest_positions(const Tensors& caches) {
  int64_t fewest = caches[0].size(2);
  for (const Tensor& cache : caches) fewest = std::min(fewest, cache.size(2));
  return fewest;
}

Tensors kv_compact(Tensors caches, Tensor keep, std::optional<Tensor> lengths) {
  expect_caches(caches, keep, false);
  Tensors results = token_copy::new_caches(caches, keep.size(keep.dim() - 1));
  const Plan plan = plan_compact(caches, results, keep, lengths, false);
  expect_values(plan, keep, fewest_positions(caches));
  run(plan);
  return results;
}

void kv_compact_(Tensors caches, Tensor keep, std::optional<Tensor> lengths) {
  expect_caches(caches, keep, true);
  const Plan plan = plan_compact(caches, caches, keep, lengths, true);
  expect_values(plan, keep, fewest_positions(caches));
  run(plan);
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CPU, m) {
  m.impl("kv_compact", TORCH_BOX(&pruneops::kv_compact));
  m.impl("kv_compact_", TORCH_BOX(&pruneops::kv_compact_));
}
