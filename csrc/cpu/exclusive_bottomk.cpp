// Exclusive bottom-k: each row of scores in turn selects its quota of lowest-scoring tokens among those not yet taken.
//
// Cost per batch row of P rows of N scores, K selected tokens: P N scores read once, O(P N + K log K) operations, 4 N
// bytes of taken marks.
// Each row is scanned once in SIMD vectors. Only scores below the bound of BottomK (bottomk.h) become keys, so most
// vectors cost one comparison.
// docs/kernels/exclusive_bottomk.md: algorithm, timings.

#include "cpu/exclusive_bottomk.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/bottomk.h"
#include "cpu/pivot_cosine.h"
#include "cpu/tokens.h"

#define PRUNEOPS_KERNEL "cpu/exclusive_bottomk_kernel.h"
#include "cpu/foreach_target.h"

namespace pruneops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Selects the tokens of one batch entry; `taken` as in exclusive_bottomk_scan.
void select_rows(const Tokens& scores, const std::vector<int64_t>& quotas, std::vector<uint32_t>& taken,
                 int64_t* indices) {
  const auto scan = PRUNEOPS_DISPATCH(exclusive_bottomk_scan);
  for (int64_t p = 0; p < int64_t(quotas.size()); ++p) {
    if (quotas[p] == 0) continue;
    BottomK bottomk(std::min(quotas[p], scores.width));
    scan(scores.type, scores.from(p * scores.stride).data, scores.width, taken.data(), bottomk);
    int64_t* const end = indices + quotas[p];
    for (const Key key : bottomk.sorted()) {
      const int64_t index = uint32_t(key);
      taken[index] = kTaken;
      *indices++ = index;
    }
    std::fill(indices, end, -1);
    indices = end;
  }
}

// `mask`, if given, equals `free` for the tokens that may be selected.
Tensor select(const Tensor& scores, const std::vector<int64_t>& quotas, const std::optional<Tensor>& mask, bool free) {
  const Tokens rows = tokens_of("exclusive_bottomk", scores);
  const int64_t batch = scores.size(0), tokens = scores.size(2);
  STD_TORCH_CHECK(scores.size(1) == int64_t(quotas.size()), "exclusive_bottomk: one quota for each row of scores");
  STD_TORCH_CHECK(!mask || (mask->size(0) == batch && mask->size(1) == tokens), "exclusive_bottomk: shape of taken");
  int64_t total = 0;
  for (const int64_t quota : quotas) {
    STD_TORCH_CHECK(quota >= 0, "exclusive_bottomk: a quota is negative");
    total += quota;
  }
  Tensor result = torch::stable::new_empty(scores, {batch, total}, ScalarType::Long);
  if (result.numel() == 0) return result;
  int64_t* indices = static_cast<int64_t*>(result.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 14) / (int64_t(quotas.size()) * tokens + 1));
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> taken(round_up(tokens, kPad), kTaken);
    for (int64_t b = begin; b < end; ++b) {
      const bool* flags = mask ? static_cast<const bool*>(mask->const_data_ptr()) + b * mask->stride(0) : nullptr;
      for (int64_t n = 0; n < tokens; ++n) taken[n] = !flags || flags[n * mask->stride(1)] == free ? 0 : kTaken;
      select_rows(rows.from(b * scores.stride(0)), quotas, taken, indices + b * total);
    }
  });
  return result;
}

Tensor pivot_bottomk(Tensor x, Tensor pivots, std::vector<int64_t> quotas, std::optional<Tensor> mask) {
  return select(pivot_cosine(x, std::nullopt, pivots, std::nullopt, int64_t(Reduce::kNone)), quotas, mask, true);
}

}  // namespace

Tensor exclusive_bottomk(Tensor scores, std::vector<int64_t> quotas, std::optional<Tensor> taken) {
  return select(scores, quotas, taken, false);
}

}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CPU, m) {
  m.impl("exclusive_bottomk", TORCH_BOX(&pruneops::exclusive_bottomk));
  m.impl("pivot_bottomk", TORCH_BOX(&pruneops::pivot_bottomk));
}
