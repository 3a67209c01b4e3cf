// paged_kv_compact_ on the CPU: argument checks and registration; cpu/token_copy.cpp copies.
// Documentation: docs/kernels/token_copy.md

#include <torch/csrc/stable/library.h>

#include "cpu/token_copy.h"

namespace pruneops {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Length of the prefix of request b whose tokens keep their positions in every head.
int64_t unmoved_prefix(const Positions& positions, const Tensor& keep, int64_t b) {
  int64_t count = positions.length(b);
  for (int64_t head = 0; head < (keep.dim() == 3 ? keep.size(1) : 1); ++head) {
    const int64_t* row_keep = positions.keep + b * keep.stride(0) + (keep.dim() == 3 ? head * keep.stride(1) : 0);
    int64_t r = 0;
    while (r < count && row_keep[r * positions.keep_stride] == r) ++r;
    count = r;
  }
  return count;
}

// Checks that block_table entries up to each request's last kept token are pages, and that a page that is written
// appears once. Positions are checked already.
void check_blocks(const Tensors& pages, const Plan& plan, const Tensor& block_table, const Tensor& keep) {
  const Positions& positions = plan.positions;
  const int64_t heads = keep.dim() == 3 ? keep.size(1) : 1;
  int64_t count = pages[0].size(0);
  for (const Tensor& tensor : pages) count = std::min(count, tensor.size(0));
  std::vector<bool> used(count), written(count);
  for (int64_t b = 0; b < keep.size(0); ++b) {
    const int64_t length = positions.length(b), unmoved = unmoved_prefix(positions, keep, b);
    int64_t last = -1;
    for (int64_t head = 0; head < heads && length > 0; ++head) {
      const int64_t* row_keep = positions.keep + b * keep.stride(0) + (keep.dim() == 3 ? head * keep.stride(1) : 0);
      last = std::max(last, row_keep[(length - 1) * positions.keep_stride]);
    }
    for (int64_t block = 0; block * positions.page_size <= last; ++block) {
      const int64_t page =
          positions.block_table[b * positions.table_batch_stride + block * positions.table_block_stride];
      token_copy::check(0 <= page && page < count, "a page is out of range");
      const int64_t begin = block * positions.page_size, end = begin + positions.page_size;
      const bool writes = std::max(begin, unmoved) < std::min(end, length);
      token_copy::check(!used[page] || !(writes || written[page]),
                        "a page that is written appears twice in block_table");
      used[page] = true;
      if (writes) written[page] = true;
    }
  }
}

void paged_kv_compact_(Tensors pages, Tensor block_table, Tensor keep, Tensor lengths, bool nhd) {
  const Plan plan = plan_paged(pages, block_table, keep, lengths, nhd);
  check_values(plan, keep, block_table.size(1) * plan.positions.page_size);
  check_blocks(pages, plan, block_table, keep);
  run_plan(plan);
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CPU, m) {
  m.impl("paged_kv_compact_", TORCH_BOX(&pruneops::paged_kv_compact_));
}
