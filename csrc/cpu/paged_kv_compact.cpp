// Keeping some of the tokens of paged caches, in place; see cpu/moving.cpp.

#include <torch/csrc/stable/library.h>

#include "cpu/moving.h"

namespace pruneops {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Every page up to a request's last kept token is there and serves one place; positions are checked.
void expect_blocks(const Tensors& pages, const Plan& plan, const Tensor& block_table, const Tensor& keep) {
  const Positions& positions = plan.positions;
  const int64_t heads = keep.dim() == 3 ? keep.size(1) : 1;
  int64_t count = pages[0].size(0);
  for (const Tensor& tensor : pages) count = std::min(count, tensor.size(0));
  std::vector<bool> used(count);
  for (int64_t b = 0; b < keep.size(0); ++b) {
    const int64_t length = positions.length(b);
    int64_t last = -1;
    for (int64_t head = 0; head < heads && length > 0; ++head) {
      const int64_t* own = positions.keep + b * keep.stride(0) + (keep.dim() == 3 ? head * keep.stride(1) : 0);
      last = std::max(last, own[(length - 1) * positions.keep_token]);
    }
    for (int64_t block = 0; block * positions.page <= last; ++block) {
      const int64_t page = positions.table[b * positions.table_batch + block * positions.table_block];
      moves::expect(0 <= page && page < count, "a page is out of range");
      moves::expect(!used[page], "a page serves two places");
      used[page] = true;
    }
  }
}

void paged_kv_compact_(Tensors pages, Tensor block_table, Tensor keep, Tensor lengths, bool nhd) {
  const Plan plan = plan_paged(pages, block_table, keep, lengths, nhd);
  expect_values(plan, keep, block_table.size(1) * plan.positions.page);
  expect_blocks(pages, plan, block_table, keep);
  run(plan);
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CPU, m) {
  m.impl("paged_kv_compact_", TORCH_BOX(&pruneops::paged_kv_compact_));
}
