// Runs the kernel of csrc/cuda/token_copy.cuh on emulated threads, as operators of tensors in a CPU's memory: what the
// operators on CUDA do, except for their registration.

#include <torch/csrc/stable/library.h>

#include "token_copy_plan.h"
#include "runtime.h"

namespace pruneops {

template <class V>
V load_once(const V* p) {
  if (uintptr_t(p) % sizeof(V)) emulation::fail("load_once: address not aligned");
  return *p;
}

}  // namespace pruneops

#include "cuda/token_copy.cuh"

namespace pruneops {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

void run(const Plan& plan, int64_t enough, bool backwards) {
  if (plan.jobs.empty()) return;
  each_launch(plan, enough, [&](const Moves& moves, int64_t blocks) {
    const size_t shared_bytes = plan.in_place ? kPlaceTiles * sizeof(Places) : 0;
    const auto kernel = plan.in_place ? move_tokens<true> : move_tokens<false>;
    emulation::run(unsigned(blocks), kMoveThreads, shared_bytes, backwards, [&] { kernel(moves); });
  });
}

Tensors kv_compact(Tensors caches, Tensor keep, std::optional<Tensor> lengths, int64_t enough, bool backwards) {
  expect_caches(caches, keep, false);
  Tensors results = token_copy::new_caches(caches, keep.size(keep.dim() - 1));
  run(plan_compact(caches, results, keep, lengths, false), enough, backwards);
  return results;
}

void kv_compact_(Tensors caches, Tensor keep, std::optional<Tensor> lengths, int64_t enough, bool backwards) {
  expect_caches(caches, keep, true);
  run(plan_compact(caches, caches, keep, lengths, true), enough, backwards);
}

void paged_kv_compact_(Tensors pages, Tensor table, Tensor keep, Tensor lengths, bool nhd, int64_t enough,
                       bool backwards) {
  run(plan_paged(pages, table, keep, lengths, nhd), enough, backwards);
}

Tensors gather_tokens(Tensors tensors, Tensor keep, std::vector<int64_t> dims, int64_t enough, bool backwards) {
  Tensors results;
  run(plan_gather(tensors, keep, dims, results), enough, backwards);
  return results;
}

// Slice, slices, tiles and blocks for tokens of `width` bytes in so many lanes, at addresses of multiples of `unit`.
std::vector<int64_t> cut_of(int64_t width, int64_t unit, int64_t lanes, int64_t count, int64_t least, bool in_place) {
  Plan plan{{Form{}}, {}, Positions{}, in_place};
  plan.forms[0].rank = 1, plan.forms[0].width = width, plan.forms[0].dims[0] = {lanes};
  plan.positions.count = count;
  const Group group = group_of(plan, 0, int(unit), least);
  return {group.slice, group.slices, group.tiles, group.blocks};
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY(pruneops_emulated, m) {
  m.def("kv_compact(Tensor[] caches, Tensor keep, Tensor? lengths, int enough, bool backwards) -> Tensor[]");
  m.def("kv_compact_(Tensor(a!)[] caches, Tensor keep, Tensor? lengths, int enough, bool backwards) -> ()");
  m.def(
      "paged_kv_compact_(Tensor(a!)[] pages, Tensor table, Tensor keep, Tensor lengths, bool nhd, int enough, "
      "bool backwards) -> ()");
  m.def("gather_tokens(Tensor[] tensors, Tensor keep, int[] dims, int enough, bool backwards) -> Tensor[]");
  m.def("cut_of(int width, int unit, int lanes, int count, int least, bool in_place) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(pruneops_emulated, CPU, m) {
  m.impl("kv_compact", TORCH_BOX(&pruneops::kv_compact));
  m.impl("kv_compact_", TORCH_BOX(&pruneops::kv_compact_));
  m.impl("paged_kv_compact_", TORCH_BOX(&pruneops::paged_kv_compact_));
  m.impl("gather_tokens", TORCH_BOX(&pruneops::gather_tokens));
}

STABLE_TORCH_LIBRARY_IMPL(pruneops_emulated, CompositeExplicitAutograd, m) {
  m.impl("cut_of", TORCH_BOX(&pruneops::cut_of));
}
