// Runs the kernel of csrc/cuda/token_copy.cuh on emulated threads, as operators of CPU tensors: what the CUDA operators
// do, except for their registration.

#include <torch/csrc/stable/library.h>

#include "token_copy_plan.h"
#include "runtime.h"

namespace pruneops {

template <class V>
V load_streaming(const V* p) {
  if (uintptr_t(p) % sizeof(V)) emulation::fail("load_streaming: address not aligned");
  return *p;
}

}  // namespace pruneops

#include "cuda/token_copy.cuh"

namespace pruneops {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

void emulate_plan(const Plan& plan, int64_t min_blocks, bool backwards) {
  if (plan.copies.empty()) return;
  for_each_launch(plan, min_blocks, [&](const CopyParams& params, int64_t blocks) {
    const size_t shared_bytes = plan.in_place ? kOffsetStages * sizeof(TileOffsets) : 0;
    const auto kernel = plan.in_place ? copy_tokens<true> : copy_tokens<false>;
    emulation::run(unsigned(blocks), kCopyThreads, shared_bytes, backwards, [&] { kernel(params); });
  });
}

Tensors kv_compact(Tensors caches, Tensor keep, std::optional<Tensor> lengths, int64_t min_blocks, bool backwards) {
  check_caches(caches, keep, false);
  Tensors results = token_copy::new_caches(caches, keep.size(keep.dim() - 1));
  emulate_plan(plan_compact(caches, results, keep, lengths, false), min_blocks, backwards);
  return results;
}

void kv_compact_(Tensors caches, Tensor keep, std::optional<Tensor> lengths, int64_t min_blocks, bool backwards) {
  check_caches(caches, keep, true);
  emulate_plan(plan_compact(caches, caches, keep, lengths, true), min_blocks, backwards);
}

void paged_kv_compact_(Tensors pages, Tensor table, Tensor keep, Tensor lengths, bool nhd, int64_t min_blocks,
                       bool backwards) {
  emulate_plan(plan_paged(pages, table, keep, lengths, nhd), min_blocks, backwards);
}

Tensors gather_tokens(Tensors tensors, Tensor keep, std::vector<int64_t> dims, int64_t min_blocks, bool backwards) {
  Tensors results;
  emulate_plan(plan_gather(tensors, keep, dims, results), min_blocks, backwards);
  return results;
}

// Chunk, chunks, tiles and blocks for `slices` slices of `count` tokens of `width` bytes, copied by vectors of
// `vec_bytes`.
std::vector<int64_t> chunking(int64_t width, int64_t vec_bytes, int64_t slices, int64_t count, int64_t min_chunks,
                              bool in_place) {
  Plan plan{{Layout{}}, {}, Positions{}, in_place};
  plan.layouts[0].rank = 1, plan.layouts[0].width = width, plan.layouts[0].dims[0] = {slices};
  plan.positions.count = count;
  const CopyGroup group = make_group(plan, 0, int(vec_bytes), min_chunks);
  return {group.chunk, group.chunks, group.tiles, group.blocks};
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY(pruneops_emulated, m) {
  m.def("kv_compact(Tensor[] caches, Tensor keep, Tensor? lengths, int min_blocks, bool backwards) -> Tensor[]");
  m.def("kv_compact_(Tensor(a!)[] caches, Tensor keep, Tensor? lengths, int min_blocks, bool backwards) -> ()");
  m.def(
      "paged_kv_compact_(Tensor(a!)[] pages, Tensor table, Tensor keep, Tensor lengths, bool nhd, int min_blocks, "
      "bool backwards) -> ()");
  m.def("gather_tokens(Tensor[] tensors, Tensor keep, int[] dims, int min_blocks, bool backwards) -> Tensor[]");
  m.def("chunking(int width, int vec_bytes, int slices, int count, int min_chunks, bool in_place) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(pruneops_emulated, CPU, m) {
  m.impl("kv_compact", TORCH_BOX(&pruneops::kv_compact));
  m.impl("kv_compact_", TORCH_BOX(&pruneops::kv_compact_));
  m.impl("paged_kv_compact_", TORCH_BOX(&pruneops::paged_kv_compact_));
  m.impl("gather_tokens", TORCH_BOX(&pruneops::gather_tokens));
}

STABLE_TORCH_LIBRARY_IMPL(pruneops_emulated, CompositeExplicitAutograd, m) {
  m.impl("chunking", TORCH_BOX(&pruneops::chunking));
}
