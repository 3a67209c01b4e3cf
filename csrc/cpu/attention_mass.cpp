// attention_mass: attention from every query group to every key group. Each row's probability per key group
// (attention.cpp) is added to its query group, in row order and in double precision.
// Cost: one pass over the keys, plus H Sq G additions.
// docs/kernels/attention.md

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/attention.h"

namespace pruneops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::vector<int64_t> copy_of(const Tensor& groups) {
  std::vector<int64_t> copy;
  const int64_t* from = static_cast<const int64_t*>(groups.const_data_ptr());
  for (int64_t b = 0; b < groups.size(0); ++b)
    for (int64_t i = 0; i < groups.size(1); ++i) copy.push_back(from[b * groups.stride(0) + i * groups.stride(1)]);
  return copy;
}

std::tuple<Tensor, Tensor> attention_mass(Tensor query, Tensor key, Tensor query_group, Tensor key_group,
                                          int64_t groups, bool causal, double scale, std::optional<Tensor> lse) {
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
  const std::vector<int64_t> query_groups = copy_of(query_group);
  Attention attention(query, key, query_groups, copy_of(key_group), groups, causal, scale, lse);
  attention.compute_states(true);

  Tensor mass_result = torch::stable::new_empty(query, {batch, heads, groups, groups}, ScalarType::Float);
  Tensor lse_result = torch::stable::new_empty(query, {batch, heads, queries}, ScalarType::Float);
  float* all_mass = static_cast<float*>(mass_result.mutable_data_ptr());
  float* all_lse = static_cast<float*>(lse_result.mutable_data_ptr());
  dynamic_parallel_for(batch * heads, batch * heads * queries * Attention::kMergeWork, [&](int64_t i) {
    const int64_t b = i / heads;
    const Visible& visible = attention.visible[b];
    const Heads& h = attention.heads[i / (heads / key.size(1))];
    const int64_t head = i % h.heads;
    for (int64_t q = 0; q < queries; ++q)
      all_lse[i * queries + q] = lse ? h.lse[head * h.lse_head_stride + q * h.lse_stride] : -kInfinity;
    double mass[kMaxGroups][kMaxGroups] = {};
    for (int64_t p = 0; p < int64_t(visible.positions.size()); ++p) {
      const int64_t q = visible.positions[p], group = query_groups[b * queries + q];
      const RowSums row = attention.merge_states(h, p * h.heads + head);
      if (!lse) all_lse[i * queries + q] = row.lse;
      for (int64_t g = 0; g < groups; ++g) mass[group][g] += row.group_mass[g];
    }
    for (int64_t p = 0; p < groups; ++p)
      for (int64_t g = 0; g < groups; ++g) all_mass[(i * groups + p) * groups + g] = float(mass[p][g]);
  });
  return {mass_result, lse_result};
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CPU, m) { m.impl("attention_mass", TORCH_BOX(&pruneops::attention_mass)); }
