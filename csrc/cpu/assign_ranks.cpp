// Conflict-free rank assignment: each rank in turn takes the most probable token of its column that is still free.
//
// Cost per batch row: about 20 N (J + 1) operations, N (J + 1) logits read once, 4 N j bytes of costs written and read
// once. A log-softmax over the classes of each token writes costs [j, N]; exclusive_bottomk with quotas of 1 selects.
// docs/kernels/assign_ranks.md: algorithm, timings.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/exclusive_bottomk.h"
#include "cpu/tokens.h"

#define PRUNEOPS_KERNEL "cpu/assign_ranks_kernel.h"
#include "cpu/foreach_target.h"

namespace pruneops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor assign_ranks(Tensor logits, int64_t j) {
  const Tokens rows = tokens_of("assign_ranks", logits);
  const int64_t batch = logits.size(0), tokens = logits.size(1);
  STD_TORCH_CHECK(1 <= j && j < rows.width && j <= tokens, "assign_ranks: j is ", j, " for ", rows.width,
                  " classes and ", tokens, " tokens");
  const int64_t pitch = round_up(tokens, kPad) + kPad;  // whole vectors; the extra kPad avoids power-of-two strides
  Tensor costs = torch::stable::new_empty(logits, {batch, j, pitch}, ScalarType::Float);
  float* out = static_cast<float*>(costs.mutable_data_ptr());
  const auto softmax = PRUNEOPS_DISPATCH(assign_ranks_softmax);
  const int64_t tiles = (tokens + kPad - 1) / kPad, grain = 1 + (int64_t{1} << 14) / (kPad * rows.width);
  torch::stable::parallel_for(0, batch * tiles, grain, [&](int64_t begin, int64_t end) {
    Buffer scratch(kPad * (round_up(rows.width, kPad) + rows.width));
    while (begin < end) {
      const int64_t b = begin / tiles, tile = begin % tiles, last = std::min(tiles, tile + end - begin);
      softmax(rows.from(b * logits.stride(0)), tile * kPad, std::min(last * kPad, tokens), j, out + b * j * pitch,
              pitch, scratch);
      begin += last - tile;
    }
  });
  return exclusive_bottomk(torch::stable::narrow(costs, 2, 0, tokens), std::vector<int64_t>(j, 1), std::nullopt);
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CPU, m) { m.impl("assign_ranks", TORCH_BOX(&pruneops::assign_ranks)); }
