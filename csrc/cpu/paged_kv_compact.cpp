// Keeping some of the tokens of paged caches, in place; see cpu/token_copy.cpp.

#include <torch/csrc/stable/library.h>

#include "cpu/token_copy.h"

namespace pruneops {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Tokens of request b that every head leaves in their place: positions ascend, so they come first.
int64_t unmoved(const Positions& positions, const Tensor& keep, int64_t b) {
  int64_t count = positions.length(b);
  for (int64_t head = 0; head < (keep.dim() == 3 ? keep.size(1) : 1); ++head) {
    const int64_t* own = positions.keep + b * keep.stride(0) + (keep.dim() == 3 ? head * keep.stride(1) : 0);
    int64_t r = 0;
    while (r < count && own[r * positions.keep_token] == r) ++r;
    count = r;
  }
  return count;
}

// Every page up to a request's last kept token is there, and one that tokens move to serves one place; positions are
// checked.
void expect_blocks(const Tensors& pages, const Plan& plan, const Tensor& block_table, const Tensor& keep) {
  const Positions& positions = plan.positions;
  const int64_t heads = keep.dim() == 3 ? keep.size(1) : 1;
  int64_t count = pages[0].size(0);
  for (const Tensor& tensor : pages) count = std::min(count, tensor.size(0));
  std::vector<bool> used(count), written(count);
  for (int64_t b = 0; b < keep.size(0); ++b) {
    const int64_t length = positions.length(b), stay = unmoved(positions, keep, b);
    int64_t last = -1;
    for (int64_t head = 0; head < heads && length > 0; ++head) {
      const int64_t* own = positions.keep + b * keep.stride(0) + (keep.dim() == 3 ? head * keep.stride(1) : 0);
      last = std::max(last, own[(length - 1) * positions.keep_token]);
    }
    for (int64_t block = 0; block * positions.page <= last; ++block) {
      const int64_t page = positions.table[b * positions.table_batch + block * positions.table_block];
      token_copy::expect(0 <= page && page < count, "a page is out of range");
      const int64_t begin = block * positions.page, end = begin + positions.page;
      const bool moved_to = std::max(begin, stay) < std::min(end, length);
      token_copy::expect(!used[page] || !(moved_to || written[page]), "a page that tokens move to serves two places");
      used[page] = true;
      if (moved_to) written[page] = true;
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
