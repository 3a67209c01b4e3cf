// kv_compact and kv_compact_ on the CPU: argument checks and registration; cpu/token_copy.cpp copies.
// Documentation: docs/kernels/token_copy.md

#include <torch/csrc/stable/library.h>

#include "cpu/token_copy.h"

namespace pruneops {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

int64_t min_positions(const Tensors& caches) {
  int64_t result = caches[0].size(2);
  for (const Tensor& cache : caches) result = std::min(result, cache.size(2));
  return result;
}

Tensors kv_compact(Tensors caches, Tensor keep, std::optional<Tensor> lengths) {
  check_caches(caches, keep, false);
  Tensors results = token_copy::new_caches(caches, keep.size(keep.dim() - 1));
  const Plan plan = plan_compact(caches, results, keep, lengths, false);
  check_values(plan, keep, min_positions(caches));
  run_plan(plan);
  return results;
}

void kv_compact_(Tensors caches, Tensor keep, std::optional<Tensor> lengths) {
  check_caches(caches, keep, true);
  const Plan plan = plan_compact(caches, caches, keep, lengths, true);
  check_values(plan, keep, min_positions(caches));
  run_plan(plan);
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CPU, m) {
  m.impl("kv_compact", TORCH_BOX(&pruneops::kv_compact));
  m.impl("kv_compact_", TORCH_BOX(&pruneops::kv_compact_));
}
